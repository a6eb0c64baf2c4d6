"""The pipeline from game records to an activation folder, with Ray Data.

records → games (CPU tasks) → plan on the driver → boards (CPU tasks) → activations and files (one actor a GPU, or one
on the CPUs). What travels is small: a game 1 KB, a position 3 KB; activations go from the actor that computed them
straight to the disk. The plan depends on games and settings alone: the same seed gives the same rows on any cluster.
"""

import collections
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import ray

import msae_sweep
from msae_sweep.errors import ConfigError, DataError
from msae_sweep.go.activation_folder import FORMATS, OutputFolder
from msae_sweep.go.extraction_actor import ExtractionActor, StageSeconds, device_here
from msae_sweep.go.leela import Precision, resolve
from msae_sweep.go.pipeline import Games, read_all, run
from msae_sweep.go.progress_bar import GamesProgress
from msae_sweep.go.records import Unit, find_units
from msae_sweep.go.sampling import Sampling, cut, games_sha256
from msae_sweep.go.weights import Weights, read_weights, weights_sha256


class ExtractionSettings(NamedTuple):
    """What an extraction is asked for."""

    weights: Path
    games: Path
    out: Path
    blocks: tuple[int, ...]
    sampling: Sampling
    dtype: str = "float16"
    formats: tuple[str, ...] = ("npy",)
    precision: Precision = "auto"
    first_row: Literal["top", "bottom"] = "top"
    """Which row of the board the network's row 0 is. Networks that Leela Zero's own program trained count from the
    bottom; all were trained under all eight symmetries, so either way they play nearly the same. `point` in the output
    always counts from the top left."""


class ExtractionSummary(NamedTuple):
    """What an extraction came to."""

    complete_before: bool
    """Nothing was left to do."""
    games: int
    refused: dict[str, int]
    """Games that gave nothing, by kind: broken, size, duplicate."""
    examples: list[str]
    """Some of the broken ones, with the reason."""
    positions: int
    rows: int
    seconds: float
    spent: StageSeconds

    def text(self, settings: ExtractionSettings) -> str:
        """What a user wants to know of it, in a few lines."""
        counts = Games([], collections.Counter(self.refused), []).counted()
        lines = [f"{self.games:,} games ({counts}), {self.positions:,} positions, {self.rows:,} rows a block"]
        lines += [f"  broken: {example}" for example in self.examples]
        blocks = ",".join(str(block) for block in settings.blocks)
        state = "was complete already"
        if not self.complete_before:
            state = f"complete after {self.seconds:.1f} s, the network busy {self.spent.busy:.0%} of its time"
        command = f"msae-sweep run search_spaces/leela_zero.yaml --data {settings.out} --set data.blocks=[{blocks}]"
        lines.append(f"{settings.out} {state}; next: {command}")
        return "\n".join(lines)


def check_settings(settings: ExtractionSettings) -> None:
    """What can be said before any work: raises ConfigError or DataError."""
    if not settings.blocks or len(set(settings.blocks)) != len(settings.blocks):
        raise ConfigError(f"--blocks: {list(settings.blocks)} must name at least one block, each once")
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
    """Run an extraction to its end, or go on with one.

    `connect` is called when all that needs no Ray has been checked; after it, Ray must be initialised.

    Raises:
        ConfigError: settings that cannot be, a block beyond the tower, or an output folder of something else.
        DataError: no games, none that can be read, a weights file that is none, or no room on the disk.
    """
    started = time.monotonic()
    check_settings(settings)
    units = find_units(settings.games)
    weights = read_weights(settings.weights)
    for block in settings.blocks:
        if not 1 <= block <= len(weights.blocks):
            raise ConfigError(f"--blocks: {block} is not in this network, which has blocks 1 to {len(weights.blocks)}")
    folder = OutputFolder(settings.out, settings.blocks, settings.formats)
    settings = _as_begun(settings, folder)
    folder.check(_identity(settings))
    with folder.held():
        connect()
        return _extract(settings, folder, units, weights, report, started)


