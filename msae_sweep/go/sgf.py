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

sgfmill splits the text into tokens; the tokens up to the first closing bracket are the main line. Its game trees are
not used: building them took twice as long as tokenising. They also parse a whole file at once, so that one broken game
lost all others in its file.
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
# In these character sets the second byte of a character can be "\" or "]", which SGF would take for syntax. Each is
# decoded as the largest set that contains it. Text in other sets is not decoded: moves are ASCII, and names and
# comments are not used.
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

# Beginning of a game. These properties occur only in a root node, so the beginning of a variation does not match.
_HEAD = re.compile(rb"\(\s*;\s*(?:FF|GM|SZ|CA|AP)\s*\[")

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
    """Yield the games of one record in order; each is completely legal, or is refused with the reason."""
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
    game: Game, positions_per_game: int | None, skip_first: int = 0, seed: int = 0
) -> Int64[np.ndarray, " plies"]:
    """Return the sampled positions of a game as ascending plies; ply p is the position after p moves.

    Candidates are `skip_first` to `n_moves` − 1. The last position is excluded: no move follows it, so the side to move
    would be a guess, and usually both players have passed there.

    Each ply draws a number that depends only on (seed, key, ply), and the `positions_per_game` smallest are taken (None
    takes all candidates). The sample therefore does not depend on order or workers, and a larger `positions_per_game`
    includes the positions of a smaller one.
    """
    plies = np.arange(skip_first, game.n_moves)
    if positions_per_game is None or positions_per_game >= len(plies):
        return plies
    # A hash gives eight bytes per ply. NumPy's generators are not used: their draws may change between versions.
    stream = hashlib.shake_256(f"{seed} {game.key}".encode()).digest(8 * game.n_moves)
    draws = np.frombuffer(stream, dtype="<u8")[skip_first:]
    return np.sort(plies[np.argsort(draws, kind="stable")[:positions_per_game]])


def _readable(data: bytes) -> bytes:
    """Return the text in an encoding in which bracket and backslash bytes never belong to another character."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace").encode()
    declared = _CHARSET.search(data[:4096])
    if declared is None:
        return data
    try:
        charset = _UNSAFE_CHARSETS[codecs.lookup(declared[1].decode("ascii")).name]
    except LookupError:  # a character set that is unknown to Python, or safe
        return data
    # UTF-8 is often declared as another set; decoded as that set, its characters would swallow the following bracket.
    return data if _is_utf8(data) else data.decode(charset, "replace").encode()


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _token_lists(data: bytes) -> Iterator[list[tuple[str, bytes]]]:
    """Yield the list of tokens of each game in turn."""
    end = 0
    while True:
        start = end
        tokens, end = tokenise(data, start)
        if not tokens:
            return
        if not _is_closed(tokens):
            break
        yield tokens
    # This game has no end, so the next one begins at the next match of `_HEAD`. The text is split at all matches at
    # once, because searching for each game's end up to the end of the file is quadratic if no game has an end.
    heads = [start, *(head.start() for head in _HEAD.finditer(data, start + 1)), len(data)]
    for begin, stop in itertools.pairwise(heads):
        tokens, _ = tokenise(data[begin:stop])
        if tokens:
            yield tokens


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
