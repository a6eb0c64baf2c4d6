import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from msae_sweep.config import DataConfig, SweepConfig, parse
from msae_sweep.data.prepare.shards import PreparedBlock
from msae_sweep.data.sources.base import BlockInfo
from msae_sweep.errors import DataError, SweepError
from msae_sweep.sweep import preparation
from msae_sweep.sweep.preparation import Preparation, enough_free_cores

pytestmark = pytest.mark.usefixtures("ray_session")


def config(tmp_path: Path, *overrides: str) -> SweepConfig:
    return parse("name: x\ndata: {path: planted, blocks: [5, 20]}\n", [f"storage={tmp_path}", *overrides])


INFOS = [BlockInfo(block, "here", 100, 64, "float32", False) for block in (5, 20)]


class Shards:
    """Stand-in for `data.prepare.shards` whose blocks are ready when the test sets their events."""

    def __init__(self) -> None:
        self.ready = {5: threading.Event(), 20: threading.Event()}
        self.faults: dict[int, Exception] = {}

    def prepare_blocks(
        self, config: DataConfig, storage: str, *, batch_size: int, on_progress: Any, on_ready: Any
    ) -> dict[int, Any]:
        prepared = {}
        for block in config.blocks or ():
            assert self.ready[block].wait(30)
            if block in self.faults:
                raise self.faults[block]
            prepared[block] = PreparedBlock(block, 64, 90, 10, None, None, {"block": block}, [])
            on_ready(prepared[block])
        return prepared


@pytest.fixture
def shards(monkeypatch) -> Shards:
    stand_in = Shards()
    monkeypatch.setattr(preparation, "shards", stand_in)
    return stand_in


def test_a_block_is_handed_out_as_soon_as_it_is_ready(shards, tmp_path):
    under_way = Preparation(config(tmp_path), INFOS, lambda line: None)
    blocks = under_way.blocks()
    assert 5 not in blocks
    shards.ready[5].set()
    assert blocks[5].manifest == {"block": 5}
    assert 5 in blocks
    assert 20 not in blocks
    threading.Timer(0.2, shards.ready[20].set).start()
    assert blocks[20].manifest == {"block": 20}
    assert list(under_way.wait()) == [5, 20]


def test_where_a_block_cannot_be_prepared_the_driver_hears_why_and_nobody_waits_for_ever(shards, tmp_path):
    shards.faults[20] = DataError("rows 3-5: NaN or Inf")
    under_way = Preparation(config(tmp_path), INFOS, lambda line: None)
    blocks = under_way.blocks()
    shards.ready[5].set()
    threading.Timer(0.2, shards.ready[20].set).start()
    with pytest.raises(SweepError, match="block 20 could not be prepared"):
        blocks[20]
    with pytest.raises(DataError, match="rows 3-5"):
        under_way.wait()
    assert blocks[5].manifest == {"block": 5}, "what was ready stays so"


def test_an_interrupted_sweep_does_not_wait_for_its_data(shards, tmp_path):
    under_way = Preparation(config(tmp_path), INFOS, lambda line: None)
    under_way.abandon()
    with pytest.raises(SweepError, match="interrupted before the data was ready"):
        under_way.wait()
    for ready in shards.ready.values():
        ready.set()


@pytest.mark.parametrize(
    ("cluster", "gpus", "resources", "expected"),
    [
        ({"CPU": 16, "GPU": 1}, 1, {}, True),
        ({"CPU": 16, "GPU": 1}, 0.5, {}, True),
        ({"CPU": 16, "GPU": 1}, 0.1, {}, False),
        ({"CPU": 64, "GPU": 8}, 1, {}, True),
        ({"CPU": 8, "GPU": 8}, 1, {}, False),
        ({"CPU": 16, "GPU": 1}, 0, {}, False),
        ({"CPU": 16}, 0, {"max_concurrent": 4}, True),
        ({"CPU": 2}, 0, {"max_concurrent": 1}, False),
        ({"CPU": 4, "GPU": 1}, 1, {}, False),
        ({"CPU": 2}, 0, {}, False),
        ({"CPU": 1, "GPU": 1}, 1, {}, False),
    ],
)
def test_trials_start_beside_the_preparation_where_they_leave_it_half_of_the_cores(
    monkeypatch, tmp_path, cluster, gpus, resources, expected
):
    monkeypatch.setattr(preparation.ray, "cluster_resources", lambda: cluster)
    overrides = [f"resources.{key}={value}" for key, value in resources.items()]
    assert enough_free_cores(config(tmp_path, *overrides), gpus) is expected


def test_the_process_that_hands_blocks_out_imports_nothing_heavy():
    script = "import sys, msae_sweep.sweep.ready_blocks; print(*{'torch', 'ray.tune', 'ray.data'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