def _extract(
    settings: ExtractionSettings,
    folder: OutputFolder,
    units: list[Unit],
    weights: Weights,
    report: Callable[[GamesProgress], None],
    started: float,
) -> ExtractionSummary:
    """Everything that needs Ray; the folder is held."""
    precision = _precision_of_the_cluster(settings, folder)
    spent = dict.fromkeys(StageSeconds._fields, 0.0)
    with _timed(spent, "reading"):
        games, refused, examples = read_all(units, settings.games)
    chunks = cut(games, settings.sampling)
    if not chunks:
        raise DataError(f"{settings.games}: no game is longer than --skip-first {settings.sampling.skip_first} moves")
    n_positions = sum(chunk.n_positions for chunk in chunks)
    rows = settings.sampling.rows_per_position

    def summary(complete_before: bool) -> ExtractionSummary:
        seconds = time.monotonic() - started
        total = n_positions * rows
        return ExtractionSummary(
            complete_before, len(games), dict(refused), examples, n_positions, total, seconds, StageSeconds(**spent)
        )

    settings = settings._replace(precision=precision())
    try:
        if not folder.begin({**_identity(settings), "games_sha256": games_sha256(games)}):
            return summary(True)
        done = folder.done()
        positions = sum(chunk.n_positions for chunk in chunks if chunk.number in done)
        report(GamesProgress(positions, n_positions, positions * rows, ""))
        left = [chunk for chunk in chunks if chunk.number not in done]
        for result in run(left, settings.sampling, ExtractionActor, ([ray.put(weights)], settings, folder)):
            positions += result["n_positions"]
            spent = {name: seconds + result.get(name, 0.0) for name, seconds in spent.items()}
            report(GamesProgress(positions, n_positions, positions * rows, str(result["device"])))
        with _timed(spent, "finishing"):
            folder.finish({"games": len(games), "refused": dict(refused), "positions": n_positions})
    except KeyboardInterrupt as interrupt:
        interrupt.add_note("what is done is kept, the same command goes on")
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(f"{settings.out}: {reason}; what is done is kept, the same command goes on") from None
    return summary(False)


def _as_begun(settings: ExtractionSettings, folder: OutputFolder) -> ExtractionSettings:
    """Settings with the precision of the rows that are there already, where `auto` leaves it open.

    On another device `auto` may stand for another one, and rows of both would lie in one folder.

    Raises:
        ConfigError: the folder does not tell it.
    """
    found = folder.found()
    if not found or settings.precision != "auto":
        return settings
    precision: Any = found.get("precision")
    if precision not in get_args(Precision) or (precision == "auto" and not found["complete"]):
        raise ConfigError(
            f"--out {settings.out}: was begun by a version that did not note in which precision; give another folder"
        )
    return settings._replace(precision=precision)


def _precision_of_the_cluster(settings: ExtractionSettings, folder: OutputFolder) -> Callable[[], Precision]:
    """A function that waits for the precision of all rows: what `auto` stands for where the network will run."""
    if settings.precision != "auto" or folder.found():
        return lambda: settings.precision
    if not ray.cluster_resources().get("GPU"):
        return lambda: "fp32"
    # Asked for as the actors are that hold the network. A worker takes seconds to start: games are read meanwhile.
    asked = ray.remote(_precision_here).options(num_gpus=1).remote()
    return lambda: ray.get(asked)


def _precision_here() -> Precision:
    return resolve(device_here(), "auto")


@contextlib.contextmanager
def _timed(spent: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    spent[name] += time.perf_counter() - started


def _identity(settings: ExtractionSettings) -> dict[str, Any]:
    """Settings that two extractions share if they are the same one; `games_sha256` is compared besides."""
    return {
        "weights_sha256": weights_sha256(settings.weights),
        "blocks": list(settings.blocks),
        "taken": "after the add and the ReLU of the block; blocks are numbered from 1; points run from the top left",
        **settings.sampling._asdict(),
        "dtype": settings.dtype,
        "formats": list(settings.formats),
        "precision": settings.precision,
        "first_row": settings.first_row,
        "msae_sweep": msae_sweep.__version__,
    }
