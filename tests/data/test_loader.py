import numpy as np
import pytest
import torch

from msae_sweep.data.loader import ResidentBatches, StreamedBatches, default_budget, make_batches

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""The laws of both kinds hold on every device; each machine tries the best that it has."""


def shards(sizes=(50, 30, 45, 7)):
    """Rows that carry their own number in both columns."""
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
    batches = streamed(batch_size=12, window_bytes=window_bytes)  # 12 divides 132: no row is left out
    assert sorted(numbers(batches.epoch(1, 0))) == sorted(numbers(resident(12).epoch(1, 0))) == list(range(132))


def test_stopping_in_the_middle_of_an_epoch_leaves_nothing_running():
    import threading

    before = threading.active_count()
    epoch = streamed().epoch(1, 0)
    next(epoch)
    epoch.close()
    assert threading.active_count() == before


def test_a_single_shard_on_the_cpu_is_not_copied():
    fetchers, n = shards((64,))
    batches = ResidentBatches.load(fetchers, n, 2, 16, CPU)
    assert batches.x.data_ptr() == fetchers[0]().ctypes.data


def test_streamed_rows_are_mixed_across_shards():
    first = numbers(list(streamed(window_bytes=10_000).epoch(1, 0))[:1])
    assert len({np.searchsorted([50, 80, 125], n, side="right") for n in first}) > 1


def test_streaming_holds_two_windows_at_the_most():
    held, most = 0, 0
    fetchers, n = shards((10,) * 40)

    def counting(fetch):
        def wrapped():
            nonlocal held, most
            held += 1
            most = max(most, held)
            return fetch()

        return wrapped

    batches = StreamedBatches([counting(f) for f in fetchers], n, 2, 20, CPU, window_bytes=160)
    for _ in batches.epoch(1, 0):
        held = 0
    assert most <= 3 * 2


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
    assert default_budget(CPU, 0.5) == pytest.approx(default_budget(CPU) / 2, rel=1e-6)
