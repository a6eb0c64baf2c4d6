"""Game records in SGF to legal games, and which of their positions to take.

What counts as a game, where records differ:

- Main line only: of variations, the first. 19 × 19 only; other sizes are refused by kind, not as broken.
- AB, AW and AE before the first move are the setup, wherever they stand. After a move they end the main line: what
  follows was edited, not played, and the moves before it are kept.
- Who moves is written on every move, so HA and PL decide nothing, and two moves in a row of one colour are two moves.
- `[]` and `[tt]` are passes. Captures and suicides are played out; ko is not checked.
- Broken: text that ends or breaks off inside a game, a stone on a stone or off the board, a setup that leaves a group
  without liberties, a handicap whose stones the record does not hold (every later board would lack them), no moves.

sgfmill cuts the text into tokens; up to the first closing bracket they are the main line. Its trees are not built: they
took twice as long as the tokens, and read a whole file at once, in which one broken game then lost all others.
"""

import codecs
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int8, Int16, Int64
from sgfmill.sgf_grammar import tokenise
from sgfmill.sgf_properties import Presenter

from msae_sweep.go.board import BLACK, EMPTY, PASS, SIZE, WHITE, Board
from msae_sweep.go.records import Record, RefusedRecord

_STONES = {"AB": BLACK, "AW": WHITE, "AE": EMPTY}
_MOVES = {bytes((97 + column, 97 + row)): row * SIZE + column for row in range(SIZE) for column in range(SIZE)}
_MOVES |= {b"": PASS, b"tt": PASS}
_PRESENTER = Presenter(SIZE, "UTF-8")

_CHARSET = re.compile(rb"CA\s*\[\s*([\w.:-]+)\s*\]")
# In these a character's second byte can be the "\" or "]" that SGF takes for its own; each is read as the largest set
# that holds it. All others are left as they are: moves are ASCII, and names and comments are not looked at.
_UNSAFE_CHARSETS = {
    "shift_jis": "cp932",
    "cp932": "cp932",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "gb18030": "gb18030",
    "big5": "cp950",
    "cp950": "cp950",
    "big5hkscs": "big5hkscs",
}

# The head of a game, not of a variation: properties that stand in a root only.
_HEAD = re.compile(rb"\(\s*;\s*(?:FF|GM|SZ|CA|AP)\s*\[")

_Node = dict[str, list[bytes]]


class Game(NamedTuple):
    """A legal game in plain arrays, cheap to send between processes: 1.3 KB pickled, on average over real games."""

    name: str
    """The record's name; from the second game of a file on, `#2`, `#3` … behind it."""
    key: str
    """32 hex digits over size, setup and moves: equal for one game under two names, on every machine. Symmetric images,
    and a game and its beginning, are different games."""
    setup: Int8[np.ndarray, "361"]
    """Stones before the first move: 1 black, −1 white, 0 empty."""
    moves: Int16[np.ndarray, " n_moves"]
    """Points 0 to 360, row by row from the top; 361 is a pass."""
    black_to_move: Bool[np.ndarray, " n_moves+1"]
    """Per ply, whether black is to move; so of each move, whether black played it. At the last, where nobody moved:
    whether white moved before."""

    @property
    def n_moves(self) -> int:
        """Moves, passes among them."""
        return len(self.moves)

    @property
    def game_id(self) -> int:
        """63 bits of the key: fits int64, and depends neither on order, nor on workers, nor on the record's name.

        Among a million games, two share one with probability 5e-8.
        """
        return int(self.key[:16], 16) >> 1


class _BrokenError(Exception):
    """Why a game is refused; its kind is `broken`."""


class _OtherSizeError(Exception):
    """Why a game is refused; its kind is `size`."""


def read_games(record: Record) -> Iterator[Game | RefusedRecord]:
    """Games of one record in their order; each is legal from its first move to its last, or refused with the reason."""
    number = 0
    for number, tokens in enumerate(_token_lists(_readable(record.data)), start=1):
        name = record.name if number == 1 else f"{record.name}#{number}"
        try:
            yield _game(name, _main_line(tokens))
        except _OtherSizeError as error:
            yield RefusedRecord(name, "size", str(error))
        except _BrokenError as error:
            yield RefusedRecord(name, "broken", str(error))
    if number == 0:
        yield RefusedRecord(record.name, "broken", "no SGF game in it" if record.data.strip() else "empty")


def distinct(games: Iterable[Game | RefusedRecord]) -> Iterator[Game | RefusedRecord]:
    """The first game of each key, later ones refused as duplicates; holds a key and a name a game."""
    first: dict[str, str] = {}
    for game in games:
        if isinstance(game, Game):
            if game.key in first:
                yield RefusedRecord(game.name, "duplicate", f"the same setup and moves as {first[game.key]}")
                continue
            first[game.key] = game.name
        yield game


