"""Top activations of an MSAE: positions of real games at which each latent is strongest, drawn as boards.

They show what the latents stand for. The pipeline runs twice. The first pass processes every position and keeps for
each latent its strongest positions from different games, which takes a few numbers per latent however many games there
are. The second pass processes the chosen positions again, to find where on the board the latents fire.
"""

import collections
import json
import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import ray

from msae_sweep.errors import ConfigError, DataError
from msae_sweep.go import diagrams
from msae_sweep.go.board import N_POINTS, PASS
from msae_sweep.go.diagrams import Diagram, LatentDiagrams
from msae_sweep.go.leela import Precision
from msae_sweep.go.pipeline import ChosenPositions, read_all_games, run_actor_on_chunks
from msae_sweep.go.progress_bar import GamesProgress
from msae_sweep.go.records import find_units
from msae_sweep.go.replay import replay
from msae_sweep.go.sampling import CHUNK_POSITIONS, Sampling, make_chunks
from msae_sweep.go.sgf import Game
from msae_sweep.go.top_activation_actors import LatentMapActor, TopActivationActor
from msae_sweep.go.top_positions import FiringStatistics, TopPositions
from msae_sweep.go.weights import read_weights
from msae_sweep.paths import StoragePath, check_file, check_folder
from msae_sweep.sae.model_file import ModelFile


class TopActivationSettings(NamedTuple):
    """Settings of a page of top activations."""

    model: ModelFile
    name: str
    """Name of the model on the page."""
    weights: Path
    games: Path
    block: int
    """Block as the model's activations name it."""
    out: Path
    """Path of the HTML page. A .json file beside it lists every latent that fired, with its strongest positions."""
    latents: tuple[int, ...] | int
    """Latents to draw, as their numbers, or as a count of the latents that are strongest where they fire."""
    top: int
    """Maximum number of boards per latent."""
    k: int
    """Maximum number of active latents at a point."""
    sampling: Sampling
    precision: Precision = "auto"
    first_row: Literal["top", "bottom"] = "bottom"
    numbered_from: int = 0
    """Number of the network's first block in the numbering of `block`; 1 in activation folders of earlier versions."""
    notes: tuple[str, ...] = ()
    """Notes on the model and the network that are printed on the page."""

    @property
    def tap(self) -> int:
        """Block of the network, numbered from 0."""
        return self.block - self.numbered_from


class TopActivationSummary(NamedTuple):
    """Result of writing a page of top activations."""

    games: int
    refused: str
    positions: int
    alive: int
    """Number of latents that fired at least once."""
    drawn: int
    seconds: float

    def text(self, settings: TopActivationSettings) -> str:
        """Return a summary of two lines for the user."""
        hidden_dim = settings.model.model.hidden_dim
        return (
            f"{self.games:,} games ({self.refused}), {self.positions:,} positions, {self.seconds:.1f} s; "
            f"{self.alive:,} of {hidden_dim:,} latents fired\n"
            f"{settings.out}: {self.drawn} latents drawn; all latents are in {settings.out.with_suffix('.json')}"
        )


def parse_latents(text: str) -> tuple[int, ...] | int:
    """Parse the value of `--latents`: a number without a comma is a count; with commas, the numbers name latents.

    Raises:
        ConfigError: `text` is neither, or it names a latent twice.
    """
    parts = [part.strip() for part in text.split(",")]
    named = [part for part in parts if part]
    if not named or not all(part.isascii() and part.isdigit() for part in named):
        raise ConfigError(f"--latents: {text!r} must be a number of latents, e.g. 40, or their indices, e.g. 12,77")
    numbers = tuple(int(part) for part in named)
    if len(parts) == 1:
        if numbers[0] == 0:
            raise ConfigError(
                "--latents: 0 draws nothing; give a number of latents, e.g. 40, or indices, e.g. 12,77 (only 0: 0,)"
            )
        return numbers[0]
    if repeated := [number for number in numbers if numbers.count(number) > 1]:
        raise ConfigError(f"--latents: names {repeated[0]} more than once")
    return numbers


