import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from msae_sweep import cli
from msae_sweep.data.sources.extraction_manifest import blocks_numbered_from, numbering_note, read_manifest
from msae_sweep.errors import ConfigError, DataError
from msae_sweep.go import network_check, top_activations
from msae_sweep.go.board import N_POINTS
from msae_sweep.go.leela import Network
from msae_sweep.go.planes import planes
from msae_sweep.go.records import Record
from msae_sweep.go.replay import replay
from msae_sweep.go.sampling import Sampling
from msae_sweep.go.sgf import read_games
from msae_sweep.go.weights import random_weights, weights_sha256, write_weights
from msae_sweep.paths import StoragePath
from msae_sweep.sae import model_file
from msae_sweep.sae.model import MSAE
from msae_sweep.sae.model_file import ModelFile

BLOCKS, FILTERS, HIDDEN, K, TOP = 3, 8, 24, 4, 3
RECORDS = {
    "a.sgf": "(;GM[1]SZ[19];B[pd];W[dp];B[pp];W[dd];B[fc])",
    "b.sgf": "(;GM[1]SZ[19];B[aa];W[ba];B[qq];W[ab];B[cc];W[tt])",
    "c.sgf": "(;GM[1]SZ[19];B[jj];W[kk];B[jk])",
    "d.sgf": "(;GM[1]SZ[19]AB[dd][pp];W[dp];B[pd])",
    "broken.sgf": "(;GM[1]SZ[19];B[zz])",
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> top_activations.TopActivationSettings:
    folder = tmp_path_factory.mktemp("boards")
    (folder / "games").mkdir()
    for name, text in RECORDS.items():
        (folder / "games" / name).write_text(text)
    write_weights(random_weights(BLOCKS, FILTERS, seed=1), folder / "net.txt")
    torch.manual_seed(2)
    model = MSAE(FILTERS, HIDDEN, [2, K])
    with torch.no_grad():
        model.pre_bias += 0.1 * torch.randn(FILTERS)
    mean, std = np.full(FILTERS, 0.3, np.float32), np.linspace(0.5, 2, FILTERS, dtype=np.float32)
    file = ModelFile(model, mean, std, {})
    model_file.save(file, folder / "model.pt")
    return top_activations.TopActivationSettings(
        model=file,
        name="model.pt",
        weights=folder / "net.txt",
        games=folder / "games",
        block=2,
        out=folder / "page.html",
        latents=HIDDEN,
        top=TOP,
        k=K,
        sampling=Sampling(None, 0, "all", 0),
        precision="fp32",
        first_row="top",
    )


@pytest.fixture(scope="module")
def codes(settings) -> dict[tuple[str, int], np.ndarray]:
    """Code of every point [361, hidden_dim] by game and ply, computed in the plain way."""
    network = Network(random_weights(BLOCKS, FILTERS, seed=1), "cpu", "fp32")
    sae = settings.model.standardised()
    found = {}
    for name, text in RECORDS.items():
        for game in read_games(Record(name, text.encode())):
            if not hasattr(game, "moves"):
                continue
            for ply in range(game.n_moves):
                seen = replay(game, np.array([ply]))
                x = planes(torch.tensor(seen.boards), torch.tensor(seen.black_to_move), torch.float32)
                tapped = network(x, (2,), heads=False).activations[2][0]
                with torch.no_grad():
                    found[name, ply] = sae.encode(tapped.flatten(1).T.float(), K).numpy()
    return found


@pytest.fixture(scope="module")
def shown(settings, ray_session) -> tuple[top_activations.TopActivationSummary, dict]:
    summary = top_activations.write_top_activations(settings)
    return summary, json.loads(settings.out.with_suffix(".json").read_text())


def test_every_latents_strongest_positions_are_those_of_a_plain_search(shown, codes):
    _, record = shown
    for latent in range(HIDDEN):
        by_game = {}
        for (game, ply), code in codes.items():
            value = code[:, latent].max()
            if value > 0 and value > by_game.get(game, (0, 0))[0]:
                by_game[game] = (value, ply)
        expected = sorted(by_game.values(), reverse=True)[:TOP]
        got = record["latents"].get(str(latent), {"strongest": []})["strongest"]
        np.testing.assert_allclose([s["value"] for s in got], [value for value, _ in expected], atol=1e-3)
        for place in got:
            stem = Path(place["game"]).name
            np.testing.assert_allclose(place["value"], codes[stem, place["ply"]][:, latent].max(), atol=1e-3)
        assert len({place["game"] for place in got}) == len(got), "one a game"


def test_how_much_a_latent_fires_is_counted_over_all_points(shown, codes):
    _, record = shown
    everything = np.concatenate(list(codes.values()))
    for latent in range(HIDDEN):
        share = (everything[:, latent] > 0).mean()
        assert record["latents"].get(str(latent), {"points": 0})["points"] == pytest.approx(share)
    assert sum(latent["energy"] for latent in record["latents"].values()) == pytest.approx(1)
    assert record["positions"] * N_POINTS == len(everything)


def test_the_page_draws_the_latents_that_are_strongest_where_they_fire_first(shown, settings, codes):
    summary, _ = shown
    assert (summary.games, summary.refused) == (4, "1 broken")
    text = settings.out.read_text(encoding="utf-8")
    drawn = [int(part.split('"')[0]) for part in text.split('<section id="n')[1:]]
    assert len(drawn) == summary.drawn > 0
    everything = np.concatenate(list(codes.values()))
    strength = [np.square(everything[:, n][everything[:, n] > 0]).mean() for n in drawn]
    assert strength == sorted(strength, reverse=True)
    assert "a.sgf" in text
    assert "broken.sgf" not in text


@pytest.mark.slow
def test_the_same_page_comes_from_a_network_whose_rows_count_from_the_bottom(settings, shown, ray_session, tmp_path):
    # Games and network give the same result when both are turned upside down, so the page must turn the points back.
    flipped = tmp_path / "games"
    flipped.mkdir()
    turned = {letter: "abcdefghijklmnopqrs"[18 - i] for i, letter in enumerate("abcdefghijklmnopqrs")}
    for name, text in RECORDS.items():
        upside_down = re.sub(r"\[([a-s])([a-s])\]", lambda move: f"[{move[1]}{turned[move[2]]}]", text)
        (flipped / name).write_text(upside_down)
    changed = settings._replace(first_row="bottom", games=flipped, out=tmp_path / "bottom.html")
    top_activations.write_top_activations(changed)
    records = shown[1], json.loads(changed.out.with_suffix(".json").read_text())
    pages = [
        {n: [s["value"] for s in latent["strongest"]] for n, latent in record["latents"].items()} for record in records
    ]
    assert pages[0].keys() == pages[1].keys()
    for latent, values in pages[0].items():
        np.testing.assert_allclose(values, pages[1][latent], atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        ({"block": 3}, ConfigError, "--block: 3 is not in this network, which has blocks 0 to 2"),
        ({"block": 4, "numbered_from": 1}, ConfigError, "--block: 4 is not in this network, which has blocks 1 to 3"),
        ({"latents": (1, 24)}, ConfigError, "--latents: 24 is not in this model, which has 0 to 23"),
        ({"k": 25}, ConfigError, "--k: 25 must be 1 to 24"),
        ({"out": Path("page.txt")}, ConfigError, "must end in .html"),
        ({"games": Path("/nowhere")}, DataError, "/nowhere"),
    ],
)
def test_what_cannot_be_is_said_before_ray_starts(settings, changes, error, line):
    with pytest.raises(error, match=line):
        top_activations.write_top_activations(
            settings._replace(**changes), connect=lambda: pytest.fail("Ray was started")
        )


