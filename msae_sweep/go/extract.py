"""Extraction of an activation folder from game records, with Ray Data.

records → games (CPU tasks) → plan on the driver → boards (CPU tasks) → activations and files (one actor per GPU, or one
on the CPUs). Little data is sent between processes: a game has 1 KB, a position 3 KB, and the actor that computes the
activations writes them directly to disk. The plan depends only on games and settings, so the same seed gives the same
rows on any cluster.
"""

import collections
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import ray

from msae_sweep.errors import ConfigError, DataError
from msae_sweep.go.activation_folder import FORMATS, ActivationFolder
from msae_sweep.go.extraction_actor import ExtractionActor, StageSeconds, device_here
from msae_sweep.go.leela import Precision, resolve_precision
from msae_sweep.go.pipeline import GamesRead, read_all_games, run_actor_on_chunks
from msae_sweep.go.progress_bar import GamesProgress
from msae_sweep.go.records import ReadUnit, find_units
from msae_sweep.go.sampling import Sampling, games_sha256, make_chunks
from msae_sweep.go.weights import Weights, read_weights, weights_sha256


class ExtractionSettings(NamedTuple):
    """Settings of an extraction."""

    weights: Path
    games: Path
    out: Path
    blocks: tuple[int, ...]
    """Residual blocks, numbered from 0."""
    sampling: Sampling
    dtype: str = "float16"
    formats: tuple[str, ...] = ("npy",)
    precision: Precision = "auto"
    first_row: Literal["top", "bottom"] = "bottom"
    """Board row that is the network's row 0. Leela Zero's own program counts rows from the bottom. Networks were
    trained under all eight symmetries, so they play nearly the same with either setting, but their activations differ.
    `point` in the output always counts from the top left."""


class ExtractionSummary(NamedTuple):
    """Result of an extraction."""

    complete_before: bool
    """True if the folder was complete already and nothing was left to do."""
    games: int
    refused: dict[str, int]
    """Number of refused games by kind: broken, size, duplicate."""
    examples: list[str]
    """Names of some broken games, each with the reason."""
    positions: int
    rows: int
    seconds: float
    spent: StageSeconds

    def text(self, settings: ExtractionSettings) -> str:
        """Return a summary of a few lines for the user."""
        counts = GamesRead([], collections.Counter(self.refused), []).counted()
        lines = [f"{self.games:,} games ({counts}), {self.positions:,} positions, {self.rows:,} rows per block"]
        lines += [f"  broken: {example}" for example in self.examples]
        blocks = ",".join(str(block) for block in settings.blocks)
        state = "was complete already"
        if not self.complete_before:
            state = f"complete after {self.seconds:.1f} s; the network was busy {self.spent.busy:.0%} of the time"
        command = f"msae-sweep run search_spaces/leela_zero.yaml --data {settings.out} --set data.blocks=[{blocks}]"
        lines.append(f"{settings.out} {state}; next: {command}")
        return "\n".join(lines)


def check_settings(settings: ExtractionSettings) -> None:
    """Raise ConfigError if the settings are invalid; read no file."""
    if not settings.blocks or len(set(settings.blocks)) != len(settings.blocks):
        raise ConfigError(f"--blocks: {list(settings.blocks)} must name at least one block, and none twice")
    unknown = [name for name in settings.formats if name not in FORMATS]
    if unknown or not settings.formats:
        raise ConfigError(f"--format: {','.join(unknown) or 'nothing'} must be among {', '.join(FORMATS)}")
    points = settings.sampling.points
    if isinstance(points, int) and not 1 <= points <= 361:
        raise ConfigError(f"--points: {points} must be mean, all, or 1 to 361")


def extract(
    settings: ExtractionSettings,
    report: Callable[[GamesProgress], None] = lambda _: None,
    connect: Callable[[], None] = lambda: None,
) -> ExtractionSummary:
    """Run an extraction to completion, resuming it if the output folder contains an unfinished one.

    `connect` is called after all checks that do not need Ray, and must leave Ray initialised.

    Raises:
        ConfigError: the settings are invalid, the network lacks a block, or the output folder contains something else.
        DataError: there are no usable games, the weights file is invalid, or the disk is full.
    """
    started = time.monotonic()
    check_settings(settings)
    units = find_units(settings.games)
    weights = read_weights(settings.weights)
    for block in settings.blocks:
        if not 0 <= block < len(weights.blocks):
            last = len(weights.blocks) - 1
            raise ConfigError(f"--blocks: {block} is not in this network, which has blocks 0 to {last}")
    folder = ActivationFolder(settings.out, settings.blocks, settings.formats)
    settings = _as_begun(settings, folder)
    folder.check(_identity(settings))
    with folder.held():
        connect()
        return _extract(settings, folder, units, weights, report, started)


