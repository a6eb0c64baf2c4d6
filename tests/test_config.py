import itertools
import re
from pathlib import Path

import pytest
import yaml

from msae_sweep.config import SweepConfig, TrainingConfig, load, parse
from msae_sweep.errors import ConfigError

SPACES = sorted(Path(__file__).parents[1].glob("search_spaces/*.yaml"))

NOTEBOOK_KEYS = (
    "k_levels", "expansion_factor", "weighting", "batch_size", "learning_rate", "epochs", "early_stopping_patience",
    "aux_k", "aux_coefficient", "adam_beta1", "adam_beta2", "adam_eps", "normalize_decoder",
)  # fmt: skip
"""Training keys of the notebook's CONFIG."""

SPACE = """
name: test
data: {path: somewhere}
space:
  learning_rate: {loguniform: [1e-4, 4.0e-3]}
  expansion_factor: {choice: [8, 16, 32]}
  weighting: {choice: [uniform, reverse]}
"""


BOMB = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in itertools.pairwise("abcdefghi"))
"""YAML aliases that expand to 10⁹ values if a list `a` of ten values stands before them."""


def parse_with(*overrides: str) -> SweepConfig:
    return parse(SPACE, overrides)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_shipped_search_space_is_valid(path):
    config = load(path)
    varies = {"learning_rate", "expansion_factor", "weighting"} & set(config.space)
    assert bool(varies) == (path.stem != "notebook")


def test_the_shipped_spaces_are_the_four_that_the_readme_names():
    assert {path.stem for path in SPACES} == {"quickstart", "leela_zero", "baselines", "notebook"}


def test_leela_zero_has_the_notebooks_setting_at_its_centre():
    config = load(next(path for path in SPACES if path.stem == "leela_zero"))
    training = config.training
    assert training.k_levels == (16, 32, 64, 128)
    assert (training.batch_size, training.epochs, training.early_stopping_patience) == (4096, 30, 5)
    assert (training.aux_k, training.aux_coefficient) == (512, 1 / 32)
    assert config.data.blocks == (5, 20, 35)
    assert training.learning_rate == 8e-4
    assert 16 in config.space["expansion_factor"].values


def test_the_notebooks_space_is_one_trial_a_block_with_its_setting_and_every_other_key_says_why():
    path = next(path for path in SPACES if path.stem == "notebook")
    config, text = load(path), path.read_text(encoding="utf-8")
    assert config.space == {}
    assert (config.n_trials_per_block(), config.asha, config.data.blocks) == (1, None, (5, 20, 35))
    # All training keys but these have the defaults, which are the notebook's.
    assert config.training == TrainingConfig(precision="fp32")
    assert set(NOTEBOOK_KEYS) <= set(yaml.safe_load(text)["training"])
    for key in ("precision", "search", "asha", "experiment", "register_models"):
        assert re.search(rf"^ *# .*\n *{key}: ", text, re.MULTILINE), f"no line above {key} says why"


def test_every_k_is_in_the_loss_and_four_of_them_measure_it():
    training = parse("name: a\ndata: {path: planted}\ntraining: {k_levels: 'all:100'}").training
    assert training.loss_levels == tuple(range(1, 101))
    assert training.levels == (13, 25, 50, 100)
    assert TrainingConfig(k_levels="all:2").levels == (1, 2)
    assert TrainingConfig(k_levels=[4, 8]).levels == TrainingConfig(k_levels=[4, 8]).loss_levels == (4, 8)


def test_the_defaults_are_the_notebooks():
    training = parse_with().training
    assert (training.learning_rate, training.expansion_factor, training.weighting) == (8e-4, 16, "uniform")
    assert (training.adam_beta1, training.adam_beta2, training.adam_eps) == (0.9, 0.999, 1e-8)
    assert (training.warmup_steps, training.decay, training.gradient_clip) == (0, "none", None)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_a_resolved_file_reads_back_to_an_equal_configuration(path):
    config = load(path)
    assert parse(config.to_yaml()) == config
    assert parse(config.to_yaml()).digest() == config.digest()


