"""Benchmark of `extract`: positions per second, from SGF records to files on disk, and the time that each part takes.

    python tests/bench/bench_extract.py [--weights FILE | --blocks 40 --filters 256] [--taps 5,20,35] [--stages]
                                        [--games PATH | --random-games 4000] [--max-games N] [--positions-per-game N]
                                        [--points 10] [--format npy] [--save tests/bench/rows.md]

Without `--games`, the benchmark writes seeded random games into one .tar.gz: legal moves on empty points, about 250 per
game, of which all positions are taken. It first measures each stage alone on one CPU core. Then it measures the
pipeline after `ray.init`: as a whole, and from the first chunk on disk to the last, which leaves out what happens only
once (workers and CUDA start, weights are sent). Waiting time is the device's, from when its network is ready. Memory is
sampled twice a second as PSS, which counts a page once, however many processes share it. `--stages` measures only the
single stages.
"""

import argparse
import io
import os
import pickle
import resource
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import machine
import numpy as np
import torch

from msae_sweep.go import extract as extraction
from msae_sweep.go import pipeline as feeding
from msae_sweep.go.activation_folder import INDEX, ActivationFolder
from msae_sweep.go.board import BLACK, N_POINTS, SIZE, WHITE, Board, dead_group
from msae_sweep.go.records import Record, read_records
from msae_sweep.go.sampling import Sampling, make_chunks, parse_points
from msae_sweep.go.sgf import Game, read_games
from msae_sweep.go.weights import random_weights, read_weights, write_weights

GIB = 2**30


def random_game(rng: np.random.Generator) -> str:
    """Return a record of 200 to 300 random moves on empty points: no suicide, no stone where one was just taken."""
    board, moves, taken = Board(), [], -1
    for number in range(int(rng.integers(200, 301))):
        black = number % 2 == 0
        for point in rng.integers(0, N_POINTS, 50).tolist():
            before = bytes(board.stones)
            if point == taken or not board.play(point, black):
                continue
            if board.stones[point] == (BLACK if black else WHITE) and not dead_group(board.stones, point):
                break
            board.stones[:] = before
        else:
            moves.append(f";{'BW'[not black]}[]")
            continue
        gone = [p for p, stone in enumerate(before) if stone and not board.stones[p]]
        taken = gone[0] if len(gone) == 1 else -1
        row, column = divmod(point, SIZE)
        moves.append(f";{'BW'[not black]}[{chr(97 + column)}{chr(97 + row)}]")
    return f"(;GM[1]FF[4]SZ[19]KM[7.5]{''.join(moves)})"


def write_games(path: Path, n_games: int) -> None:
    """Write random games into a .tar.gz. They are the same every time."""
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for number in range(n_games):
            data = random_game(np.random.default_rng([0, number])).encode()
            member = tarfile.TarInfo(f"games/{number:06d}.sgf")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def first_games(path: Path, n_games: int, target: Path) -> None:
    """Write the first `n_games` records of `path` into a .tar."""
    with tarfile.open(target, "w") as archive:
        for record in islice((r for r in read_records(path) if isinstance(r, Record)), n_games):
            member = tarfile.TarInfo(record.name.replace("/", "_"))
            member.size = len(record.data)
            archive.addfile(member, io.BytesIO(record.data))


def stages(games: Path, sampling: Sampling, blocks: tuple[int, ...], filters: int, folder: Path) -> Iterator[str]:
    """Yield the speed of each single stage on one core, with at most 200 games and ten chunks."""
    started = time.perf_counter()
    records = list(islice((r for r in read_records(games) if isinstance(r, Record)), 200))
    unpacked = time.perf_counter()
    found = [game for record in records for game in read_games(record) if isinstance(game, Game)]
    parsed = time.perf_counter()
    chunks = make_chunks(found, sampling)[:10]
    n_positions = sum(chunk.n_positions for chunk in chunks)
    per_game = sum(chunk.n_positions for chunk in make_chunks(found, sampling)) / len(found)
    planned = time.perf_counter()
    for chunk in chunks:
        boards = feeding.unpack_boards(feeding.pack_boards({"chunk": [pickle.dumps(chunk)]}, sampling))
    replayed = time.perf_counter()
    output = ActivationFolder(folder / "stages", blocks, ("npy",))
    output.begin({})
    rows = np.random.default_rng(0).standard_normal((boards.points.size, filters), np.float32).astype(np.float16)
    index = {name: np.zeros(len(rows), np.int64) for name in INDEX}
    sums = {block: np.zeros((2, filters)) for block in blocks}
    writing = time.perf_counter()
    for chunk in chunks:
        output.write_chunk(chunk.number, dict.fromkeys(blocks, rows), sums, index)
    written = time.perf_counter()
    read, parse = len(records) / (unpacked - started), len(records) / (parsed - unpacked)
    replay, write = n_positions / (replayed - planned), len(boards.ply) * len(chunks) / (written - writing)
    yield (
        f"one core       reads {read:,.0f} games/s and parses {parse:,.0f}; with {per_game:.0f} positions a game, "
        f"positions/s: read {read * per_game:,.0f}, parsed {parse * per_game:,.0f}, replayed {replay:,.0f}, "
        f"written {write:,.0f}"
    )
    together = 1 / (1 / (read * per_game) + 1 / (parse * per_game) + 1 / replay + 1 / write)
    yield f"               all of it {together:,.0f}, so 20,000 positions/s need {20_000 / together:.1f} cores"


