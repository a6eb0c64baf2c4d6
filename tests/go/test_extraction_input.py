"""Tests of what an extraction is made from: games of which some positions are chosen, or a file of positions."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from test_extract import contents, no_ray, sgf

from msae_sweep.errors import ConfigError, DataError
from msae_sweep.go import extract as extraction
from msae_sweep.go import sampling
from msae_sweep.go.extract import ExtractionSettings, extract
from msae_sweep.go.game_choice import GameChoice
from msae_sweep.go.planes import planes
from msae_sweep.go.progress_bar import BytesProgress
from msae_sweep.go.records import Record, read_records
from msae_sweep.go.replay import replay
from msae_sweep.go.sampling import Sampling, make_chunks, sampled_plies
from msae_sweep.go.sgf import Game, read_games
from msae_sweep.go.weights import random_weights, write_weights

RUNS = Sampling(positions_per_game=6, min_move=3, points="mean", seed=0, max_move=15, consecutive=True)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """File of twelve games of 12 to 23 moves."""
    path = tmp_path_factory.mktemp("records") / "all.sgf"
    path.write_text("\n".join(sgf(12 + i, i) for i in range(12)))
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """File of a random network with 3 blocks and 8 filters."""
    path = tmp_path_factory.mktemp("network") / "net.txt"
    write_weights(random_weights(3, 8, seed=0), path)
    return path


def games_of(records: Path) -> list[Game]:
    found = [game for record in read_records(records) if isinstance(record, Record) for game in read_games(record)]
    return [game for game in found if isinstance(game, Game)]


def settings(network: Path, out: Path, **changes: object) -> ExtractionSettings:
    return ExtractionSettings(network, None, out, (0, 2), RUNS, dtype="float32")._replace(**changes)


@pytest.fixture(scope="module")
def written(network, records, tmp_path_factory, ray_session):
    """An extraction of runs from half of the games, which wrote its positions."""
    folder = tmp_path_factory.mktemp("written")
    chosen = settings(
        network, folder / "out", games=records, choice=GameChoice(max_games=6), write_positions=folder / "p.hdf5"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "CHUNK_POSITIONS", 10)
        seen: list[BytesProgress] = []
        return chosen, extract(chosen, report_bytes=seen.append), seen


def test_a_run_is_consecutive_within_its_limits_and_its_start_depends_on_seed_and_game_alone(records):
    starts = set()
    for seed in range(40):
        for game in games_of(records):
            plies = sampled_plies(game, RUNS._replace(seed=seed))
            last = min(15, game.n_moves - 1)
            assert len(plies) == 6
            assert (np.diff(plies) == 1).all()
            assert plies[0] >= 3
            assert plies[-1] <= last
            starts.add(int(plies[0]))
    assert starts == set(range(3, 11)), "every start that leaves room occurs"
    game = games_of(records)[0]
    assert sampled_plies(game, RUNS._replace(positions_per_game=100)).tolist() == list(range(3, 12))
    assert sampled_plies(game, RUNS._replace(min_move=8, max_move=None)).tolist() == [8, 9, 10, 11]


def test_starts_are_equally_likely(records):
    game, counts = games_of(records)[11], np.zeros(16)
    for seed in range(2000):
        counts[sampled_plies(game, RUNS._replace(seed=seed))[0]] += 1
    # Eight starts; the counts follow Binomial(2000, 1/8), which is 250 ± 14.8. The limit is five standard deviations.
    assert np.abs(counts[3:11] - 250).max() < 74


def test_a_random_sample_is_the_one_of_the_version_before_max_move(records):
    """The values are fixed: with other ones, an extraction that an earlier version began would be taken for another."""
    game, sample = games_of(records)[11], Sampling(6, 3, "mean", 0)
    assert sampled_plies(game, sample).tolist() == [3, 5, 7, 8, 9, 11]
    assert sampled_plies(game, sample._replace(max_move=1000)).tolist() == [3, 5, 7, 8, 9, 11]
    # A limit removes candidates, but does not change what the others draw.
    assert sampled_plies(game, sample._replace(max_move=8)).tolist() == [3, 4, 5, 6, 7, 8]
    assert {3, 5, 7, 8, 9} < set(sampled_plies(game, sample._replace(max_move=10)).tolist())


def test_chunks_count_what_is_sampled(records):
    for sample in (RUNS, RUNS._replace(consecutive=False), RUNS._replace(max_move=None), RUNS._replace(min_move=30)):
        games = games_of(records)
        n = sum(len(sampled_plies(game, sample)) for game in games)
        assert sum(chunk.n_positions for chunk in make_chunks(games, sample)) == n


def test_rows_are_in_game_order_and_only_of_the_drawn_games(written):
    chosen, summary, _ = written
    assert (summary.games, summary.positions) == (6, 36)
    assert "sampled from 12; " in summary.text(chosen)
    found = contents(chosen.out, 2)
    for game_id in np.unique(found["game_id"]):
        at = np.flatnonzero(found["game_id"] == game_id)
        assert (np.diff(at) == 1).all()
        assert (np.diff(found["ply"][at]) == 1).all()
    manifest = json.loads((chosen.out / "manifest.json").read_text())
    assert {name: manifest[name] for name in ("max_games", "min_move", "max_move", "consecutive", "taken_from")} == {
        "max_games": 6, "min_move": 3, "max_move": 15, "consecutive": True, "taken_from": "games",
    }  # fmt: skip


def test_the_written_file_holds_the_extractions_positions_in_the_order_of_its_rows(written, records):
    chosen, _, seen = written
    games, found = {game.game_id: game for game in games_of(records)}, contents(chosen.out, 2)
    with h5py.File(chosen.write_positions) as file:
        x, ids, moves = (file[name][:] for name in ("positions", "game_ids", "move_numbers"))
        attributes = dict(file.attrs)
    assert moves.tolist() == found["ply"].tolist()
    for row, (game_id, ply) in enumerate(zip(found["game_id"].tolist(), found["ply"].tolist(), strict=True)):
        boards, black = (torch.from_numpy(a) for a in replay(games[game_id], np.array([ply])))
        assert np.array_equal(x[row], planes(boards, black, torch.float32).flip(2)[0].numpy())
    assert ids.tolist() == [row // 6 for row in range(36)]
    del attributes["written_for"]
    assert attributes == {
        "board_size": 19, "max_move": 15, "min_move": 3, "n_games": 6, "n_positions": 36, "positions_per_game": 6,
        "seed": 0, "source": "all.sgf",
    }  # fmt: skip
    assert [p.what for p in seen][-1] == "writing p.hdf5"
    assert seen[-1].n_bytes == seen[-1].total == 36 * 18 * 361 * 4


def test_an_extraction_from_the_written_file_gives_the_same_rows_and_goes_on_where_it_stopped(
    written, network, tmp_path, monkeypatch
):  # fmt: skip
    chosen, _, _ = written
    monkeypatch.setattr(sampling, "CHUNK_POSITIONS", 10)
    again = settings(network, tmp_path / "out", positions=chosen.write_positions, sampling=Sampling(None, 0, "mean", 0))

    def stop(progress: extraction.GamesProgress) -> None:
        if progress.positions:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(again, stop)
    seen: list[int] = []
    summary = extract(again, lambda progress: seen.append(progress.positions))
    assert seen[0] >= 10, "finished chunks were repeated"
    assert (summary.games, summary.positions) == (6, 36)
    assert f"6 games (from {chosen.write_positions})" in summary.text(again)
    assert extract(again).complete_before
    found, before = contents(again.out, 2), contents(chosen.out, 2)
    for name in ("rows", "position_id", "ply", "point"):
        assert np.array_equal(found[name], before[name]), name
    assert found["game_id"].tolist() == [row // 6 for row in range(36)]
    manifest = json.loads((again.out / "manifest.json").read_text())
    assert "games_sha256" not in manifest
    assert len(manifest["positions_sha256"]) == 64
    with pytest.raises(ConfigError, match="with taken_from 'positions' instead of 'games'"):
        extract(again._replace(positions=None, games=chosen.games), connect=no_ray)
    copy = tmp_path / "copy.hdf5"
    copy.write_bytes(chosen.write_positions.read_bytes())
    with h5py.File(copy, "r+") as file:
        file.attrs["seed"] = 1
    with pytest.raises(ConfigError, match=r"was started with other --positions \(positions_sha256 "):
        extract(again._replace(positions=copy))


def test_the_same_command_keeps_the_written_file_and_another_one_does_not_replace_it(written, tmp_path):
    chosen, _, _ = written
    before = chosen.write_positions.stat().st_mtime_ns
    assert extract(chosen).complete_before
    assert chosen.write_positions.stat().st_mtime_ns == before
    other = chosen._replace(out=tmp_path / "out", sampling=RUNS._replace(seed=1))
    with pytest.raises(ConfigError, match=r"--write-positions: .*p\.hdf5 exists and holds other positions"):
        extract(other)
    assert not (tmp_path / "out").exists()
    foreign = tmp_path / "mine.hdf5"
    for content in (b"not HDF5", None):
        if content is None:
            h5py.File(foreign, "w").close()
        else:
            foreign.write_bytes(content)
        with pytest.raises(ConfigError, match=r"mine\.hdf5 exists and was not written by `extract`"):
            extract(other._replace(write_positions=foreign), connect=no_ray)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"games": None}, "--games: missing; give game records, or positions with --positions"),
        ({"positions": Path("p")}, "--positions: cannot be given together with --games"),
        ({"choice": GameChoice(1, 1)}, "--first-games: cannot be given together with --max-games"),
        ({"sampling": RUNS._replace(max_move=2)}, "--max-move: 2 must be at least --min-move 3"),
        ({"sampling": RUNS._replace(positions_per_game=None)}, "--consecutive: needs --positions-per-game"),
    ],
)
def test_settings_that_contradict_one_another_are_one_line(changes, message, network, records, tmp_path):
    with pytest.raises(ConfigError, match=message):
        extract(settings(network, tmp_path / "out", games=records)._replace(**changes), connect=no_ray)


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("--max-games", {"choice": GameChoice(max_games=1)}),
        ("--first-games", {"choice": GameChoice(first_games=1)}),
        ("--positions-per-game", {"sampling": Sampling(1, 0, "mean", 0)}),
        ("--min-move", {"sampling": Sampling(None, 1, "mean", 0)}),
        ("--max-move", {"sampling": Sampling(None, 0, "mean", 0, max_move=1)}),
        ("--write-positions", {"write_positions": Path("q")}),
    ],
)
def test_options_that_choose_positions_of_games_are_refused_for_a_file_of_positions(
    option, changes, network, tmp_path
):  # fmt: skip
    of_a_file = settings(network, tmp_path / "out", positions=Path("p"), sampling=Sampling(None, 0, "mean", 0))
    with pytest.raises(ConfigError, match=f"^{option}: chooses positions of --games"):
        extract(of_a_file._replace(**changes), connect=no_ray)


def test_a_file_of_positions_that_cannot_be_read_is_found_before_ray_starts(network, tmp_path):
    with h5py.File(tmp_path / "p.hdf5", "w") as file:
        file["x"] = 1
    chosen = settings(network, tmp_path / "out", positions=tmp_path / "p.hdf5", sampling=Sampling(None, 0, "mean", 0))
    with pytest.raises(DataError, match="has no dataset positions"):
        extract(chosen, connect=no_ray)
