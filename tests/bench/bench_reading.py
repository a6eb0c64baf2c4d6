"""Benchmark of reading one compressed SGF file of many games: a random sample of it, with time and memory.

    python tests/bench/bench_reading.py --games PATH [--stored 100000] [--max-games 5000] [--save tests/bench/rows.md]

All games of `--games` are written into one .sgf.xz, again and again until `--stored` games are in it. A repeated game
is turned or reflected, and from the ninth time on it lacks its last moves, so that all games differ. The benchmark
first measures one core: unpacking alone, then unpacking and dividing into games. Then it draws the sample over Ray, and
once more from a tenth of the file, to show that the memory does not depend on it. Memory is sampled twice a second as
PSS, which counts a page once, however many processes share it.
"""

import argparse
import lzma
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import machine
import ray
import torch
from bench_extract import Memory

from msae_sweep.go.game_choice import GameChoice
from msae_sweep.go.game_reading import read_all_games
from msae_sweep.go.records import Record, find_units, read_records, read_unit

MIB = 2**20
_MOVE = re.compile(rb";\s*[BW]\[([a-s]{2}|)\]")


def varied(game: bytes, number: int) -> bytes:
    """Return the game under one of the board's eight symmetries, without its last `number // 8` moves."""
    letters = "abcdefghijklmnopqrs"

    def image(found: re.Match[bytes]) -> bytes:
        if not found[1]:
            return found[0]
        column, row = (letters.index(chr(letter)) for letter in found[1])
        column, row = (18 - column if number & 1 else column), (18 - row if number & 2 else row)
        column, row = (row, column) if number & 4 else (column, row)
        return found[0].replace(b"[" + found[1], f"[{letters[column]}{letters[row]}".encode())

    moves = list(_MOVE.finditer(game))
    kept = moves[-(number // 8) - 1].end() if moves else 0
    return b"(" + _MOVE.sub(image, game[1:kept]) + b")"


def write_stream(path: Path, source: Path, n_games: int) -> int:
    """Write `n_games` games into one .sgf.xz and return the number of bytes of their text."""
    games = [record.data for record in read_records(source) if isinstance(record, Record)]
    n_bytes = 0
    with lzma.open(path, "wb", preset=1) as file:
        for index in range(n_games):
            n_bytes += file.write(varied(games[index % len(games)], index // len(games)) + b"\n")
    return n_bytes


def one_core(path: Path, n_bytes: int) -> Iterator[str]:
    """Yield the speed of one core."""
    started = time.process_time()
    with lzma.open(path) as file:
        while file.read(MIB):
            pass
    unpacked = time.process_time()
    (unit,) = find_units(path)
    n_games = sum(1 for _ in read_unit(unit))
    divided = time.process_time() - unpacked
    size = path.stat().st_size
    yield (
        f"one core       unpacks {size / 1e6 / (unpacked - started):,.1f} MB/s of .xz; with dividing into games "
        f"{size / 1e6 / divided:,.1f} MB/s of .xz, {n_bytes / 1e6 / divided:,.0f} MB/s of text, "
        f"{n_games / divided:,.0f} games/s"
    )


def sample(path: Path, max_games: int) -> str:
    """Draw a sample over Ray and return its measurements."""
    memory = Memory()
    memory.start()
    started = time.perf_counter()
    found = read_all_games(find_units(path), path, GameChoice(max_games=max_games))
    seconds = time.perf_counter() - started
    memory.stopped.set()
    memory.join()
    return (
        f"{len(found.games):>7,} games  in {seconds:.1f} s, {path.stat().st_size / 1e6 / seconds:,.1f} MB/s of .xz; "
        f"peak memory: driver {memory.driver / MIB:,.0f} MiB, all workers together {memory.workers / MIB:,.0f} MiB "
        f"({found.counted()})"
    )


def main() -> None:
    """Run the benchmark, print its rows, and append them to the file given by `--save`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", type=Path, required=True, help="records to repeat")
    parser.add_argument("--stored", type=int, default=100_000, help="number of games in the file")
    parser.add_argument("--max-games", type=int, default=5000)
    parser.add_argument("--save", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        path, tenth = Path(name) / "all.sgf.xz", Path(name) / "tenth.sgf.xz"
        n_bytes = write_stream(path, args.games, args.stored)
        write_stream(tenth, args.games, args.stored // 10)
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        read_all_games(find_units(tenth), tenth, GameChoice(max_games=1))  # starts the workers
        lines = [
            f"{machine.described(torch.device('cpu'))}; load {os.getloadavg()[0]:.1f}; {args.stored:,} games, "
            f"{path.stat().st_size / 1e6:,.1f} MB of .xz, {n_bytes / 1e6:,.1f} MB of text",
            *one_core(path, n_bytes),
            sample(path, args.max_games),
            sample(tenth, args.max_games),
        ]
        ray.shutdown()
    machine.report(lines, args.save)


if __name__ == "__main__":
    main()
