"""Tests of choosing games: a random sample by priorities, the first games, and what the progress says meanwhile."""

import collections
import itertools
import lzma
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest

from msae_sweep.errors import ConfigError, DataError
from msae_sweep.go import game_reading, random_games
from msae_sweep.go.game_choice import GameChoice, SmallestPriorities, priority_of
from msae_sweep.go.game_reading import read_all_games
from msae_sweep.go.progress_bar import BytesProgress
from msae_sweep.go.records import Record, find_units, read_records
from msae_sweep.go.sgf import Game, read_games, refuse_duplicates


def sgf(seed: int) -> bytes:
    """Return a game of ten moves; every fifth is broken, every seventh is on a small board, every ninth repeats one."""
    seed = seed // 2 if seed % 9 == 0 else seed
    rng = np.random.default_rng(seed)
    size = 9 if seed % 7 == 0 else 19
    moves = [
        f";{'BW'[i % 2]}[{chr(97 + point // 9)}{chr(97 + point % 9)}]"
        for i, point in enumerate(rng.permutation(81)[:10])
    ]
    return f"(;GM[1]SZ[{size}]{''.join(moves)}{moves[0] if seed % 5 == 0 else ''})".encode()


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """Folder with 300 games: 200 in one compressed file, 80 in a zip and 20 loose ones."""
    folder = tmp_path_factory.mktemp("stored")
    (folder / "all.sgf.xz").write_bytes(lzma.compress(b"\n".join(map(sgf, range(200)))))
    with zipfile.ZipFile(folder / "some.zip", "w") as archive:
        for number in range(200, 280, 2):
            archive.writestr(f"{number}.sgf", sgf(number) + sgf(number + 1))
    for number in range(280, 300):
        (folder / f"x{number}.sgf").write_bytes(sgf(number))
    return folder


def usable(folder: Path, order: list[Record]) -> list[str]:
    """Return the names of the usable games that differ, in the given order."""
    games = (game for record in order for game in read_games(record))
    return [game.name for game in refuse_duplicates(games) if isinstance(game, Game)]


def records_of(folder: Path) -> list[Record]:
    return [record for record in read_records(folder) if isinstance(record, Record)]


def by_priority(folder: Path, seed: int) -> list[str]:
    return usable(folder, sorted(records_of(folder), key=lambda record: priority_of(seed, record.number)))


def names(found: game_reading.GamesRead) -> list[str]:
    return [game.name for game in found.games]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("max_games", [1, 150])
def test_the_sample_is_the_usable_games_of_the_smallest_priorities(stored, max_games, monkeypatch):
    # Small groups of units give many tasks, and a small margin makes it necessary to read a second time.
    monkeypatch.setattr(random_games, "_UNITS_A_TASK", 2)
    monkeypatch.setattr(random_games, "_MARGIN", 2)
    found = read_all_games(find_units(stored, records_per_unit=7), stored, GameChoice(max_games=max_games), seed=3)
    assert names(found) == by_priority(stored, 3)[:max_games]
    assert found.choice.startswith("sampled from 300; ")


@pytest.mark.usefixtures("ray_session")
def test_a_sample_that_is_larger_than_all_games_is_all_games(stored):
    found = read_all_games(find_units(stored), stored, GameChoice(max_games=100_000))
    everything = read_all_games(find_units(stored), stored)
    assert {game.key for game in found.games} == {game.key for game in everything.games}
    assert found.refused == everything.refused
    assert 150 < len(found.games) < 250


@pytest.mark.usefixtures("ray_session")
def test_the_first_games_are_those_in_stored_order_and_reading_stops_behind_them(stored, tmp_path):
    expected = usable(stored, records_of(stored))
    found = read_all_games(find_units(stored, records_per_unit=7), stored, GameChoice(first_games=170))
    assert names(found) == expected[:170]
    assert "no random sample" in found.counted()
    # The file is cut off, which is an error for whoever reads to its end.
    games, noise = b"".join(map(sgf, range(300))), np.random.default_rng(0)
    comments = b"".join(b"(;GM[1]C[" + noise.bytes(500).hex().encode() + b"])" for _ in range(5000))
    whole = lzma.compress(games + comments, preset=0)
    (tmp_path / "all.sgf.xz").write_bytes(whole[: len(whole) * 9 // 10])
    units = find_units(tmp_path, to_the_end=False)
    assert len(read_all_games(units, tmp_path, GameChoice(first_games=100)).games) == 100
    for choice in (GameChoice(), GameChoice(max_games=10)):
        with pytest.raises(DataError, match=r"all\.sgf\.xz: damaged after [\d,]+ games") as caught:
            read_all_games(units, tmp_path, choice)
        assert "\n" not in str(caught.value)
        assert not hasattr(caught.value, "__notes__")


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("choice", [GameChoice(), GameChoice(max_games=5)])
def test_the_bytes_that_were_read_are_reported_up_to_the_size_of_all_files(stored, choice):
    seen: list[BytesProgress] = []
    read_all_games(find_units(stored), stored, choice, report=seen.append)
    total = sum(file.stat().st_size for file in stored.iterdir())
    assert {progress.total for progress in seen} == {total}
    assert (seen[0].n_bytes, seen[-1].n_bytes) == (0, total)
    assert len(seen) > 2
    assert all(before.n_bytes <= after.n_bytes for before, after in itertools.pairwise(seen))


def test_a_task_for_a_sample_holds_no_more_games_than_were_asked_for():
    rng = random.Random(0)
    records = [Record(str(number), b"", (0, 0, number)) for number in range(500)]
    expected = sorted(records, key=lambda record: priority_of(0, record.number))[:20]
    rng.shuffle(records)
    smallest = SmallestPriorities(20)
    for record in records:
        smallest.add(priority_of(0, record.number), record)
        assert len(smallest.in_order()) <= 20
    assert [candidate.record for candidate in smallest.in_order()] == expected
    bounded = SmallestPriorities(20, below=smallest.below)
    for record in records:
        bounded.add(priority_of(0, record.number), record)
    assert bounded.in_order() == smallest.in_order(), "a bound from elsewhere changed what is drawn"


def test_every_game_is_as_likely_as_any_other():
    counts: collections.Counter[int] = collections.Counter()
    for seed in range(2000):
        counts.update(sorted(range(100), key=lambda number: priority_of(seed, (0, 0, number)))[:10])
    # The counts follow Binomial(2000, 0.1), which is 200 ± 13.4. The limit is five standard deviations.
    assert max(abs(counts[number] - 200) for number in range(100)) < 67


def test_the_priority_is_the_same_on_every_machine():
    """The value is fixed: another hash would draw other games from the same seed."""
    assert priority_of(7, (1, 2, 3)) == 15044785727205381434


def test_a_sample_and_the_first_games_cannot_both_be_taken():
    with pytest.raises(ConfigError, match="--first-games: cannot be given together with --max-games"):
        GameChoice(10, 10).check()
