import json

import pytest

from msae_sweep.errors import SweepError, TrackingError
from msae_sweep.track import journal
from msae_sweep.track.cursor import Cursor, SentTrial
from msae_sweep.track.journal import Journal


def events(folder):
    return folder / "journal" / "events.jsonl"


def write(folder, *numbers):
    written = Journal(folder)
    for number in numbers:
        written.append("metrics", number=number)
    written.close()


def numbers(folder):
    return [entry.event.get("number") for entry in journal.read(folder)]


def test_events_are_read_in_order_and_from_any_position(tmp_path):
    write(tmp_path, 1, 2, 3)
    entries = list(journal.read(tmp_path))
    assert [(entry.seq, entry.kind, entry.event["number"]) for entry in entries] == [
        (1, "metrics", 1),
        (2, "metrics", 2),
        (3, "metrics", 3),
    ]
    assert list(journal.read(tmp_path, entries[0].end, 1)) == entries[1:]


def test_a_sweep_without_a_journal_has_no_events(tmp_path):
    assert list(journal.read(tmp_path)) == []


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_torn_last_line_is_cut_off_and_numbers_go_on(tmp_path, cut):
    write(tmp_path, 1, 2)
    whole = events(tmp_path).read_bytes()
    events(tmp_path).write_bytes(whole[:-cut])
    assert numbers(tmp_path) == [1]
    write(tmp_path, 3)
    assert numbers(tmp_path) == [1, 3]
    assert [json.loads(line)["seq"] for line in events(tmp_path).read_text().splitlines()] == [1, 2]


def test_a_line_of_rubbish_hides_no_event_behind_it(tmp_path):
    write(tmp_path, 1)
    with open(events(tmp_path), "ab") as file:
        file.write(b"\0\0\0\n[1]\n")
    write(tmp_path, 2)
    assert [entry.kind for entry in journal.read(tmp_path)] == [
        "metrics",
        journal.UNREADABLE,
        journal.UNREADABLE,
        "metrics",
    ]
    assert [entry.seq for entry in journal.read(tmp_path)] == [1, 2, 3, 4]


def test_no_second_driver_writes_the_same_journal(tmp_path):
    first = Journal(tmp_path)
    with pytest.raises(SweepError, match="run by another process"):
        Journal(tmp_path)
    first.close()
    Journal(tmp_path).close()


def test_no_second_sender_sends_the_same_sweep(tmp_path):
    Journal(tmp_path).close()
    held = journal.lock(tmp_path)
    with pytest.raises(TrackingError, match=r"process \d+ on .* is sending"):
        journal.lock(tmp_path)
    held.close()
    journal.lock(tmp_path).close()


def test_no_secret_reaches_the_disk(tmp_path):
    written = Journal(tmp_path)
    written.append(
        "sweep_started", config_yaml="uri: http://me:secret@host\n", params={"tracking.uri": "x://a:secret@b"}
    )
    written.close()
    assert "secret" not in events(tmp_path).read_text()
    assert next(iter(journal.read(tmp_path))).event["config_yaml"] == "uri: http://***@host\n"


def test_a_cursor_is_what_was_saved_and_a_broken_one_begins_anew(tmp_path):
    (tmp_path / "journal").mkdir()
    assert Cursor.load(tmp_path) == Cursor()
    cursor = Cursor("sqlite:///x study", 120, 3, sweep_id="s", run_id="r", trials={"t": SentTrial("q", 5, 2)})
    cursor.save(tmp_path)
    assert Cursor.load(tmp_path) == cursor
    (tmp_path / "journal" / "cursor.json").write_text('{"position": 5')
    assert Cursor.load(tmp_path) == Cursor()


class FullAfter:
    """File whose disk takes `n_bytes` more bytes and is then full."""

    def __init__(self, file, n_bytes):
        self._file, self._left, self.name = file, n_bytes, file.name

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, content):
        if not self._left:
            raise OSError(28, "No space left on device")
        taken = self._file.write(content[: self._left])
        self._left -= taken
        return taken


@pytest.mark.parametrize("n_bytes", [0, 20])
def test_an_event_that_does_not_fit_on_the_disk_leaves_no_half_line_and_closing_says_nothing_new(tmp_path, n_bytes):
    write(tmp_path, 1)
    full = Journal(tmp_path)
    room = full._file
    full._file = FullAfter(room, n_bytes)
    with pytest.raises(OSError, match="No space left") as raised:
        full.append("metrics", number=2)
    assert raised.value.filename == str(events(tmp_path))
    full._file = room
    full.append("metrics", number=3)
    full.close()
    assert numbers(tmp_path) == [1, 3]
    assert [entry.seq for entry in journal.read(tmp_path)] == [1, 2]
