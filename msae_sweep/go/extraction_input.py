"""Input of an extraction, games or a file of positions, turned into chunks."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from msae_sweep.errors import ConfigError, DataError, first_line
from msae_sweep.go.activation_folder import atomic
from msae_sweep.go.game_choice import GameChoice
from msae_sweep.go.game_reading import read_all_games
from msae_sweep.go.positions_file import (
    POSITION_BYTES,
    PositionsFile,
    PositionsSlice,
    open_positions,
    write_positions,
)
from msae_sweep.go.progress_bar import BytesProgress
from msae_sweep.go.records import ReadUnit, find_units
from msae_sweep.go.replay import replay
from msae_sweep.go.sampling import (
    Chunk,
    PositionsChunk,
    Sampling,
    check_sampling,
    games_sha256,
    make_chunks,
    make_positions_chunks,
    no_positions,
    sampled_plies,
)

_WRITTEN_FOR = "written_for"
"""Attribute of a written file of positions that identifies its games and the sampling."""


class ExtractionInput(NamedTuple):
    """Positions of an extraction, with counts for its summary."""

    chunks: Sequence[Chunk | PositionsChunk]
    identity: dict[str, str]
    """Hash of the games or of the file, under its key in the manifest."""
    n_games: int
    refused: dict[str, int]
    """Number of refused games by kind: broken, size, duplicate."""
    examples: list[str]
    """Names of some broken games, each with the reason."""
    counts: str
    """Where the games are from and how many were refused, as text."""

    @property
    def n_positions(self) -> int:
        """Number of positions of all chunks."""
        return sum(chunk.n_positions for chunk in self.chunks)


class InputSettings(NamedTuple):
    """Settings that say where the positions of an extraction come from."""

    games: Path | None
    positions: Path | None
    choice: GameChoice
    sampling: Sampling
    write_positions: Path | None

    def check(self) -> None:
        """Raise ConfigError if the settings contradict one another."""
        check_sampling(self.sampling)
        self.choice.check()
        if self.games is not None and self.positions is not None:
            raise ConfigError("--positions: cannot be given together with --games; give one of them")
        if self.games is None and self.positions is None:
            raise ConfigError("--games: missing; give game records, or positions with --positions")
        if self.positions is None:
            return
        chooses_games = {
            "--max-games": self.choice.max_games is not None,
            "--first-games": self.choice.first_games is not None,
            "--positions-per-game": self.sampling.positions_per_game is not None,
            "--min-move": self.sampling.min_move > 0,
            "--max-move": self.sampling.max_move is not None,
            "--consecutive": self.sampling.consecutive,
            "--write-positions": self.write_positions is not None,
        }
        if given := next((option for option, is_given in chooses_games.items() if is_given), None):
            raise ConfigError(f"{given}: chooses positions of --games, but --positions takes all positions of its file")

    def open(self) -> list[ReadUnit] | PositionsFile:
        """Return the units of the games, or the file of positions; this needs no Ray.

        Raises:
            ConfigError: the file of positions to be written exists and was not written by an extraction.
            DataError: the files are missing or not what they should be.
        """
        if self.write_positions is not None:
            _written_for(self.write_positions)
        if self.positions is not None:
            return open_positions(self.positions)
        assert self.games is not None
        return find_units(self.games, to_the_end=self.choice.first_games is None)


def read_input(
    settings: InputSettings, opened: list[ReadUnit] | PositionsFile, report: Callable[[BytesProgress], None]
) -> ExtractionInput:
    """Return the positions of an extraction; games are read with Ray, and their positions written if that is wanted.

    Raises:
        ConfigError: the file of positions to be written exists and holds other positions.
        DataError: no game is usable or has a position that is taken, a file is damaged, or the disk is full.
    """
    sampling = settings.sampling
    if isinstance(opened, PositionsFile):
        chunks = make_positions_chunks(opened.path, opened.n_positions, sampling)
        identity = {"positions_sha256": opened.sha256}
        return ExtractionInput(chunks, identity, opened.n_games, {}, [], f"from {opened.path}")
    assert settings.games is not None
    found = read_all_games(opened, settings.games, settings.choice, seed=sampling.seed, report=report)
    chunks_of_games = make_chunks(found.games, sampling)
    if not chunks_of_games:
        raise no_positions(settings.games, sampling)
    identity = {"games_sha256": games_sha256(found.games)}
    read = ExtractionInput(
        chunks=chunks_of_games,
        identity=identity,
        n_games=len(found.games),
        refused=dict(found.refused),
        examples=found.examples,
        counts=found.counted(),
    )
    if settings.write_positions is not None:
        _write(settings, settings.write_positions, read, chunks_of_games, report)
    return read


def _write(
    settings: InputSettings,
    path: Path,
    read: ExtractionInput,
    chunks: Sequence[Chunk],
    report: Callable[[BytesProgress], None],
) -> None:
    """Write the positions of games, unless they have been written for the same extraction already."""
    sampling, n_positions = settings.sampling, read.n_positions
    chosen = {**read.identity, **sampling._replace(points=0)._asdict()}
    identity = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
    if (before := _written_for(path)) is not None:
        if before != identity:
            raise ConfigError(f"--write-positions: {path} exists and holds other positions; give another name")
        return
    plies = [sampled_plies(game, sampling) for chunk in chunks for game in chunk.games]
    attributes = {
        "min_move": sampling.min_move,
        "max_move": max(int(taken.max()) for taken in plies) if sampling.max_move is None else sampling.max_move,
        "positions_per_game": sampling.positions_per_game or max(map(len, plies)),
        "seed": sampling.seed,
        "source": settings.games.name if settings.games is not None else "",
        _WRITTEN_FOR: identity,
    }

    def slices() -> Iterator[PositionsSlice]:
        done = 0
        for chunk in chunks:
            parts = []
            for game, taken in chunk.plies(sampling):
                parts.append((*replay(game, taken), taken, np.full(len(taken), game.game_id)))
            yield PositionsSlice(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
            done += chunk.n_positions
            report(BytesProgress(f"writing {path.name}", done * POSITION_BYTES, n_positions * POSITION_BYTES))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as part:
            write_positions(part, slices(), n_positions, attributes)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or first_line(error)}") from None


def _written_for(path: Path) -> str | None:
    """Return the identity for which a file of positions was written, or None if there is no file.

    Raises:
        ConfigError: the file exists, but no extraction wrote it.
    """
    if not path.exists():
        return None
    with contextlib.suppress(OSError, KeyError), h5py.File(path, "r") as file:
        return str(file.attrs[_WRITTEN_FOR])
    raise ConfigError(f"--write-positions: {path} exists and was not written by `extract`; give another name")