def write_top_activations(
    settings: TopActivationSettings,
    report: Callable[[GamesProgress], None] = lambda _: None,
    connect: Callable[[], None] = lambda: None,
) -> TopActivationSummary:
    """Find the strongest positions, then write the page and the JSON file.

    `connect` is called after all checks that do not need Ray, and must leave Ray initialised.

    Raises:
        ConfigError: the block or a latent does not exist, k is out of range, or the output path is invalid.
        DataError: there are no usable games, the weights file is invalid, the network's width differs from the model's,
            or the disk is full.
    """
    started = time.monotonic()
    units = find_units(settings.games)
    weights = read_weights(settings.weights)
    _check(settings, len(weights.blocks), weights.filters)
    connect()
    found = read_all_games(units, settings.games)
    games = found.games
    chunks = make_chunks(games, settings.sampling)
    if not chunks:
        raise DataError(f"{settings.games}: no game is longer than --skip-first {settings.sampling.skip_first} moves")
    arguments = ([ray.put(weights), ray.put(settings.model)], settings)
    n_positions = sum(chunk.n_positions for chunk in chunks)
    done = 0
    report(GamesProgress(0, n_positions, 0, ""))
    best: TopPositions | None = None
    firing: FiringStatistics | None = None
    for result in run_actor_on_chunks(chunks, settings.sampling, TopActivationActor, arguments):
        part, part_firing = pickle.loads(result["found"])
        best = part if best is None else best.merge(part)
        firing = part_firing if firing is None else firing.add(part_firing)
        done += result["n_positions"]
        report(GamesProgress(done, n_positions, done * N_POINTS, str(result["device"])))
    assert best is not None
    assert firing is not None
    latents = _chosen(settings, best, firing)
    by_id = {game.game_id: game for game in games}
    drawn = _drawn(
        settings=settings,
        latents=latents,
        best=best,
        firing=firing,
        n_positions=n_positions,
        games=by_id,
        arguments=arguments,
    )
    intro = [
        f"{settings.name} has {settings.model.model.hidden_dim:,} latents; at most {settings.k} of them are active at "
        "a point.",
        f"The boards show the positions at which a latent is strongest, at most one position per game, out "
        f"of {n_positions:,} positions of {len(games):,} games.",
    ]
    if isinstance(settings.latents, int):
        intro.append(
            f"The page shows the {len(latents)} latents that are strongest where they fire (largest mean z²), "
            f"strongest first. Only latents that fire in at least {settings.top} games are considered."
        )
    page = diagrams.render_page(
        f"Top activations of block {settings.block}'s latents", [*intro, *settings.notes], drawn
    )
    record = json.dumps(_record(settings, best, firing, n_positions, by_id))
    try:
        StoragePath(settings.out).write(page.encode())
        StoragePath(settings.out.with_suffix(".json")).write(record.encode())
    except OSError as error:
        raise DataError(f"{settings.out}: {error.strerror}") from None
    alive = int((firing.points > 0).sum())
    return TopActivationSummary(len(games), found.counted(), n_positions, alive, len(drawn), time.monotonic() - started)


def _check(settings: TopActivationSettings, n_blocks: int, filters: int) -> None:
    model = settings.model.model
    if not 0 <= settings.tap < n_blocks:
        first = settings.numbered_from
        raise ConfigError(
            f"--block: {settings.block} is not in this network, which has blocks {first} to {first + n_blocks - 1}"
        )
    if model.input_dim != filters:
        raise DataError(
            f"{settings.weights}: {filters} filters, but the model takes {model.input_dim} channels; "
            "give the network whose activations it was trained on"
        )
    if not 1 <= settings.k <= model.hidden_dim:
        raise ConfigError(f"--k: {settings.k} must be 1 to {model.hidden_dim}, the model's number of latents")
    if not isinstance(settings.latents, int):
        for latent in settings.latents:
            if not 0 <= latent < model.hidden_dim:
                raise ConfigError(f"--latents: {latent} is not in this model, which has 0 to {model.hidden_dim - 1}")
    if settings.out.suffix != ".html":
        raise ConfigError(f"--out: {settings.out} must end in .html")
    check_folder("--out", settings.out.parent)
    for file in (settings.out, settings.out.with_suffix(".json")):
        check_file("--out", file)


