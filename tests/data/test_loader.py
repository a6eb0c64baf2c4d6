import threading
import time

import numpy as np
import pytest
import torch

from msae_sweep.data.batches.loader import ResidentBatches, StreamedBatches, default_budget_bytes, make_batches
from msae_sweep.data.batches.prefetch import DEVICE_WINDOWS, HOST_WINDOWS
from msae_sweep.data.batches.windows import order_key, permutation
from msae_sweep.data.prepare.split import _splitmix64

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Best device of the machine that runs the tests. Both kinds of batches must behave the same on every device."""


def shards(sizes=(50, 30, 45, 7)):
    """Return fetchers of shards whose rows hold their own number in both columns, and the number of rows."""
    ends = np.cumsum(sizes)
    arrays = [
        np.repeat(np.arange(e - s, e, dtype=np.float32)[:, None], 2, axis=1) for s, e in zip(sizes, ends, strict=True)
    ]
    for array in arrays:
        array.flags.writeable = False
    return [lambda a=array: a for array in arrays], int(ends[-1])


def resident(batch_size=16):
    fetchers, n = shards()
    return ResidentBatches.load(fetchers, n, 2, batch_size, DEVICE)


def streamed(batch_size=16, window_bytes=600):
    fetchers, n = shards()
    return StreamedBatches(fetchers, n, 2, batch_size, DEVICE, window_bytes)


def numbers(batches) -> list[int]:
    return [int(v) for batch in batches for v in batch[:, 0]]


@pytest.mark.parametrize("make", [resident, streamed])
def test_an_epoch_has_full_batches_and_no_row_twice(make):
    batches = make()
    epoch = list(batches.epoch(1, seed=0))
    assert [len(b) for b in epoch] == [16] * (132 // 16)
    assert len(set(numbers(epoch))) == len(numbers(epoch))


@pytest.mark.parametrize("make", [resident, streamed])
def test_the_order_follows_from_epoch_and_seed_alone(make):
    def order(epoch, seed):
        return numbers(make().epoch(epoch, seed))

    torch.manual_seed(1)
    first = order(3, 7)
    torch.manual_seed(2)
    assert order(3, 7) == first
    assert order(4, 7) != first
    assert order(3, 8) != first


@pytest.mark.parametrize("make", [resident, streamed])
def test_an_epoch_begun_in_the_middle_of_training_is_the_same(make):
    batches = make()
    all_epochs = [numbers(batches.epoch(e, 0)) for e in (1, 2, 3)]
    assert numbers(make().epoch(3, 0)) == all_epochs[2]


@pytest.mark.parametrize("make", [resident, streamed])
def test_the_rows_left_out_differ_from_epoch_to_epoch(make):
    left = {frozenset(set(range(132)) - set(numbers(make().epoch(e, 0)))) for e in range(5)}
    assert len(left) > 1


@pytest.mark.parametrize("make", [resident, streamed])
def test_ordered_gives_every_row_once_in_order(make):
    batches = list(make().ordered())
    assert numbers(batches) == list(range(132))
    assert [len(b) for b in batches] == [16] * 8 + [4]


@pytest.mark.parametrize("window_bytes", [1, 600, 10**6])
def test_streamed_batches_hold_the_rows_that_resident_ones_do(window_bytes):
    batches = streamed(batch_size=12, window_bytes=window_bytes)  # 12 divides 132, so no row is left out
    assert sorted(numbers(batches.epoch(1, 0))) == sorted(numbers(resident(12).epoch(1, 0))) == list(range(132))


@pytest.mark.parametrize("make", [resident, streamed])
def test_windows_hold_contiguous_rows_and_an_order_of_full_batches(make):
    n_windows = 0
    for rows, order in make().windows(1, 0):
        n_windows += 1
        assert rows.dtype == torch.float32
        assert order.dtype == torch.int64
        assert rows.device.type == order.device.type == DEVICE.type
        assert rows.is_contiguous()
        assert len(order) > 0
        assert len(order) % 16 == 0
        assert order.unique().numel() == len(order)
        assert 0 <= order.min() <= order.max() < len(rows)
    assert n_windows == (1 if make is resident else 2)


@pytest.mark.parametrize("make", [resident, streamed])
def test_the_batches_of_an_epoch_are_those_of_its_windows(make):
    of_windows = [int(v) for rows, order in make().windows(2, 5) for v in rows[order][:, 0]]
    assert numbers(make().epoch(2, 5)) == of_windows


@pytest.mark.parametrize("make", [resident, streamed])
def test_every_piece_but_the_last_is_a_multiple_of_the_batch_size(make):
    pieces = [[int(v) for v in piece[:, 0]] for piece in make().pieces()]
    assert [v for piece in pieces for v in piece] == list(range(132))
    assert all(len(piece) % 16 == 0 for piece in pieces[:-1])
    assert make is resident or len(pieces) > 1


@pytest.mark.parametrize("make", [resident, streamed])
def test_fewer_rows_than_a_batch_give_no_window(make):
    batches = make().with_batch_size(133)
    assert list(batches.windows(1, 0)) == []
    assert [len(b) for b in batches.ordered()] == [132]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (0, 2), (1, 1), (-3, 1), (2**64 - 1, 10**6)])
def test_a_permutation_is_what_slow_arithmetic_gives(seed, epoch):
    key = order_key(seed, epoch)
    with np.errstate(over="ignore"):
        slow = np.zeros(1, dtype=np.uint64)
        for number in (seed, epoch):
            slow = _splitmix64(slow ^ np.uint64(number % 2**64))
        assert key % 2**64 == int(slow[0])
        hashed = _splitmix64(np.arange(1000, 1500, dtype=np.uint64) ^ slow) & np.uint64(2**63 - 1)
    expected = sorted(range(500), key=lambda i: int(hashed[i]))
    assert permutation(500, key, DEVICE, first=1000).tolist() == expected
    assert permutation(500, key, CPU, first=1000).tolist() == expected


def test_permutations_hold_every_number_once_and_differ():
    seen = set()
    for seed in range(3):
        for epoch in range(3):
            order = permutation(100, order_key(seed, epoch), CPU).tolist()
            assert sorted(order) == list(range(100))
            seen.add(tuple(order))
    assert len(seen) == 9


def test_a_stream_is_the_same_on_every_device_and_for_any_number_of_threads():
    fetchers, n = shards((50, 30, 45, 7, 200, 1))
    orders = [
        numbers(StreamedBatches(fetchers, n, 2, 16, device, 600, 900, n_threads).epoch(1, 0))
        for device, n_threads in ((CPU, 1), (CPU, 5), (DEVICE, 2))
    ]
    assert orders[0] == orders[1] == orders[2]


def test_a_window_stays_as_it_is_until_the_next_is_asked_for():
    batches = streamed(window_bytes=160)
    for rows, _ in batches.windows(1, 0):
        before = rows.clone()
        time.sleep(0.01)
        assert torch.equal(rows, before)


def test_work_that_is_still_queued_sees_the_rows_of_its_window():
    sums = []
    for rows, order in streamed(batch_size=12, window_bytes=160).windows(1, 0):
        if DEVICE.type == "cuda":
            torch.cuda._sleep(5_000_000)
        sums.append(rows[order][:, 0].double().sum())
    assert sum(s.item() for s in sums) == sum(range(132))


def test_windows_pass_through_the_same_memory_in_every_epoch_and_batch_size():
    batches = streamed(window_bytes=160)
    places = {rows.data_ptr() for epoch in (1, 2) for rows, _ in batches.windows(epoch, 0)}
    assert len(places) == (DEVICE_WINDOWS if DEVICE.type == "cuda" else HOST_WINDOWS)
    assert {rows.data_ptr() for rows, _ in batches.with_batch_size(8).windows(5, 1)} <= places
    assert {piece.data_ptr() for piece in batches.pieces()} <= places


def test_two_iterations_at_once_do_not_disturb_each_other():
    batches = streamed(window_bytes=160)
    pairs = list(zip(batches.epoch(1, 0), batches.epoch(1, 0), strict=True))
    assert len(pairs) == 8
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("mix_bytes", [1, 3000, 10**6])
def test_runs_that_do_not_divide_the_rows_lose_none(mix_bytes):
    fetchers, n = shards((301, 201, 401, 100))
    batches = StreamedBatches(fetchers, n, 2, 17, DEVICE, window_bytes=64 * 8 * 5, mix_bytes=mix_bytes)
    assert n == 17 * 59
    assert batches._plans.run == 5
    assert sorted(numbers(batches.epoch(1, 0))) == list(range(n))
    assert numbers(batches.ordered()) == list(range(n))


def test_stopping_in_the_middle_of_an_epoch_leaves_nothing_running():
    before = set(threading.enumerate())
    epoch = streamed().epoch(1, 0)
    next(epoch)
    epoch.close()
    assert set(threading.enumerate()) <= before


def test_dropped_batches_leave_nothing_running():
    before = set(threading.enumerate())
    batches = streamed()
    assert len(list(batches.epoch(1, 0))) == 8
    assert not set(threading.enumerate()) <= before, "the next epoch has begun"
    del batches
    deadline = time.monotonic() + 10
    while not set(threading.enumerate()) <= before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before


def test_the_next_epoch_begins_while_this_one_ends_and_gives_way_to_another():
    fetchers, n = shards((10,) * 8)
    fetched = []

    def logging(i):
        return lambda: fetched.append(i) or fetchers[i]()

    def make():
        return StreamedBatches([logging(i) for i in range(8)], n, 2, 20, CPU, window_bytes=160, mix_bytes=160)

    batches = make()
    first = numbers(batches.epoch(1, 0))
    deadline = time.monotonic() + 10
    while len(fetched) <= 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(fetched) > 8
    for epoch, seed in ((2, 0), (7, 0), (8, 0), (9, 1), (1, 0)):
        assert numbers(batches.epoch(epoch, seed)) == numbers(make().epoch(epoch, seed))
        assert numbers(batches.ordered()) == list(range(n))
    assert numbers(batches.epoch(1, 0)) == first


def test_an_exception_in_a_thread_reaches_the_consumer_and_a_later_epoch_is_whole():
    fetchers, n = shards((10,) * 8)
    broken = True

    def fails():
        if broken:
            raise OSError("the node is gone")
        return fetchers[5]()

    batches = StreamedBatches([*fetchers[:5], fails, *fetchers[6:]], n, 2, 20, DEVICE, window_bytes=160, mix_bytes=160)
    before = set(threading.enumerate())
    with pytest.raises(OSError, match="the node is gone"):
        list(batches.epoch(1, 0))
    with pytest.raises(OSError, match="the node is gone"):
        list(batches.pieces())
    assert set(threading.enumerate()) <= before
    broken = False
    assert sorted(numbers(batches.epoch(1, 0))) == list(range(n))


def test_an_exception_while_the_next_epoch_is_begun_does_not_end_this_one():
    fetchers, n = shards((10,) * 8)
    n_fetched = 0

    def fetch_once(i):
        def fetch():
            nonlocal n_fetched
            n_fetched += 1
            if n_fetched > 8:
                raise OSError("the node is gone")
            return fetchers[i]()

        return fetch

    batches = StreamedBatches([fetch_once(i) for i in range(8)], n, 2, 20, DEVICE, window_bytes=160, mix_bytes=160)
    assert sorted(numbers(batches.epoch(1, 0))) == list(range(n))
    with pytest.raises(OSError, match="the node is gone"):
        list(batches.epoch(2, 0))


def test_a_single_shard_on_the_cpu_is_not_copied():
    fetchers, n = shards((64,))
    batches = ResidentBatches.load(fetchers, n, 2, 16, CPU)
    assert batches.x.data_ptr() == fetchers[0]().ctypes.data


def test_streamed_rows_are_mixed_across_shards_however_small_the_window():
    fetchers, n = shards((128,) * 8)
    batches = StreamedBatches(fetchers, n, 2, 16, DEVICE, window_bytes=64 * 8)
    for rows, _ in batches.windows(1, 0):
        assert len({int(v) // 128 for v in rows[:, 0]}) >= 6


def test_streaming_holds_three_groups_of_shards_at_the_most():
    class Counted(np.ndarray):
        alive = 0

        def __del__(self):
            Counted.alive -= 1

    def counted(array):
        def fetch():
            shard = array.view(Counted)
            Counted.alive += 1
            return shard

        return fetch

    fetchers, n = shards((40,) * 40)
    counting = [counted(fetch()) for fetch in fetchers]
    batches = StreamedBatches(counting, n, 2, 10, CPU, window_bytes=80, mix_bytes=4 * 320)
    most = 0
    for _ in batches.windows(1, 0):
        time.sleep(0.001)
        most = max(most, Counted.alive)
    assert 2 * 4 <= most <= 3 * 4


def test_a_batch_size_can_change_without_copying():
    batches = resident()
    other = batches.with_batch_size(50)
    assert other.x is batches.x
    assert [len(b) for b in other.epoch(1, 0)] == [50, 50]
    assert [len(b) for b in streamed().with_batch_size(50).epoch(1, 0)] == [50, 50]


def test_the_budget_decides_and_the_reason_is_said():
    fetchers, n = shards()
    fits = make_batches(fetchers, n, 2, 16, CPU, budget_bytes=4 * n * 2)
    too_large = make_batches(fetchers, n, 2, 16, CPU, budget_bytes=4 * n * 2 - 1)
    assert isinstance(fits.batches, ResidentBatches)
    assert fits.reason.startswith("resident")
    assert isinstance(too_large.batches, StreamedBatches)
    assert too_large.reason.startswith("streamed")
    assert default_budget_bytes(CPU, 0.5) == pytest.approx(default_budget_bytes(CPU) / 2, rel=1e-6)