def test_overrides_are_yaml_and_reach_every_section():
    config = parse_with(
        "data.blocks=[5]", "training.epochs=7", "asha=null", "search.algorithm=optuna", "resources.gpu=0.25",
        "training.adam_eps=1e-7", "tracking.uri=http://127.0.0.1:5000", "space.expansion_factor={choice: [4]}",
    )  # fmt: skip
    assert config.data.blocks == (5,)
    assert config.training.epochs == 7
    assert config.asha is None
    assert config.resources.gpu == 0.25
    assert config.training.adam_eps == 1e-7
    assert config.tracking.uri == "http://127.0.0.1:5000"
    assert config.space["expansion_factor"].values == (4,)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.learning_rat=1", r"training\.learning_rat: no such key; did you mean learning_rate\?"),
        ("trainin.epochs=1", "trainin: no such key; did you mean training"),
        ("data.block=5", "data.block: no such key; did you mean blocks"),
        ("space.lr={choice: [1]}", "space.lr: no such training key"),
        ("space.learning_rate={loguniform: [2, 1]}", "space.learning_rate: loguniform: low 2 must be below high 1"),
        ("space.learning_rate={uniform: [1, 1]}", "low 1 must be below high 1"),
        ("space.learning_rate={loguniform: [0, 1]}", "low 0 must be above 0"),
        ("space.learning_rate={lognormal: [1, 2]}", "must be one of loguniform, uniform, quniform"),
        ("space.learning_rate={uniform: [1]}", r"must be numbers \[low, high\]"),
        ("space.learning_rate={choice: []}", "needs at least one option"),
        ("space.weighting={choice: [unifrom]}", "space.weighting: .*'uniform' or 'reverse'.*'unifrom'"),
        ("space.epochs={randint: [0, 5]}", "space.epochs: .*greater than or equal to 1.*0"),
        ("space.epochs={quniform: [1, 9, 0]}", "step 0 must be above 0"),
        ("space.epochs={uniform: [3, 9]}", r"space.epochs: uniform proposes fractions.*write randint: \[3, 10\]"),
        ("space.batch_size={loguniform: [64, 512]}", "space.batch_size: loguniform proposes fractions"),
        ("space.batch_size={quniform: [64, 512, 0.5]}", "space.batch_size: quniform proposes fractions"),
        ("space.batch_size={quniform: [64.5, 512, 1]}", "space.batch_size: .*valid integer"),
        ("space.k_levels={quniform: [4, 16, 4]}", "space.k_levels: "),
        ("space.normalize_decoder={uniform: [0, 1]}", "space.normalize_decoder: uniform proposes numbers"),
        ("space.seed={randint: [0, 99999999999999999999]}", "must lie between"),
        ("space.learning_rate={uniform: [-1e308, 1e308]}", "wider than the range of a float"),
        ("space.learning_rate={quniform: [1, 2, 1e-300]}", "step 1e-300 is too small"),
        ("training.epochs=yes", "training.epochs: must be a number, not true or false"),
        ("training.seed=off", "training.seed: must be a number, not true or false"),
        ("training.k_levels=[yes]", "training.k_levels: must be a number"),
        ("data.planted.rows=true", "data.planted.rows: must be a number"),
        ("resources.gpu=yes", "resources.gpu: must be a number"),
        ("space.learning_rate={choice: [true]}", "space.learning_rate: must be a number"),
        ("data.blocks='5,20'", r"data.blocks: '5,20' must be a list in brackets, e.g. \[5, 20\]"),
        ("training..epochs=1", "must be key=value"),
        ("space.learning_rate=" + 30 * "[" + 30 * "]", "--set .*more than 20 levels of nesting"),
        ("training.k_levels=[32, 16]", r"training.k_levels: \[32, 16\] must ascend.*write \[16, 32\]"),
        ("training.k_levels=[16, 16]", r"must ascend without repeats; write \[16\]"),
        ("training.k_levels=[]", "must ascend"),
        ("training.k_levels=every", "training.k_levels: 'every' must be a list.*or all:128"),
        ("training.k_levels=[0, 4]", r"training.k_levels.0: .*greater than or equal to 1, got 0$"),
        ("space.k_levels={choice: [[4], 'all:0']}", "space.k_levels: 'all:0' must be a list"),
        ("space.k_levels={grid: [[16], [32, 16]]}", "space.k_levels: .*must ascend"),
        ("training.epochs=abc", "training.epochs: .*valid integer.*'abc'"),
        ("training.epochs=2", "asha.grace_epochs: 3 exceeds training.epochs 2"),
        ("data.val_split=1.5", "data.val_split: .*less than 1.*1.5"),
        ("data.blocks=[5, 5]", "none twice"),
        ("resources.gpu=1.5", "resources.gpu.*1.5"),
        ("name=a/b", "name: "),
        ("search.algorithm=grid", "space.learning_rate: grid search cannot use loguniform"),
        ("training.epochs", "must be key=value"),
        ("training.epochs.x=3", "not a section"),
        ("training.epochs=[", "not YAML"),
        ("training.learning_rate=.nan", "finite"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_place(override, says):
    overrides = [override]
    if override.startswith("training.epochs.x"):
        overrides = ["training.epochs=3", override]
    with pytest.raises(ConfigError, match=says) as caught:
        parse_with(*overrides)
    assert "\n" not in str(caught.value)


def test_a_grid_counts_its_own_trials():
    config = parse_with("space={expansion_factor: {grid: [8, 16]}, weighting: {choice: [uniform, reverse]}}",
                        "search.algorithm=grid")  # fmt: skip
    assert config.n_trials_per_block() == 4
    with pytest.raises(ConfigError, match="grid has 4 combinations; write 4 or null"):
        parse(config.to_yaml(), ["search.trials_per_block=3"])


def test_k_above_hidden_dim_is_found_for_the_smallest_expansion_in_the_space():
    config = parse_with("space.expansion_factor={choice: [2, 8]}")
    config.check_width(256, 5)
    with pytest.raises(ConfigError, match=r"128 exceeds hidden_dim 64 .*lower k or raise expansion_factor \(block 5\)"):
        config.check_width(32, 5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: [", "not YAML"),
        ("- a", "must be a mapping"),
        ("name: a\nname: b\ndata: {path: x}", "'name' occurs twice"),
        ("name: a", "data: is missing"),
        ("name: a\ndata: {[1, 2]: x}", "line 2: the key is a list or mapping"),
        ("name: a\ndata: {path: x, seed: !!int abc}", "not YAML: .*'abc'"),
        ("name: a\ndata: {path: x, seed: 2026-13-45}", "data.seed: .*'2026-13-45'"),
        ("name: a\ndata: " + 3000 * "[" + 3000 * "]", "more than 20 levels of nesting"),
        ("name: a\ndata: &d {path: [*d]}", r"alias \*d is used inside its own definition"),
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + BOMB, "more than 20,000 values"),
        ("#" * (1 << 18) + "\nname: a", "larger than 256 KiB"),
    ],
)
def test_a_file_that_is_no_search_space_is_one_line(tmp_path, text, says):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no such search-space file"):
        load(tmp_path / "missing.yaml")


