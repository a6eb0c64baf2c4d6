"""Fixtures for the real games beside the checkout and for what an independent program computed from them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from msae_sweep.go.planes import planes
from msae_sweep.go.records import Record, read_records
from msae_sweep.go.replay import replay
from msae_sweep.go.sgf import Game, read_games

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def real_go() -> Path:
    """Folder with `games.tar.gz`, `weights/` and `reference/`. Without games or reference, tests skip and say why."""
    folder = Path(os.environ.get("MSAE_SWEEP_REAL_DATA", REAL_DATA))
    if not (folder / "games.tar.gz").is_file() or not (folder / "reference").is_dir():
        pytest.skip(f"no games.tar.gz and reference/ in {folder}; set MSAE_SWEEP_REAL_DATA to a folder that holds them")
    return folder


@pytest.fixture(scope="session")
def real_records(real_go) -> dict[int, Record]:
    """Real records by their five-digit numbers."""
    records = [record for record in read_records(real_go / "games.tar.gz") if isinstance(record, Record)]
    return {int(Path(record.name).stem): record for record in records}


@pytest.fixture(scope="session")
def real_games(real_records) -> dict[int, Game]:
    """Real games by the same numbers, which are the `game_id` of the reference."""
    games = {number: next(read_games(record)) for number, record in real_records.items()}
    return {number: game for number, game in games.items() if isinstance(game, Game)}


class Reference(NamedTuple):
    """Arrays that an independent loader computed for some positions of the real games."""

    arrays: dict[str, np.ndarray]
    """Arrays `policy_logits` [P, 362], `value` [P], `points` [P, 10], `block…` [P, 10, C], `game_id` and `ply` [P]."""
    x: torch.Tensor
    """The network's input for these positions, float32 [P, 18, 19, 19], computed by `replay` and `planes`."""


@pytest.fixture(scope="session")
def reference(real_go, real_games) -> Callable[[str], Reference]:
    """Function that returns the arrays of a network, such as "lz-6x64", and our planes of the same positions."""

    def load(network: str) -> Reference:
        with np.load(real_go / "reference" / f"{network}.npz") as file:
            arrays = dict(file)
        seen = [
            replay(real_games[number], np.array([ply]))
            for number, ply in zip(arrays["game_id"].tolist(), arrays["ply"].tolist(), strict=True)
        ]
        boards, black_to_move = (torch.from_numpy(np.concatenate(part)) for part in zip(*seen, strict=True))
        return Reference(arrays, planes(boards, black_to_move, torch.float32))

    return load
