"""Parsing of SGF records into legal games, and sampling of their positions.

Records differ; these rules define a game:

- Only the main line is read, which is the first of all variations. Only 19 × 19 is read; other sizes are refused with
  the kind `size`, not as broken.
- AB, AW and AE before the first move are the setup, in whichever node they stand. After a move they end the main line,
  because the rest was edited, not played; the moves before are kept.
- Every move states its colour, so HA and PL do not decide who moves, and two moves in a row of one colour are accepted.
- `[]` and `[tt]` are passes. Captures and suicides are carried out; ko is not checked.
- These are broken: text that ends or becomes unreadable inside a game, a stone on a stone or off the board, a setup
  that leaves a group without liberties, a handicap without its stones in the record (every later board would lack
  them), and a game without moves.

sgfmill splits the text of a game into tokens; the tokens up to the first closing bracket are the main line. Its game
trees are not used: building them took twice as long as tokenising. They also parse a whole file at once, so that one
broken game lost all others in its file.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int8, Int16, Int64
from sgfmill.sgf_grammar import tokenise
from sgfmill.sgf_properties import Presenter

from msae_sweep.go.board import BLACK, EMPTY, PASS, SIZE, WHITE, Board
from msae_sweep.go.records import Record, RefusedRecord, games_in

_STONES = {"AB": BLACK, "AW": WHITE, "AE": EMPTY}
_MOVES = {bytes((97 + column, 97 + row)): row * SIZE + column for row in range(SIZE) for column in range(SIZE)}
_MOVES |= {b"": PASS, b"tt": PASS}
_PRESENTER = Presenter(SIZE, "UTF-8")

_Node = dict[str, list[bytes]]


class Game(NamedTuple):
    """Legal game in plain arrays, cheap to send between processes: 1.3 KB pickled, on average over real games."""

    name: str
    """Name of the record, with the suffix `#2`, `#3` … from the second game of a file on."""
    key: str
    """Hash of board size, setup, colours and moves, 32 hex digits. It is the same on every machine and does not depend
    on the name. Symmetric images of a game and beginnings of a game have other keys."""
    setup: Int8[np.ndarray, "361"]
    """Stones on the board before the first move: 1 black, −1 white, 0 empty."""
    moves: Int16[np.ndarray, " n_moves"]
    """Point of each move, 0 to 360 row by row from the top; 361 is a pass."""
    black_to_move: Bool[np.ndarray, " n_moves+1"]
    """True at each ply where black is to move, and therefore for each move that black played. At the last ply, after
    which there is no move, it is true if white made the last move."""

    @property
    def n_moves(self) -> int:
        """Number of moves, including passes."""
        return len(self.moves)

    @property
    def game_id(self) -> int:
        """Integer of the key's first 63 bits. It fits int64 and does not depend on order, workers or the record's name.

        The probability that two of a million games have the same id is 5e-8.
        """
        return int(self.key[:16], 16) >> 1


class _BrokenError(Exception):
    """Error in a game, which is then refused with the kind `broken`."""


class _OtherSizeError(Exception):
    """Board size other than 19 × 19; the game is then refused with the kind `size`."""


def read_games(record: Record) -> Iterator[Game | RefusedRecord]:
    """Yield the games of an SGF text in order; each is completely legal, or is refused with the reason."""
    for game in games_in(record.name, [record.data]):
        yield game if isinstance(game, RefusedRecord) else parse_game(game)


def parse_game(record: Record) -> Game | RefusedRecord:
    """Parse the text of one game, which is completely legal, or is refused with the reason."""
    tokens, _ = tokenise(record.data)
    try:
        return _game(record.name, _main_line(tokens))
    except _OtherSizeError as error:
        return RefusedRecord(record.name, "size", str(error))
    except _BrokenError as error:
        return RefusedRecord(record.name, "broken", str(error))


def refuse_duplicates(games: Iterable[Game | RefusedRecord]) -> Iterator[Game | RefusedRecord]:
    """Yield the first game of each key, refuse later ones as duplicates; keep one key and name per game in memory."""
    first: dict[str, str] = {}
    for game in games:
        if isinstance(game, Game):
            if game.key in first:
                yield RefusedRecord(game.name, "duplicate", f"the same setup and moves as {first[game.key]}")
                continue
            first[game.key] = game.name
        yield game


def sample_plies(
    game: Game,
    positions_per_game: int | None,
    min_move: int = 0,
    seed: int = 0,
    max_move: int | None = None,
    consecutive: bool = False,
) -> Int64[np.ndarray, " plies"]:
    """Return the sampled positions of a game as ascending plies; ply p is the position after p moves.

    Candidates are `min_move` to `max_move`, and at the most `n_moves` − 1. The last position is excluded: no move
    follows it, so the side to move would be a guess, and usually both players have passed there.

    Each ply draws a number that depends only on (seed, key, ply), and the `positions_per_game` smallest are taken (None
    takes all candidates). The sample therefore does not depend on order or workers, and a larger `positions_per_game`
    includes the positions of a smaller one. With `consecutive`, the plies follow one another, and their start, for
    which all that leave room are equally likely, depends only on (seed, key).
    """
    stop = game.n_moves if max_move is None else min(game.n_moves, max_move + 1)
    plies = np.arange(min_move, stop)
    if positions_per_game is None or positions_per_game >= len(plies):
        return plies
    if consecutive:
        # Sixteen bytes, so that the remainder is as good as uniform.
        drawn = hashlib.shake_256(f"{seed} {game.key} start".encode()).digest(16)
        start = int.from_bytes(drawn, "little") % (len(plies) - positions_per_game + 1)
        return plies[start : start + positions_per_game]
    # A hash gives eight bytes per ply. NumPy's generators are not used: their draws may change between versions.
    stream = hashlib.shake_256(f"{seed} {game.key}".encode()).digest(8 * game.n_moves)
    draws = np.frombuffer(stream, dtype="<u8")[min_move:stop]
    return np.sort(plies[np.argsort(draws, kind="stable")[:positions_per_game]])


def _is_closed(tokens: list[tuple[str, bytes]]) -> bool:
    return tokens.count(("D", b"(")) == tokens.count(("D", b")"))


def _main_line(tokens: list[tuple[str, bytes]]) -> list[_Node]:
    """Return the nodes from the root to the first leaf, which ends at the first closing bracket."""
    if not _is_closed(tokens):
        raise _BrokenError("the text ends inside the game")
    nodes: list[_Node] = []
    node: _Node | None = None
    values: list[bytes] | None = None
    for kind, token in tokens:
        if kind == "V":
            if values is None:
                raise _BrokenError(f"a value without a property after node {len(nodes)}")
            values.append(token)
        elif kind == "I":
            if node is None:
                raise _BrokenError(f"a property outside a node after node {len(nodes)}")
            values = node.setdefault(token.decode("ascii"), [])
        elif token == b";":
            node, values = {}, None
            nodes.append(node)
        elif token == b"(":
            node, values = None, None
        else:
            break
    return nodes


def _game(name: str, nodes: list[_Node]) -> Game:
    board = Board()
    setup = bytes(board.stones)
    moves: list[int] = []
    black: list[bool] = []
    handicap = 0
    for node in nodes:
        if not moves:
            _check_header(node)
            handicap = max(handicap, _number(node, "HA"))
        if any(node.get(stones, [b""]) != [b""] for stones in _STONES):
            if moves:
                break
            _set_up(board, node)
            setup = bytes(board.stones)
        for point, is_black, written in _moves_of(node):
            if not moves and handicap > 1 and not is_black and BLACK not in setup:
                raise _BrokenError(f"a handicap of {handicap}, but no handicap stones")
            if point is None:
                raise _BrokenError(f"move {len(moves) + 1}: {written} is not a point of a 19 × 19 board")
            if not board.play(point, is_black):
                raise _BrokenError(f"move {len(moves) + 1}: {written} is on an occupied point")
            moves.append(point)
            black.append(is_black)
    if not moves:
        raise _BrokenError("no moves")
    points = np.array(moves, dtype="<i2")
    digest = hashlib.sha256(b"19" + setup + bytes(black) + points.tobytes()).hexdigest()
    return Game(
        name,
        digest[:32],
        np.frombuffer(setup, dtype=np.int8),
        points.astype(np.int16, copy=False),
        np.array([*black, not black[-1]]),
    )


def _check_header(node: _Node) -> None:
    if "GM" in node and _number(node, "GM", 1) != 1:
        raise _BrokenError(f"not a game of Go: GM[{_text(node['GM'])}]")
    if "SZ" in node:
        size = _text(node["SZ"])
        width, _, height = size.partition(":")
        if not width.isdecimal() or not (height or width).isdecimal():
            raise _BrokenError(f"SZ[{size}] is not a board size")
        if {int(width), int(height or width)} != {SIZE}:
            raise _OtherSizeError(f"SZ[{size}]; only 19 × 19 boards are supported")


def _set_up(board: Board, node: _Node) -> None:
    placed: set[int] = set()
    for name, stone in _STONES.items():
        try:
            coordinates = _PRESENTER.interpret(name, node.get(name, [b""]))
        except ValueError:
            raise _BrokenError(f"{name}[{_text(node[name])}] … are not points of a 19 × 19 board") from None
        # sgfmill counts rows from the bottom.
        points = {(SIZE - 1 - row) * SIZE + column for row, column in coordinates}
        if placed & points:
            raise _BrokenError("the setup gives one point two contents")
        placed |= points
        board.place(points, stone)
    if board.has_dead_groups():
        raise _BrokenError("the setup leaves stones without liberties")


def _moves_of(node: _Node) -> Iterator[tuple[int | None, bool, str]]:
    """Yield a node's move, if any: its point (None if invalid), whether it is black's, and its text in the record."""
    found = [(color, value) for color in ("B", "W") for value in node.get(color, ())]
    empty = [color for color in ("B", "W") if node.get(color) == []]
    if len(found) > 1 or empty:
        raise _BrokenError(
            f"a node with {len(found)} moves and {len(empty)} without a value; must be one move per node"
        )
    for color, value in found:
        yield _MOVES.get(value.strip()), color == "B", f"{color}[{_text([value])}]"


def _number(node: _Node, name: str, default: int = 0) -> int:
    text = _text(node.get(name, []))
    return int(text) if text.isdecimal() else default


def _text(values: list[bytes]) -> str:
    """Return the first value, shortened for an error message; empty if there is no value."""
    return values[0].strip()[:20].decode("utf-8", "replace") if values else ""