class Memory(threading.Thread):
    """Thread that samples the memory of this process and its descendants until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.driver = self.workers = self.ray = self.together = 0
        """Peak memory in bytes of the driver, all workers, Ray's own processes, and driver and workers together."""
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.5):
            driver = workers = others = 0
            for pid in descendants(os.getpid()):
                bytes_, name = memory_of(pid)
                if pid == os.getpid():
                    driver += bytes_
                elif name.startswith("ray::"):
                    workers += bytes_
                else:
                    others += bytes_
            self.driver, self.workers, self.ray = (
                max(self.driver, driver),
                max(self.workers, workers),
                max(self.ray, others),
            )
            self.together = max(self.together, driver + workers)


def descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:  # the process has ended meanwhile
            continue
        children.setdefault(parent, []).append(int(entry.parent.name))
    found = [root]
    for pid in found:  # the list grows while the loop walks it
        found += children.get(pid, [])
    return found


def memory_of(pid: int) -> tuple[int, str]:
    """Return PSS and command of a process, or 0 and an empty string if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return 0, ""
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0), command


def main() -> None:
    """Run the benchmark, print its rows, and append them to the file given by `--save`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="Leela Zero's text weights; random ones without")
    parser.add_argument("--blocks", type=int, help="default: 40 on CUDA, 6 on a CPU")
    parser.add_argument("--filters", type=int, help="default: 256 on CUDA, 64 on a CPU")
    parser.add_argument("--taps", help="default: 5,20,35, as far as there are so many blocks, else the last block")
    parser.add_argument("--games", type=Path, help="records; random games without")
    parser.add_argument("--random-games", type=int, help="default: 4000 on CUDA, 40 on a CPU")
    parser.add_argument("--max-games", type=int, help="only so many of the records")
    parser.add_argument("--positions-per-game", type=int, help="all without")
    parser.add_argument("--points", default="10", help="mean, all or N")
    parser.add_argument("--format", default="npy")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--folder", type=Path, help="where to write, default: the system's temporary folder")
    parser.add_argument("--stages", action="store_true", help="one core's stages alone, no pipeline")
    parser.add_argument("--save", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        weights = args.weights or folder / "random.txt"
        if args.weights is None:
            blocks, filters = args.blocks or (40 if on_gpu else 6), args.filters or (256 if on_gpu else 64)
        if args.weights is None and not args.stages:
            write_weights(random_weights(blocks, filters, seed=0), weights)
        if args.weights is not None:
            network = read_weights(weights)
            blocks, filters = len(network.blocks), network.filters
            del network
        taps = tuple(int(b) for b in args.taps.split(",")) if args.taps else tuple(b for b in (5, 20, 35) if b < blocks)
        taps = taps or (blocks - 1,)
        games = args.games or folder / "games.tar.gz"
        if args.games is None:
            write_games(games, args.random_games or (4000 if on_gpu else 40))
        if args.max_games is not None:
            first_games(games, args.max_games, folder / "first.tar")
            games = folder / "first.tar"
        sampling = Sampling(args.positions_per_game, 0, parse_points(args.points), 0)
        kind = "random" if args.weights is None else "given"
        lines = [
            f"{machine.described(device)}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
            f"{blocks} x {filters}, {kind} weights, taps {','.join(map(str, taps))}, points {args.points}, "
            f"{args.format}",
            *stages(games, sampling, taps, filters, folder),
        ]
        if not args.stages:
            formats = tuple(args.format.split(","))
            settings = extraction.ExtractionSettings(
                weights, games, folder / "out", taps, sampling, formats=formats, precision=args.precision
            )
            lines += pipeline(settings)
        machine.report(lines, args.save)


def pipeline(settings: extraction.ExtractionSettings) -> Iterator[str]:
    """Run the extraction and yield its measurements."""
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    memory = Memory()
    memory.start()
    seen: list[tuple[float, int]] = []
    said: list[str] = []

    def report(progress: extraction.GamesProgress) -> None:
        seen.append((time.perf_counter(), progress.positions))
        said.append(progress.device)

    started = time.perf_counter()
    summary = extraction.extract(settings, report)
    seconds = time.perf_counter() - started
    memory.stopped.set()
    memory.join()
    ray.shutdown()
    spent = summary.spent
    n_bytes = sum(file.stat().st_size for file in settings.out.rglob("*") if file.is_file())
    yield f"{summary.text(settings).splitlines()[0]}; {n_bytes / GIB:.2f} GiB; network on {said[-1]}"
    yield f"end to end     {seconds:8.1f} s   {summary.positions / seconds:10,.0f} positions/s"
    if len(seen) > 2:
        between, positions = seen[-1][0] - seen[1][0], seen[-1][1] - seen[1][1]
        yield f"steady         {between:8.1f} s   {positions / between:10,.0f} positions/s, from first chunk to last"
    once = seen[1][0] - started - spent.reading if len(seen) > 1 else 0.0
    yield (
        f"on the clock   reading {spent.reading:.1f} s, then until the first chunk {once:.1f} s, "
        f"finishing {spent.finishing:.1f} s"
    )
    yield (
        f"the devices    computing {spent.network:.1f} s, waiting for boards {spent.waiting:.1f} s, "
        f"copying to the host {spent.copying:.1f} s: busy {spent.busy:.1%}"
    )
    yield f"beside them    replaying {spent.boards:.1f} s of CPU tasks, writing {spent.writing:.1f} s of threads"
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    yield (
        f"peak memory    driver {memory.driver / GIB:.2f} GiB (RSS {own / GIB:.2f}), "
        f"workers {memory.workers / GIB:.2f}, both at a time {memory.together / GIB:.2f}; "
        f"Ray's own processes {memory.ray / GIB:.2f}"
    )


if __name__ == "__main__":
    main()
