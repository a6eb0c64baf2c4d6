import threading

import pytest

from msae_sweep.sweep import record_writer
from msae_sweep.sweep.record_writer import RecordWriter


def test_what_is_posted_is_written_in_order_and_whole_when_it_is_closed():
    written = []
    with RecordWriter() as writing:
        for i in range(500):
            writing.post(lambda i=i: written.append((i, threading.current_thread().name)))
    assert written == [(i, "record-writer") for i in range(500)]


def test_posting_does_not_wait_for_the_disk_until_too_much_waits():
    disk_is_back = threading.Event()
    begun = threading.Event()
    with RecordWriter(begun.set) as writing:
        begun.wait()
        writing.post(disk_is_back.wait)
        while writing.n_waiting:  # wait until the thread has taken it
            pass
        for _ in range(record_writer.MOST_WAITING):
            writing.post(lambda: None)
        late = threading.Thread(target=writing.post, args=(lambda: None,))
        late.start()
        late.join(0.1)
        assert late.is_alive()
        disk_is_back.set()
        late.join()


def test_after_a_failure_nothing_more_is_written_and_the_end_raises_it():
    written = []

    def full() -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"), RecordWriter() as writing:  # noqa: PT012
        writing.post(full)
        writing.post(lambda: written.append("after"))
        while not writing.failed:
            pass
        writing.post(lambda: written.append("later"))
    assert written == []


def test_it_writes_what_waits_when_the_sweep_ends_with_an_error():
    written = []
    with pytest.raises(KeyboardInterrupt), RecordWriter() as writing:  # noqa: PT012
        writing.post(lambda: written.append(1))
        raise KeyboardInterrupt
    assert written == [1]


def test_nobody_waits_while_the_sweep_has_not_begun_and_nothing_is_written_before():
    written, data_is_ready = [], threading.Event()

    def begin() -> None:
        data_is_ready.wait()
        written.append("begin")

    with RecordWriter(begin) as writing:
        for i in range(3 * record_writer.MOST_WAITING):  # this would hang if one of them waited
            writing.post(lambda i=i: written.append(i))
        assert written == []
        data_is_ready.set()
    assert written == ["begin", *range(3 * record_writer.MOST_WAITING)]


def test_whoever_waits_for_room_is_let_go_when_a_write_fails():
    disk_fails = threading.Event()

    def full() -> None:
        disk_fails.wait()
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"), RecordWriter() as writing:  # noqa: PT012
        writing.post(full)
        poster = threading.Thread(
            target=lambda: [writing.post(lambda: None) for _ in range(2 * record_writer.MOST_WAITING)]
        )
        poster.start()
        disk_fails.set()
        poster.join()


def test_a_reason_to_end_that_was_found_elsewhere_is_raised_at_the_end_and_the_first_one_counts():
    written = []
    with pytest.raises(ValueError, match="first"), RecordWriter() as writing:  # noqa: PT012
        writing.fail(ValueError("first"))
        writing.fail(ValueError("second"))
        writing.post(lambda: written.append("after"))
    assert written == []