def _extract(
    settings: ExtractionSettings,
    folder: ActivationFolder,
    units: list[ReadUnit],
    weights: Weights,
    report: Callable[[GamesProgress], None],
    started: float,
) -> ExtractionSummary:
    """Run the part of the extraction that needs Ray; the caller holds the folder's lock."""
    precision = _precision_of_the_cluster(settings, folder)
    spent = dict.fromkeys(StageSeconds._fields, 0.0)
    with _timed(spent, "reading"):
        games, refused, examples = read_all_games(units, settings.games)
    chunks = make_chunks(games, settings.sampling)
    if not chunks:
        raise DataError(f"{settings.games}: no game is longer than --skip-first {settings.sampling.skip_first} moves")
    n_positions = sum(chunk.n_positions for chunk in chunks)
    rows = settings.sampling.rows_per_position

    def summary(complete_before: bool) -> ExtractionSummary:
        seconds = time.monotonic() - started
        total = n_positions * rows
        return ExtractionSummary(
            complete_before=complete_before,
            games=len(games),
            refused=dict(refused),
            examples=examples,
            positions=n_positions,
            rows=total,
            seconds=seconds,
            spent=StageSeconds(**spent),
        )

    settings = settings._replace(precision=precision())
    try:
        if not folder.begin({**_identity(settings), "games_sha256": games_sha256(games)}):
            return summary(True)
        done = folder.done()
        positions = sum(chunk.n_positions for chunk in chunks if chunk.number in done)
        report(GamesProgress(positions, n_positions, positions * rows, ""))
        left = [chunk for chunk in chunks if chunk.number not in done]
        for result in run_actor_on_chunks(
            left, settings.sampling, ExtractionActor, ([ray.put(weights)], settings, folder)
        ):
            positions += result["n_positions"]
            spent = {name: seconds + result.get(name, 0.0) for name, seconds in spent.items()}
            report(GamesProgress(positions, n_positions, positions * rows, str(result["device"])))
        with _timed(spent, "finishing"):
            folder.finish({"games": len(games), "refused": dict(refused), "positions": n_positions})
    except KeyboardInterrupt as interrupt:
        interrupt.add_note("finished rows are kept; run the same command to continue")
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(f"{settings.out}: {reason}; finished rows are kept; run the same command to continue") from None
    return summary(False)


def _as_begun(settings: ExtractionSettings, folder: ActivationFolder) -> ExtractionSettings:
    """Return the settings with `auto` replaced by the precision of the rows that the folder already contains.

    On another device `auto` may resolve to a different precision, and the folder would then mix rows of both.

    Raises:
        ConfigError: the manifest does not record the precision.
    """
    found = folder.found()
    if not found or settings.precision != "auto":
        return settings
    precision: Any = found.get("precision")
    if precision not in get_args(Precision) or (precision == "auto" and not found["complete"]):
        raise ConfigError(
            f"--out {settings.out}: was started by a version that did not record the precision; give another folder"
        )
    return settings._replace(precision=precision)


def _precision_of_the_cluster(settings: ExtractionSettings, folder: ActivationFolder) -> Callable[[], Precision]:
    """Return a function that waits for the precision of all rows, with `auto` resolved on the network's device."""
    if settings.precision != "auto" or folder.found():
        return lambda: settings.precision
    if not ray.cluster_resources().get("GPU"):
        return lambda: "fp32"
    # The task requests a GPU as the network's actors do. Its worker takes seconds to start; games are read meanwhile.
    asked = ray.remote(_precision_here).options(num_gpus=1).remote()
    return lambda: ray.get(asked)


def _precision_here() -> Precision:
    return resolve_precision(device_here(), "auto")


@contextlib.contextmanager
def _timed(spent: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    spent[name] += time.perf_counter() - started


def _identity(settings: ExtractionSettings) -> dict[str, Any]:
    """Return the settings that must be equal to resume an extraction; `games_sha256` is compared in addition."""
    return {
        "weights_sha256": weights_sha256(settings.weights),
        "blocks": list(settings.blocks),
        "blocks_numbered_from": 0,
        "taken": "after the add and the ReLU of the block; points run from the top left",
        **settings.sampling._asdict(),
        "dtype": settings.dtype,
        "formats": list(settings.formats),
        "precision": settings.precision,
        "first_row": settings.first_row,
    }
