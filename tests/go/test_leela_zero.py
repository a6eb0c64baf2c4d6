"""Comparison with Leela Zero's own program, which judges boards, planes, orientation and network together."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from msae_sweep.go.board import PASS, SIZE
from msae_sweep.go.leela import Network
from msae_sweep.go.planes import planes
from msae_sweep.go.records import Record
from msae_sweep.go.replay import replay
from msae_sweep.go.sgf import Game, read_games
from msae_sweep.go.weights import random_weights, read_weights, write_weights

PER_MILLE = 1.0
"""Largest difference of a move's probability: the program prints whole per mille, rounded down."""
WINRATE = 1e-5
"""Largest difference of the winrate, which the program prints with six digits."""

HANDICAP = "(;GM[1]SZ[19]HA[3]AB[dd][pp][dp];W[pd];B[qf];W[nc];B[fq];W[qn];B[];W[jd];B[nq];W[cf];B[fc])"
"""Game with three handicap stones, a pass in the middle, and white to move first."""
CAPTURES = "(;GM[1]SZ[19];B[pd];W[qd];B[qc];W[rd];B[qe];W[dp];B[re];W[dd];B[rc];W[aa];B[sd];W[ab];B[];W[];B[ba];W[bb])"
"""Game in which black captures two stones, both sides pass, and a corner is played."""


@pytest.fixture(scope="session")
def leelaz() -> str:
    """Path of Leela Zero's program; tests are skipped, with the reason, where it is missing."""
    found = shutil.which("leelaz") or shutil.which("leelaz", path="/usr/games:/usr/lib/leelaz/bin")
    if found is None:
        pytest.skip("no leelaz here; on Debian, `apt-get install leela-zero` installs it")
    return found


class Judged(NamedTuple):
    """Statements of the program, or of our network, about positions."""

    policy: np.ndarray
    """Probabilities of the 361 points from the top left and of a pass, in per mille; NaN where a stone stands."""
    winrate: np.ndarray
    """Winrate of the side to move, 0 to 1."""

    def differences(self, other: "Judged") -> tuple[np.ndarray, float]:
        """Return the largest difference of the policy at each position, in per mille, and of all winrates."""
        return np.nanmax(np.abs(self.policy - other.policy), axis=1), float(np.abs(self.winrate - other.winrate).max())


Position = tuple[Game, int]


def vertex(point: int) -> str:
    """Return a point's name in GTP, such as D4."""
    if point == PASS:
        return "pass"
    row, column = divmod(point, SIZE)
    return "ABCDEFGHJKLMNOPQRST"[column] + str(SIZE - row)


def commands(positions: list[Position], handicap_game: Path) -> str:
    """Return GTP commands that show the network's output at each position.

    A game with handicap stones is loaded from `handicap_game`, because GTP's own commands for such stones either place
    them on fixed points or count them as moves.
    """
    handicap_game.write_text(HANDICAP)
    lines = []
    for game, ply in positions:
        if game.setup.any():
            lines += [f"loadsgf {handicap_game} {ply + 1}", "heatmap"]
            continue
        lines.append("clear_board")
        for point, black in zip(game.moves[:ply].tolist(), game.black_to_move.tolist(), strict=False):
            lines.append(f"play {'b' if black else 'w'} {vertex(point)}")
        lines.append("heatmap")
    return "\n".join(["boardsize 19", *lines, "quit", ""])


def judged_by_the_program(leelaz: str, weights: Path, positions: list[Position], folder: Path) -> Judged:
    """Play positions into the program and return what it says about them."""
    done = subprocess.run(
        [leelaz, "-g", "-w", str(weights), "--cpu-only", "--noponder", "-t", "1"],
        input=commands(positions, folder / "handicap.sgf"), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    refused = [line for line in done.stdout.splitlines() if line.startswith("?")]
    assert done.returncode == 0, done.stderr[-500:]
    assert not refused, f"the program refuses moves: {refused[:3]}"
    rows = re.findall(r"^(?: *\d+){19} *$", done.stderr, re.MULTILINE)
    passes, winrates = (re.findall(rf"^{name}: ([\d.]+)", done.stderr, re.MULTILINE) for name in ("pass", "winrate"))
    assert len(rows) == SIZE * len(positions), done.stderr[-500:]
    board = np.array([row.split() for row in rows], dtype=float).reshape(len(positions), SIZE * SIZE)
    return Judged(np.column_stack([board, np.array(passes, dtype=float)]), np.array(winrates, dtype=float))


def judged_by_us(network: Network, positions: list[Position], first_row: str = "bottom") -> Judged:
    """Return the policy and the winrate of our network at the positions."""
    seen = [replay(game, np.array([ply])) for game, ply in positions]
    boards, black = (torch.from_numpy(np.concatenate(part)) for part in zip(*seen, strict=True))
    x = planes(boards, black, torch.float32)
    outputs = network(x.flip(2) if first_row == "bottom" else x)
    policy = 1000 * outputs.policy_logits.softmax(dim=1)
    points = policy[:, :361].reshape(-1, SIZE, SIZE)
    points = (points.flip(1) if first_row == "bottom" else points).reshape(-1, SIZE * SIZE).clone()
    points[boards[:, 0] != 0] = float("nan")
    return Judged(torch.cat([points, policy[:, 361:]], dim=1).numpy(), ((outputs.value + 1) / 2).numpy())


def game_of(text: str) -> Game:
    (game,) = read_games(Record("game.sgf", text.encode()))
    assert isinstance(game, Game)
    return game


@pytest.fixture(scope="module")
def written() -> list[Position]:
    """Every position of two games with handicap stones, passes and captures."""
    games = [game_of(HANDICAP), game_of(CAPTURES)]
    return [(game, ply) for game in games for ply in range(game.n_moves)]


def test_a_random_network_gives_what_the_program_computes(leelaz, written, tmp_path):
    write_weights(random_weights(2, 16, seed=3), tmp_path / "net.txt")
    theirs = judged_by_the_program(leelaz, tmp_path / "net.txt", written, tmp_path)
    policy, winrate = judged_by_us(Network(random_weights(2, 16, seed=3)), written).differences(theirs)
    assert policy.max() <= PER_MILLE
    assert winrate <= WINRATE


def test_real_games_give_what_the_program_computes_only_with_rows_from_the_bottom(
    leelaz, written, real_go, real_games, tmp_path
):
    weights = real_go / "weights" / "lz-6x64.txt.gz"
    held_out = [int(number) for number in (real_go / "held_out_games.txt").read_text().split()][:20]
    drawn = [(real_games[n], ply) for n in held_out for ply in (31, 90) if ply < real_games[n].n_moves]
    positions = [*written, *drawn]
    assert len(positions) >= 60
    assert len({game.black_to_move[ply] for game, ply in drawn}) == 2, "both colours are to move"
    assert any((replay(game, np.array([ply])).boards[0, 0] != 0).sum() < ply for game, ply in drawn), "no captures"
    theirs = judged_by_the_program(leelaz, weights, positions, tmp_path)
    network = Network(read_weights(weights))
    policy, winrate = judged_by_us(network, positions).differences(theirs)
    assert policy.max() <= PER_MILLE
    assert winrate <= WINRATE
    policy, winrate = judged_by_us(network, positions, "top").differences(theirs)
    assert np.median(policy) > 20 * PER_MILLE
    assert winrate > 1000 * WINRATE
