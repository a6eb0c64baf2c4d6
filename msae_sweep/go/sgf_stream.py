"""Division of SGF text into games, read piece by piece, so that a file may hold millions of games.

A game begins with `(;` outside of all games and ends with the bracket that closes it. Brackets inside property values
do not count. Two rules keep a broken game from taking the games behind it with it:

- A root property at the beginning of what would be a variation (`_HEAD`) begins a new game. Root properties occur only
  in root nodes, so the game before it was not closed.
- A game that is not closed within the size limit, or at the end of the file, ends at the next such beginning.

Most games are found without a look at each of their values: see `_is_one_game`.
"""

import codecs
import re
from collections.abc import Generator, Iterable, Iterator
from typing import NamedTuple

MAX_GAME_BYTES = 16 * 2**20
"""Size limit of a game, so that broken text cannot fill a worker's memory. A game with long comments has 1 MB."""
PIECE_BYTES = 2**20
"""Number of bytes that are read from a file at a time."""

_START = re.compile(rb"\(\s*;")
# Beginning of a game. These properties occur only in a root node, so the beginning of a variation does not match.
_HEAD = re.compile(rb"\(\s*;\s*(?:FF|GM|SZ|CA|AP)\s*\[")
# Text up to the next bracket outside of property values. Possessive repeats, because backtracking would be quadratic.
_TO_BRACKET = re.compile(rb"[^()\[]*+(?:\[[^\]\\]*+(?:\\.[^\]\\]*+)*+\][^()\[]*+)*+[()]", re.DOTALL)

_HEAD_BYTES = 64
"""Length in which the beginning of a game surely fits, unless it has more than 50 blanks in it."""

_CHARSET = re.compile(rb"CA\s*\[\s*([\w.:-]+)\s*\]")
_CHARSET_BYTES = 4096
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


class TooLong(NamedTuple):
    """Stands in the place of a game that exceeds the size limit."""

    limit: int


def split_games(pieces: Iterable[bytes], limit: int = MAX_GAME_BYTES) -> Iterator[bytes | TooLong]:
    """Yield the text of each game in turn, with about one piece and one game in memory.

    Args:
        pieces: the text of a file in consecutive pieces, the first of which has at least `_CHARSET_BYTES` bytes unless
            the file is shorter.
        limit: maximum size of a game in bytes.
    """
    text, wanted, inside = b"", 0, False
    for piece in _readable(pieces):
        text += piece
        # A game that is longer than a piece is looked at again only when twice as much of it is there.
        if len(text) < wanted:
            continue
        if inside:
            # The rest of a game that is too long is skipped, because its variations would look like games.
            head = _HEAD.search(text)
            text = text[head.start() if head else max(0, len(text) - _HEAD_BYTES) :]
            if head is None:
                continue
        rest, inside = yield from _games(text, limit, final=False)
        text = text[rest:]
        wanted = 2 * len(text)
    if not inside:
        yield from _games(text, limit, final=True)


def _games(text: bytes, limit: int, final: bool) -> Generator[bytes | TooLong, None, tuple[int, bool]]:
    """Yield the games of `text`.

    Returns:
        The position from which on the text is to be read again together with what follows it, and whether that position
        is inside a game that is too long.

    Args:
        text: text that begins outside of all games.
        limit: maximum size of a game in bytes.
        final: whether the file ends with `text`.
    """
    at, next_head = 0, -1
    while (found := _START.search(text, at)) is not None:
        start = found.start()
        if next_head <= start:
            head = _HEAD.search(text, start + 1)
            next_head = head.start() if head else len(text)
        if (next_head < len(text) or final) and _is_one_game(game := text[start:next_head].rstrip()):
            stop, closed = start + len(game), True
        elif (end := _end_of_game(text, start)) is not None:
            stop, closed = end, True
        elif not final and len(text) - start <= limit:
            return start, False
        else:
            stop, closed = next_head, False
        yield text[start:stop] if stop - start <= limit else TooLong(limit)
        if not closed and stop == len(text):
            return stop, not final
        at = stop
    # The last bracket may begin a game whose semicolon is in the next piece.
    last = text.rfind(b"(", at)
    is_open = last >= 0 and not text[last + 1 :].strip() and len(text) - last <= limit
    return (last if is_open else len(text)), False


def _is_one_game(text: bytes) -> bool:
    """Return whether `text`, which begins outside of all values, is certainly one closed game.

    This counts instead of reading every value. Without backslashes, a value ends at its first `]`, so equal numbers of
    `[` and `]` mean that no value is open at the end and none contains a `[`. Then the last `)` is outside of values,
    and if it is the only one and there is a single `(`, it closes the game. False does not say that it is not a game.
    """
    return (
        text.count(b"(") == 1
        and text.count(b")") == 1
        and text.endswith(b")")
        and b"\\" not in text
        and text.count(b"[") == text.count(b"]")
    )


def _end_of_game(text: bytes, start: int) -> int | None:
    """Return the position after the game that begins at `start`, or None if the text ends before the game does."""
    depth, at = 0, start
    while (found := _TO_BRACKET.match(text, at)) is not None:
        at = found.end()
        if text[at - 1 : at] == b")":
            depth -= 1
            if depth == 0:
                return at
        elif depth and _HEAD.match(text, at - 1):
            return at - 1
        else:
            depth += 1
    return None


def _readable(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the text in an encoding in which bracket and backslash bytes never belong to another character."""
    remaining = iter(pieces)
    first = next(remaining, b"")
    charset = _charset_to_decode(first)
    if charset is None:
        yield first
        yield from remaining
        return
    decoder = codecs.getincrementaldecoder(charset)("replace")
    yield decoder.decode(first).encode()
    for piece in remaining:
        yield decoder.decode(piece).encode()
    yield decoder.decode(b"", final=True).encode()


def _charset_to_decode(first: bytes) -> str | None:
    """Return the character set from which a file must be decoded, judged by its first piece, or None."""
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    declared = _CHARSET.search(first[:_CHARSET_BYTES])
    if declared is None:
        return None
    try:
        charset = _UNSAFE_CHARSETS[codecs.lookup(declared[1].decode("ascii")).name]
    except LookupError:  # a character set that is unknown to Python, or safe
        return None
    # UTF-8 is often declared as another set; decoded as that set, its characters would swallow the following bracket.
    return None if _is_utf8(first) else charset


def _is_utf8(data: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)  # the last character may continue in the next piece
    except UnicodeDecodeError:
        return False
    return True
