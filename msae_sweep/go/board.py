"""Go board of 19 × 19 points with captures.

Points are numbered 0 to 360, row by row from the *top* (rank 19), left to right; 361 is a pass.
"""

from collections.abc import Iterable

SIZE = 19
N_POINTS = SIZE * SIZE
PASS = N_POINTS

EMPTY, BLACK, WHITE = 0, 1, 255
"""Values of a point. 255 is −1 as an unsigned byte: a board's bytes read as int8 are 1 black, −1 white, 0 empty."""


def _neighbours(point: int) -> tuple[int, ...]:
    row, column = divmod(point, SIZE)
    near = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
    return tuple(r * SIZE + c for r, c in near if 0 <= r < SIZE and 0 <= c < SIZE)


NEIGHBOURS = [_neighbours(point) for point in range(N_POINTS)]


class Board:
    """Mutable position on which moves can be played.

    Captures are exact, but ko is not checked: a game record states which moves were played, and the only move that is
    certainly impossible is one onto an occupied point. Liberties are not tracked from move to move. Instead a group is
    searched until its first liberty is found, which is mostly a step or two away. This plays 800,000 moves per second
    on one core (350,712 moves of 2,082 real games, 2026-11-23).
    """

    def __init__(self, stones: bytes = bytes(N_POINTS)) -> None:
        self.stones = bytearray(stones)
        """Value of each point: `EMPTY`, `BLACK` or `WHITE`."""

    def place(self, points: Iterable[int], stone: int) -> None:
        """Set the given points to `stone` without capturing anything."""
        for point in points:
            self.stones[point] = stone

    def play(self, point: int, black: bool) -> bool:
        """Play a stone or `PASS`; return False and leave the board unchanged if the point is occupied.

        The opponent's groups without liberties are removed first. If there were none and the stone's own group has no
        liberty, that group is removed. Suicide of any number of stones is accepted, because some rules allow it and
        records contain it.
        """
        if point == PASS:
            return True
        stones = self.stones
        if stones[point] != EMPTY:
            return False
        own = BLACK if black else WHITE
        stones[point] = own
        breathes = False
        for neighbour in NEIGHBOURS[point]:
            stone = stones[neighbour]
            if stone == EMPTY:
                breathes = True
            elif stone != own:
                for captured in dead_group(stones, neighbour):
                    stones[captured] = EMPTY
        if not breathes:
            for captured in dead_group(stones, point):
                stones[captured] = EMPTY
        return True

    def has_dead_groups(self) -> bool:
        """Return whether any group has no liberty, a state that no sequence of moves can produce."""
        return any(stone != EMPTY and dead_group(self.stones, point) for point, stone in enumerate(self.stones))


def dead_group(stones: bytearray, start: int) -> list[int]:
    """Return the points of the group at `start` if it has no liberty, else an empty list."""
    colour = stones[start]
    group = [start]
    seen = {start}
    for point in group:  # the loop also visits the points that it appends
        for neighbour in NEIGHBOURS[point]:
            stone = stones[neighbour]
            if stone == EMPTY:
                return []
            if stone == colour and neighbour not in seen:
                seen.add(neighbour)
                group.append(neighbour)
    return group
