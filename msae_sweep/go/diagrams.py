"""Latents drawn as Go boards: one page that needs no network, where every board is a small vector drawing."""

import math
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int8

from msae_sweep.go.board import PASS, SIZE

_STARS = [(x, y) for y in (3, 9, 15) for x in (3, 9, 15)]
_LINES = "".join(f"M{i} 0V{SIZE - 1}M0 {i}H{SIZE - 1}" for i in range(SIZE))


class Diagram(NamedTuple):
    """A position, and how strongly a latent fires at each of its points. Points run row by row from the top."""

    stones: Int8[np.ndarray, "361"]
    """1 black, −1 white, 0 empty."""
    acts: Float[np.ndarray, "361"]
    """The latent's value at each point, 0 where it is not active."""
    black_to_move: bool
    last_move: int | None
    """The point just played; None for a pass, and before the first move."""
    ply: int
    game: str


class LatentDiagrams(NamedTuple):
    """A latent with the positions at which it is strongest."""

    latent: int
    points: float
    """Share of all points at which it fires."""
    energy: float
    """Its share of Σ z² over all latents."""
    diagrams: list[Diagram]
    """Strongest first."""


def page(title: str, intro: Sequence[str], latents: Sequence[LatentDiagrams]) -> str:
    """The HTML page; `intro` is a paragraph an entry."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("msae_sweep.go", "."), autoescape=True)
    template = environment.get_template("top_activations.html.j2")
    drawn = [_latent(latent) for latent in latents]
    return template.render(title=title, intro=intro, latents=drawn, lines=_LINES, stars=_STARS)


def _latent(latent: LatentDiagrams) -> dict[str, Any]:
    largest = max((float(diagram.acts.max()) for diagram in latent.diagrams), default=0.0)
    return {
        "number": latent.latent,
        "points": _percent(latent.points),
        "energy": _percent(latent.energy),
        "largest": f"{largest:.2f}",
        "boards": [_board(latent.latent, diagram, largest) for diagram in latent.diagrams],
    }


def _board(latent: int, diagram: Diagram, largest: float) -> dict[str, Any]:
    fires = [
        (*_at(point), _radius(diagram.acts[point] / largest)) for point in np.flatnonzero(diagram.acts > 0).tolist()
    ]
    colour = "black" if diagram.black_to_move else "white"
    strongest = _name(int(diagram.acts.argmax()))
    return {
        "black": [_at(point) for point in np.flatnonzero(diagram.stones == 1).tolist()],
        "white": [_at(point) for point in np.flatnonzero(diagram.stones == -1).tolist()],
        "fires": fires,
        "last": None if diagram.last_move is None else _at(diagram.last_move),
        "value": f"{diagram.acts.max():.2f} at {strongest}",
        "ply": diagram.ply,
        "to_move": colour,
        "game": PurePosixPath(diagram.game).name,
        "label": f"Latent {latent} fires at {len(fires)} points, most at {strongest}; {colour} to play",
    }


def _at(point: int) -> tuple[int, int]:
    row, column = divmod(point, SIZE)
    return column, row


def _name(point: int) -> str:
    """A point as Go players name it: columns are letters without I, rows are counted from the bottom."""
    assert point < PASS
    column, row = _at(point)
    return f"{'ABCDEFGHJKLMNOPQRST'[column]}{SIZE - row}"


def _radius(share: float) -> float:
    """Areas compare; the weakest can still be seen, and of a stone beneath the strongest its colour."""
    return round(max(0.08, 0.32 * math.sqrt(share)), 3)


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else f"{share:.2g}".replace("e-0", "e-")