def test_a_network_of_another_width_than_the_models_is_refused(settings, tmp_path):
    write_weights(random_weights(3, 16, seed=1), tmp_path / "other.txt")
    with pytest.raises(DataError, match="16 filters, but the model takes 8 channels"):
        top_activations.write_top_activations(
            settings._replace(weights=tmp_path / "other.txt"), connect=lambda: pytest.fail("Ray was started")
        )


@pytest.mark.parametrize("name", ["page.html", "page.json"])
def test_a_page_that_cannot_be_written_is_found_before_ray_starts(settings, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    for out, line in (
        (tmp_path / "page.html", f"{name} is a folder"),
        (tmp_path / "file" / "page.html", "is not a folder"),
    ):
        with pytest.raises(ConfigError, match=line):
            top_activations.write_top_activations(
                settings._replace(out=out), connect=lambda: pytest.fail("Ray was started")
            )
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["file", name])


@pytest.mark.parametrize(("text", "wanted"), [("40", 40), ("12,77", (12, 77)), ("0,", (0,)), (" 3, 5 ", (3, 5))])
def test_latents_are_a_number_of_them_or_their_numbers(text, wanted):
    assert top_activations.parse_latents(text) == wanted


WRONG_OPTIONS = {
    "no numbers": (
        "--latents=some",
        "--latents: 'some' must be a number of latents, e.g. 40, or their indices, e.g. 12,77",
    ),
    "a number below 0": (
        "--latents=-3",
        "--latents: '-3' must be a number of latents, e.g. 40, or their indices, e.g. 12,77",
    ),
    "nothing": ("--latents=", "--latents: '' must be a number of latents, e.g. 40, or their indices, e.g. 12,77"),
    "a comma": ("--latents=,", "--latents: ',' must be a number of latents, e.g. 40, or their indices, e.g. 12,77"),
    "none": (
        "--latents=0",
        "--latents: 0 draws nothing; give a number of latents, e.g. 40, or indices, e.g. 12,77 (only 0: 0,)",
    ),
    "one twice": ("--latents=5,5", "--latents: names 5 more than once"),
    "one beyond the model's": ("--latents=24,", "--latents: 24 is not in this model, which has 0 to 23"),
    "no k": ("--k=0", "--k: 0 must be 1 to 24, the model's number of latents"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_the_command_line_refuses_in_one_line(settings, capsys, monkeypatch, tmp_path, case):
    option, line = WRONG_OPTIONS[case]
    model = str(settings.weights.parent / "model.pt")
    given = {"weights": settings.weights, "games": settings.games, "block": 2, "out": tmp_path / "page.html"}
    options = [f"--{name}={value}" for name, value in given.items()]
    monkeypatch.setattr("sys.argv", ["msae-sweep", "boards", model, *options, option])
    monkeypatch.setattr("msae_sweep.sweep.ray_cluster.connect", lambda: pytest.fail("Ray was started"))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"msae-sweep: {line}\n"


def test_a_block_is_taken_in_the_numbering_of_the_models_activations(settings):
    assert settings._replace(block=2).tap == 2
    assert settings._replace(block=3, numbered_from=1).tap == 2


def test_a_folder_of_an_earlier_version_is_recognised_by_its_manifest_and_named(tmp_path):
    def numbered(**manifest: object) -> int:
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        return blocks_numbered_from(read_manifest(StoragePath(tmp_path)))

    assert numbered(weights_sha256="0", blocks_numbered_from=0) == 0
    assert numbering_note(str(tmp_path)) is None
    assert numbered(weights_sha256="0") == 1, "the first versions numbered from 1 and did not say so"
    assert "its block5 is block 4 of Leela Zero" in (numbering_note(str(tmp_path / "activations.h5")) or "")
    assert numbered(blocks_numbered_from=1) == 1, "written by hand"
    assert numbered(other="program") == 0
    (tmp_path / "manifest.json").write_text("not JSON")
    assert numbering_note(str(tmp_path)) is None


def test_a_network_that_the_model_was_not_trained_on_is_said(settings, tmp_path):
    (tmp_path / "sweep" / "models").mkdir(parents=True)
    (tmp_path / "sweep" / "sweep.yaml").write_text(f"name: s\ndata: {{path: {tmp_path}/activations}}\n")
    (tmp_path / "activations").mkdir()
    models = [str(tmp_path / "sweep" / name) for name in ("models/msae_block2.pt", "trials/block2-000/model.pt")]

    def said(sha256: str, first_row: str) -> list[tuple[str, ...]]:
        manifest = {"weights_sha256": sha256, "first_row": first_row}
        (tmp_path / "activations" / "manifest.json").write_text(json.dumps(manifest))
        manifests = [network_check.manifest_of_model(model) for model in models]
        return [network_check.network_differences(manifest, settings.weights, "top") for manifest in manifests]

    assert said(weights_sha256(settings.weights), "top") == [(), ()]
    for notes in said("0" * 64, "bottom"):
        assert "net.txt is not the file that the model's activations were extracted with" in notes[0]
        assert "extracted with --first-row bottom, not top" in notes[1]
    (tmp_path / "activations" / "manifest.json").unlink()
    for unknown in (*models, "models:/msae-block2@champion", str(settings.weights.parent / "model.pt")):
        manifest = network_check.manifest_of_model(unknown)
        assert network_check.network_differences(manifest, settings.weights, "top") == ()