def test_numbers_in_scientific_notation_are_numbers():
    assert parse_with().space["learning_rate"].values == (1e-4, 4e-3)


def test_a_set_of_a_key_that_the_space_varies_is_refused_with_what_to_write_instead():
    with pytest.raises(ConfigError) as caught:
        parse_with("training.learning_rate=1e-3")
    says = str(caught.value)
    assert "space varies learning_rate, so no trial would use 0.001" in says
    assert "--set 'space.learning_rate={choice: [0.001]}'" in says
    with pytest.raises(ConfigError, match="space varies weighting"):
        parse_with("training={weighting: reverse, epochs: 5}")
    assert parse_with("space.learning_rate={choice: [0.001]}").space["learning_rate"].values == (0.001,)


def test_null_takes_a_key_out_of_the_space_so_that_its_setting_counts():
    config = parse_with("training.learning_rate=1e-3", "space.learning_rate=null")
    assert "learning_rate" not in config.space
    assert config.training.learning_rate == 1e-3
    assert parse(config.to_yaml()) == config


def test_a_file_may_state_both_a_setting_and_its_distribution():
    config = parse(SPACE + "training: {learning_rate: 5e-4}")
    assert config.training.learning_rate == 5e-4
    assert "learning_rate" in config.space


def test_a_single_block_needs_no_brackets():
    assert parse_with("data.blocks=5").data.blocks == (5,)


def test_whole_numbers_may_be_drawn_in_steps():
    config = parse_with("space.epochs={quniform: [4, 10, 4]}")
    assert config.corners("epochs") == (4, 8)


def test_merge_keys_bring_a_mappings_keys_and_those_written_beside_them_win():
    config = parse(
        """
name: 2026-11-27
data: {path: planted, planted: &small {rows: 1000, input_dim: 8}}
space: {learning_rate: &rate {choice: [1e-3, 2e-3]}, adam_eps: {<<: *rate}}
"""
    )
    assert config.name == "2026-11-27"
    assert config.space["adam_eps"] == config.space["learning_rate"]
    merged = parse("name: a\ndata: {path: x}\ntraining: {<<: {epochs: 4, aux_k: 8}, epochs: 6}").training
    assert (merged.epochs, merged.aux_k) == (6, 8)
    with pytest.raises(ConfigError, match="line 3: key 'epochs' occurs twice"):
        parse("name: a\ndata: {path: x}\ntraining: {epochs: 4, <<: {aux_k: 8}, epochs: 6}")


def test_messages_cut_long_values():
    with pytest.raises(ConfigError) as caught:
        parse_with(f"training.epochs={'x' * 5000}")
    assert len(str(caught.value)) < 300


def test_built_in_data_never_registers_under_the_name_of_real_models():
    assert parse_with().tracking.model_name == "msae"
    planted = parse_with("data.path=planted")
    assert planted.tracking.model_name == "planted"
    assert parse(planted.to_yaml()) == planted
    assert parse_with("data.path=planted", "tracking.model_name=msae").tracking.model_name == "planted"
    assert parse_with("data.path=planted", "tracking.model_name=toy").tracking.model_name == "toy"
    with pytest.raises(ConfigError, match=r"tracking\.model_name: "):
        parse_with("tracking.model_name=a/b")


def test_the_quickstart_registers_under_its_own_name():
    assert load(next(path for path in SPACES if path.stem == "quickstart")).tracking.model_name == "quickstart"
    assert {load(path).tracking.model_name for path in SPACES if path.stem != "quickstart"} == {"msae"}
