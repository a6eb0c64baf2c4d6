import warnings

import numpy as np
import pytest

from msae_sweep.config import Distribution, parse
from msae_sweep.sweep.space import plan, sample
from msae_sweep.sweep_folder.trial_record import TrialRecord, ranked

SPACE = """
name: test
data: {path: somewhere}
space:
  learning_rate: {loguniform: [1e-4, 1e-2]}
  expansion_factor: {choice: [8, 16, 32]}
  weighting: {choice: [uniform, reverse]}
search: {trials_per_block: 5}
"""


def draws(raw: dict, n: int = 2000) -> np.ndarray:
    distribution = Distribution.model_validate(raw)
    return np.array([sample(distribution, 0, index, "learning_rate") for index in range(n)])


def test_loguniform_is_uniform_in_the_logarithm():
    values = draws({"loguniform": [1e-4, 1e-2]})
    assert values.min() >= 1e-4
    assert values.max() <= 1e-2
    assert np.median(np.log10(values)) == pytest.approx(-3, abs=0.1)


def test_uniform_fills_its_range():
    values = draws({"uniform": [2, 4]})
    assert 2 <= values.min() < 2.05
    assert 3.95 < values.max() <= 4


def test_quniform_gives_multiples_of_its_step():
    assert set(draws({"quniform": [0.1, 0.5, 0.1]})) == {0.1, 0.2, 0.3, 0.4, 0.5}


@pytest.mark.parametrize(
    ("bounds", "lattice"),
    [
        ([0.1, 0.5, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5]),
        ([0.05, 0.4, 0.1], [0.05, 0.15, 0.25, 0.35]),
        ([1, 10, 4], [1, 5, 9]),
        ([0, 0.7, 0.4], [0, 0.4]),
        ([0.9, 1.2, 0.3], [0.9, 1.2]),
    ],
)
def test_quniform_is_low_and_steps_from_there_whoever_proposes(bounds, lattice):
    from msae_sweep.sweep.optuna_search import BlockOptuna

    config = parse(
        "name: a\ndata: {path: x}\nsearch: {algorithm: optuna, trials_per_block: 60}",
        [f"space.aux_coefficient={{quniform: {bounds}}}"],
    )
    search = BlockOptuna(config, [5], [], lambda record: record.params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna would warn if it shortened a range
        proposed = [search.suggest(str(i))["trial"]["aux_coefficient"] for i in range(60)]
    for values in (proposed, draws({"quniform": bounds}, 300)):
        assert sorted(set(np.round(values, 12))) == lattice


@pytest.mark.parametrize(
    ("bounds", "values"),
    [
        ([0.1, 0.5, 0.1], [0.1, 0.4, 0.3, 0.2, 0.3, 0.4]),
        ([64, 1024, 32], [64.0, 800.0, 416.0, 320.0, 416.0, 800.0]),
    ],
)
def test_quniform_from_a_multiple_of_its_step_proposes_what_it_always_did(bounds, values):
    assert list(draws({"quniform": bounds}, 6)) == values


def test_randint_excludes_its_upper_end():
    assert set(draws({"randint": [1, 4]})) == {1, 2, 3}


def test_choice_takes_every_option_about_as_often():
    _, counts = np.unique(draws({"choice": [8, 16, 32]}), return_counts=True)
    assert (counts > 550).all()


def test_a_larger_number_of_trials_adds_trials_and_changes_none():
    few, many = parse(SPACE), parse(SPACE, ["search.trials_per_block=9"])
    assert plan(many, [5, 20])[: 2 * 5] == plan(few, [5, 20])


def test_adding_a_key_to_the_space_leaves_the_other_keys_as_they_were():
    wider = parse(SPACE, ["space.aux_coefficient={uniform: [0, 1]}"])
    for a, b in zip(plan(parse(SPACE), [5]), plan(wider, [5]), strict=True):
        assert a.params.items() <= b.params.items()
        assert a.seed == b.seed


def test_a_trial_has_the_same_settings_in_every_block_and_a_seed_of_its_own():
    records = plan(parse(SPACE), [5, 20])
    assert [r.trial_id for r in records[:4]] == ["block5-000", "block20-000", "block5-001", "block20-001"]
    assert records[0].params == records[1].params
    assert len({r.seed for r in records}) == len(records)


def test_a_block_swept_alone_gets_the_same_trials():
    together = [r for r in plan(parse(SPACE), [5, 20, 35]) if r.block == 20]
    assert plan(parse(SPACE), [20]) == together


def test_another_search_seed_gives_other_trials():
    other = plan(parse(SPACE, ["search.seed=1"]), [5])
    for a, b in zip(plan(parse(SPACE), [5]), other, strict=True):
        assert a.params["learning_rate"] != b.params["learning_rate"]
        assert a.seed != b.seed


def test_a_grid_runs_every_combination_once():
    config = parse(SPACE, ["space.learning_rate={grid: [1e-3, 2e-3]}", "search={algorithm: grid}"])
    records = plan(config, [5])
    assert len({tuple(r.params.items()) for r in records}) == len(records) == 2 * 3 * 2


def test_a_grid_key_in_a_random_search_is_walked_through():
    config = parse(SPACE, ["space.weighting={grid: [uniform, reverse]}", "search.trials_per_block=4"])
    assert [r.params["weighting"] for r in plan(config, [5])] == ["uniform", "reverse"] * 2


def test_a_seed_in_the_space_is_the_trials_seed():
    config = parse(SPACE, ["space.seed={grid: [1, 2, 3]}", "search.trials_per_block=3"])
    assert [r.seed for r in plan(config, [5])] == [1, 2, 3]


def test_k_levels_can_vary():
    config = parse(SPACE, ["space.k_levels={grid: [[16], [16, 32]]}", "search.trials_per_block=2"])
    assert [r.training(config.training).k_levels for r in plan(config, [5])] == [(16,), (16, 32)]


def test_a_record_survives_its_file():
    record = plan(parse(SPACE), [5])[0]
    record.add_points([{"epoch": 1, "objective": 0.5}])
    assert TrialRecord.from_json(record.to_json()) == record


def test_epochs_reported_twice_count_once():
    record = plan(parse(SPACE), [5])[0]
    record.add_points([{"epoch": 1, "objective": 0.5}, {"epoch": 2, "objective": 0.6}])
    assert record.add_points([{"epoch": 2, "objective": 0.6}, {"epoch": 3, "objective": 0.4}]) == [
        {"epoch": 3, "objective": 0.4}
    ]
    assert (record.epochs, record.best["epoch"]) == (3, 2)


def test_ranking_is_by_the_best_epoch_and_leaves_out_what_was_never_measured():
    a, b, c = plan(parse(SPACE), [5])[:3]
    a.add_points([{"epoch": 1, "objective": 0.9}, {"epoch": 2, "objective": 0.1}])
    b.add_points([{"epoch": 1, "objective": 0.95}])
    assert ranked([a, b, c]) == [b, a]