def _chosen(settings: TopActivationSettings, best: TopPositions, firing: FiringStatistics) -> list[int]:
    """Return the latents to draw: those named, or those with the largest mean z² that fire in enough games.

    Ranking by energy alone would select latents that fire nearly everywhere and tell little; ranking by rarity alone
    would select latents of a single game.
    """
    if not isinstance(settings.latents, int):
        return list(settings.latents)
    mean_square = firing.energy / firing.points.clamp_min(1)
    mean_square[best.value[:, -1] == 0] = 0
    order = mean_square.argsort(descending=True, stable=True)[: settings.latents]
    return [latent for latent in order.tolist() if mean_square[latent] > 0]


def _drawn(
    settings: TopActivationSettings,
    latents: Sequence[int],
    best: TopPositions,
    firing: FiringStatistics,
    n_positions: int,
    games: dict[int, Game],
    arguments: tuple[list[Any], TopActivationSettings],
) -> list[LatentDiagrams]:
    """Run the second pass and return the diagrams of `latents`."""
    wanted: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    for latent in latents:
        for value, game_id, ply in _places(best, latent):
            if value > 0:
                wanted[game_id, ply].append(latent)
    acts: dict[tuple[int, int, int], np.ndarray] = {}
    for result in run_actor_on_chunks(
        _picked(wanted, games), settings.sampling, LatentMapActor, (*arguments, dict(wanted))
    ):
        acts |= pickle.loads(result["found"])

    def diagram(latent: int, game_id: int, ply: int) -> Diagram:
        game = games[game_id]
        boards, black_to_move = replay(game, np.array([ply]))
        last = int(game.moves[ply - 1]) if ply else PASS
        return Diagram(
            stones=boards[0, 0] * np.int8(1 if black_to_move[0] else -1),
            acts=acts[latent, game_id, ply],
            black_to_move=bool(black_to_move[0]),
            last_move=None if last == PASS else last,
            ply=ply,
            game=game.name,
        )

    energy = firing.energy.sum().item()
    return [
        LatentDiagrams(
            latent,
            firing.points[latent].item() / (n_positions * N_POINTS),
            firing.energy[latent].item() / energy if energy else 0.0,
            [diagram(latent, game_id, ply) for value, game_id, ply in _places(best, latent) if value > 0],
        )
        for latent in latents
    ]


def _picked(wanted: dict[tuple[int, int], list[int]], games: dict[int, Game]) -> list[ChosenPositions]:
    by_game: dict[int, list[int]] = collections.defaultdict(list)
    for game_id, ply in sorted(wanted):
        by_game[game_id].append(ply)
    chunks: list[ChosenPositions] = []
    picks: list[tuple[Game, np.ndarray]] = []
    for game_id, plies in by_game.items():
        picks.append((games[game_id], np.array(plies)))
        if sum(len(taken) for _, taken in picks) >= CHUNK_POSITIONS:
            chunks.append(_chunk(chunks, picks))
            picks = []
    return [*chunks, _chunk(chunks, picks)] if picks else chunks


def _chunk(before: list[ChosenPositions], picks: list[tuple[Game, np.ndarray]]) -> ChosenPositions:
    first = before[-1].first_position + before[-1].n_positions if before else 0
    return ChosenPositions(len(before), first, sum(len(plies) for _, plies in picks), picks)


def _places(best: TopPositions, latent: int) -> list[tuple[float, int, int]]:
    value, game_id, ply = (tensor[latent].tolist() for tensor in best)
    return list(zip(value, game_id, ply, strict=True))


def _record(
    settings: TopActivationSettings,
    best: TopPositions,
    firing: FiringStatistics,
    n_positions: int,
    games: dict[int, Game],
) -> dict[str, Any]:
    """Return the content of the JSON file.

    For every latent that fired it has the share of points, the share of energy and the strongest positions.
    """
    energy = firing.energy.sum().item()
    return {
        "model": settings.name,
        "block": settings.block,
        "k": settings.k,
        "positions": n_positions,
        "games": len(games),
        "latents": {
            str(latent): {
                "points": points / (n_positions * N_POINTS),
                "energy": firing.energy[latent].item() / energy,
                "strongest": [
                    {"value": round(value, 4), "game": games[game_id].name, "ply": ply}
                    for value, game_id, ply in _places(best, latent)
                    if value > 0
                ],
            }
            for latent, points in enumerate(firing.points.tolist())
            if points
        },
    }