def sample_plies(
    game: Game, positions_per_game: int | None, skip_first: int = 0, seed: int = 0
) -> Int64[np.ndarray, " plies"]:
    """Which positions of a game to take: plies in ascending order; ply p is the position after p moves.

    Candidates are `skip_first` to `n_moves` − 1. The last position is never one: no move follows it, so who is to move
    there is a guess, and mostly it is a board on which both have passed.

    Each ply draws a number from (seed, key, ply) alone, and the smallest `positions_per_game` are taken (None takes all
    candidates). So neither order nor workers matter, and a larger `positions_per_game` keeps those of a smaller one.
    """
    plies = np.arange(skip_first, game.n_moves)
    if positions_per_game is None or positions_per_game >= len(plies):
        return plies
    # One stream a game, eight bytes a ply; numpy does not promise its generators' draws from version to version.
    stream = hashlib.shake_256(f"{seed} {game.key}".encode()).digest(8 * game.n_moves)
    draws = np.frombuffer(stream, dtype="<u8")[skip_first:]
    return np.sort(plies[np.argsort(draws, kind="stable")[:positions_per_game]])


def _readable(data: bytes) -> bytes:
    """The text in an encoding whose brackets and backslashes are SGF's own."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace").encode()
    declared = _CHARSET.search(data[:4096])
    if declared is None:
        return data
    try:
        charset = _UNSAFE_CHARSETS[codecs.lookup(declared[1].decode("ascii")).name]
    except LookupError:  # unknown to Python, or a safe one
        return data
    # UTF-8 under another name is common, and read by that name its characters swallow the bracket behind them.
    return data if _is_utf8(data) else data.decode(charset, "replace").encode()


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _token_lists(data: bytes) -> Iterator[list[tuple[str, bytes]]]:
    """Tokens of one game after another."""
    end = 0
    while True:
        start = end
        tokens, end = tokenise(data, start)
        if not tokens:
            return
        if not _is_closed(tokens):
            break
        yield tokens
    # That game has no end, so the next one starts at the next head. Cut at all of them at once: looking for each game's
    # end to the end of the file would be quadratic in a file where none has one.
    heads = [start, *(head.start() for head in _HEAD.finditer(data, start + 1)), len(data)]
    for begin, stop in itertools.pairwise(heads):
        tokens, _ = tokenise(data[begin:stop])
        if tokens:
            yield tokens


def _is_closed(tokens: list[tuple[str, bytes]]) -> bool:
    return tokens.count(("D", b"(")) == tokens.count(("D", b")"))


def _main_line(tokens: list[tuple[str, bytes]]) -> list[_Node]:
    """Nodes from the root to the first leaf, which comes right before the first closing bracket."""
    if not _is_closed(tokens):
        raise _BrokenError("the text breaks off inside the game")
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
                raise _BrokenError(f"a handicap of {handicap}, but none of its stones")
            if point is None:
                raise _BrokenError(f"move {len(moves) + 1}: {written} is no point of a 19 × 19 board")
            if not board.play(point, is_black):
                raise _BrokenError(f"move {len(moves) + 1}: {written} lies on a stone")
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
            raise _BrokenError(f"SZ[{size}] is no size of a board")
        if {int(width), int(height or width)} != {SIZE}:
            raise _OtherSizeError(f"SZ[{size}]; only 19 × 19 is read")


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
            raise _BrokenError("a setup that gives one point two contents")
        placed |= points
        board.place(points, stone)
    if board.has_dead_groups():
        raise _BrokenError("a setup that leaves stones without liberties")


def _moves_of(node: _Node) -> Iterator[tuple[int | None, bool, str]]:
    """A node's move, if it has one: its point (None where it is none), whether it is black's, and as it is written."""
    found = [(color, value) for color in ("B", "W") for value in node.get(color, ())]
    empty = [color for color in ("B", "W") if node.get(color) == []]
    if len(found) > 1 or empty:
        raise _BrokenError(f"a node with {len(found)} moves and {len(empty)} without a value; one a node")
    for color, value in found:
        yield _MOVES.get(value.strip()), color == "B", f"{color}[{_text([value])}]"


def _number(node: _Node, name: str, default: int = 0) -> int:
    text = _text(node.get(name, []))
    return int(text) if text.isdecimal() else default


def _text(values: list[bytes]) -> str:
    """The first value, short enough for a message."""
    return values[0].strip()[:20].decode("utf-8", "replace") if values else ""
