"""HTML page that shows latents as Go boards. Every board is an inline SVG, so the page works offline."""

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
    """Position with a latent's value at each of its points. Points are ordered row by row from the top."""

    stones: Int8[np.ndarray, "361"]
    """Stone on each point: 1 black, −1 white, 0 empty."""
    acts: Float[np.ndarray, "361"]
    """Value of the latent at each point, 0 where it is inactive."""
    black_to_move: bool
    last_move: int | None
    """Point of the last move; None after a pass and before the first move."""
    ply: int
    game: str


class LatentDiagrams(NamedTuple):
    """Latent with diagrams of the positions where its value is largest."""

    latent: int
    points: float
    """Share of all points at which the latent fires."""
    energy: float
    """Share of Σ z² over all latents that belongs to this latent."""
    diagrams: list[Diagram]
    """Diagrams in descending order of the latent's largest value."""


def render_page(title: str, intro: Sequence[str], latents: Sequence[LatentDiagrams]) -> str:
    """Return the HTML page; every entry of `intro` becomes a paragraph."""
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
        "label": f"Latent {latent} fires at {len(fires)} points, most strongly at {strongest}; {colour} to play",
    }


def _at(point: int) -> tuple[int, int]:
    row, column = divmod(point, SIZE)
    return column, row


def _name(point: int) -> str:
    """Return the point's name in Go notation: the column is a letter without I, rows are counted from the bottom."""
    assert point < PASS
    column, row = _at(point)
    return f"{'ABCDEFGHJKLMNOPQRST'[column]}{SIZE - row}"


def _radius(share: float) -> float:
    """Return the radius of the disc for a value that is `share` of the latent's largest.

    The disc's area is proportional to `share`. The minimum radius 0.08 keeps weak values visible; the maximum 0.32
    leaves the colour of a stone underneath visible.
    """
    return round(max(0.08, 0.32 * math.sqrt(share)), 3)


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else f"{share:.2g}".replace("e-0", "e-")
