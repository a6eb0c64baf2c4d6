"""Tests of the advice for trials whose best settings are known: they are found, or stated not to be known."""

import math

import numpy as np
import pytest
from report_sweeps import make, settings

from msae_sweep import report
from msae_sweep.config import load
from msae_sweep.report.next_space import Advice, advise
from msae_sweep.report.response_surface import NoFit, Response, choose_sample, fit_response
from msae_sweep.report.sweep_data import Sweep, read
from msae_sweep.sweep.space import plan

BEST = 1.5e-3
EXPONENT = -0.7


def known(params: dict, epoch: int) -> float:
    """Return an objective that is best at learning rate 1.5e-3 for expansion 8.

    The best learning rate moves with the size to the power of −0.7, and weighting `reverse` is 0.02 better.
    """
    shift = EXPONENT * math.log(params["expansion_factor"] / 8)
    off = math.log(params["learning_rate"] / BEST) - shift
    better = 0.02 * (params["weighting"] == "reverse") + 0.03 * (params["expansion_factor"] == 8)
    return 0.8 - 0.03 * off**2 + better - 0.05 / epoch


def sweep_of(tmp_path, n: int, score=known, seed: int = 0, **more) -> Sweep:
    return read(make(tmp_path / "made-up", settings(n, seed), score, **more).path)


def response_of(sweep: Sweep) -> Response:
    response = fit_response(sweep.groups[0])
    assert isinstance(response, Response)
    return response


def next_config(tmp_path, advice: Advice):
    path = tmp_path / "next.yaml"
    path.write_text(advice.yaml)
    return load(path)


def test_a_known_optimum_and_its_scaling_with_size_are_found(tmp_path):
    response = response_of(sweep_of(tmp_path, 30))
    assert response.is_trusted
    assert response.optimum == pytest.approx(BEST, rel=0.05)  # the best trial has expansion 8
    assert response.size_exponent[1] == pytest.approx(EXPONENT, abs=0.05)
    weighting = next(effect for effect in response.effects if effect.key == "weighting")
    assert weighting.change == pytest.approx(0.02, abs=0.003)
    assert response.effects[0].key == "learning_rate"


def test_with_noise_the_interval_covers_the_optimum_and_is_wider(tmp_path):
    def with_noise(params, epoch):
        rng = np.random.default_rng(int(params["learning_rate"] * 1e12) % 2**32)
        return known(params, epoch) + rng.normal(0, 0.02)

    clean, rough = response_of(sweep_of(tmp_path / "a", 30)), response_of(sweep_of(tmp_path / "b", 30, with_noise))
    assert rough.interval[0] < BEST < rough.interval[1]
    assert rough.interval[1] / rough.interval[0] > clean.interval[1] / clean.interval[0]
    assert rough.error == pytest.approx(0.02, rel=0.5)


def test_the_next_range_is_drawn_in_around_a_known_optimum_and_the_better_weighting_kept(tmp_path):
    sweep = sweep_of(tmp_path, 30, blocks=(5, 20))
    config = next_config(tmp_path, advise(sweep))
    low, high = config.space["learning_rate"].values
    assert low < BEST < high
    assert high / low < 10
    assert "weighting" not in config.space
    assert config.training.weighting == "reverse"
    assert config.search.seed == sweep.config.search.seed + 1
    assert config.name == "made-up-2"
    assert len(plan(config, [5, 20])) == 60


def test_an_optimum_beyond_the_edge_moves_the_range(tmp_path):
    def rising(params, epoch):
        return 0.5 + 0.05 * math.log(params["learning_rate"] / 1e-4)

    sweep = sweep_of(tmp_path, 20, rising)
    advice = advise(sweep)
    tried = max(trial.training.learning_rate for trial in sweep.groups[0].trials)
    assert next_config(tmp_path, advice).space["learning_rate"].values[1] > 2 * tried
    assert "beyond the highest one tried" in advice.responses[0].sentence


def test_a_falling_score_moves_the_range_down(tmp_path):
    def falling(params, epoch):
        return 0.5 - 0.05 * math.log(params["learning_rate"] / 1e-4)

    sweep = sweep_of(tmp_path, 20, falling)
    tried = min(trial.training.learning_rate for trial in sweep.groups[0].trials)
    assert next_config(tmp_path, advise(sweep)).space["learning_rate"].values[0] < tried / 2


@pytest.mark.parametrize("n", [1, 3, 5])
def test_too_few_trials_are_said_to_be_too_few_and_the_range_is_widened(tmp_path, n):
    sweep = sweep_of(tmp_path, n)
    advice = advise(sweep)
    assert isinstance(advice.responses[0], NoFit)
    rates = [trial.training.learning_rate for trial in sweep.groups[0].trials]
    low, high = next_config(tmp_path, advice).space["learning_rate"].values
    assert low < min(rates) / 1.5
    assert high > max(rates) * 1.5
    assert any("widened" in reason for reason in advice.reasons)


def test_noise_is_rarely_taken_for_a_response(tmp_path):
    rng = np.random.default_rng(0)
    responses = [
        advise(sweep_of(tmp_path / str(i), 12, lambda params, epoch: rng.normal(), epochs=1, seed=i)).responses[0]
        for i in range(30)
    ]
    assert sum(response.is_trusted for response in responses) <= 3
    untrusted = next(response for response in responses if not response.is_trusted)
    assert untrusted.optimum is None
    assert "nothing is concluded" in untrusted.sentence


def test_scores_that_do_not_differ_are_no_response(tmp_path):
    advice = advise(sweep_of(tmp_path, 12, lambda params, epoch: 0.5))
    assert not advice.responses[0].is_trusted
    assert set(next_config(tmp_path, advice).space) == {"learning_rate", "expansion_factor", "weighting"}


def test_where_few_trials_came_to_their_end_scores_are_compared_at_a_rung(tmp_path):
    sweep = sweep_of(tmp_path, 40, epochs=10, asha="{grace_epochs: 2, reduction_factor: 3}")
    group = sweep.groups[0]
    completed = [trial for trial in group.trials if trial.record.status == "completed"]
    assert len(completed) < 8  # otherwise this test would check nothing
    response = response_of(sweep)
    assert response.epoch in group.early_stopping.rungs
    assert response.n_trials > len(completed)
    assert response.optimum == pytest.approx(BEST, rel=0.1)
    assert "scores so early favour high learning rates" in response.sentence


def test_a_weighting_is_dropped_for_what_it_is_at_the_end_not_at_a_rung(tmp_path):
    ended = advise(sweep_of(tmp_path / "a", 40))
    assert ended.responses[0].epoch is None
    assert "weighting" not in next_config(tmp_path, ended).space
    early = advise(sweep_of(tmp_path / "b", 40, epochs=10, asha="{grace_epochs: 2, reduction_factor: 3}"))
    assert early.responses[0].is_trusted
    assert early.responses[0].epoch is not None
    assert set(next_config(tmp_path, early).space["weighting"].values) == {"uniform", "reverse"}


def test_one_disaster_does_not_bend_the_fit(tmp_path):
    params = [p for p in settings(40) if 5e-4 < p["learning_rate"] < 5e-3]
    params[3]["learning_rate"] = 9e-3

    def with_disaster(p, epoch):
        return -40.0 if p["learning_rate"] == 9e-3 else known(p, epoch)

    response = response_of(read(make(tmp_path / "s", params, with_disaster).path))
    assert response.optimum == pytest.approx(BEST, rel=0.05)
    assert "without 1 far below the rest" in response.sentence


def test_a_larger_size_is_added_where_the_largest_is_clearly_best(tmp_path):
    advice = advise(sweep_of(tmp_path, 30))  # expansion 8 is 0.03 better than 4
    assert next_config(tmp_path, advice).space["expansion_factor"].values == (4, 8, 16)


def test_more_epochs_are_proposed_only_while_the_best_trial_rises(tmp_path):
    rising = sweep_of(tmp_path / "a", 6, lambda params, epoch: known(params, epoch) + 0.01 * epoch)
    level = sweep_of(tmp_path / "b", 6, lambda params, epoch: known(params, 1))
    assert next_config(tmp_path, advise(rising)).training.epochs == 2 * rising.config.training.epochs
    assert next_config(tmp_path, advise(level)).training.epochs == level.config.training.epochs


def test_a_grid_becomes_a_random_search_over_the_proposed_range(tmp_path):
    space = "{learning_rate: {grid: [1e-4, 1e-3]}}"
    sweep = sweep_of(tmp_path, 2, space=space)
    text = sweep.folder.config_file.read_text().replace("algorithm: random", "algorithm: grid")
    sweep.folder.config_file.write_text(text)
    config = next_config(tmp_path, advise(read(sweep.folder.path)))
    assert config.search.algorithm == "random"
    assert config.space["learning_rate"].kind == "loguniform"


def test_names_count_on(tmp_path):
    first = make(tmp_path / "study", settings(3), known)
    assert advise(read(first.path)).name == "study-2"
    assert advise(read(make(tmp_path / "study-2", settings(3), known).path)).name == "study-3"


SHARED = 1e-3


def mostly_at_one_rate(rng: np.random.Generator, n: int, others: int = 1) -> list[dict]:
    """Return settings that share one learning rate, except for the first `others` of them."""
    drawn = [{**p, "learning_rate": SHARED} for p in settings(n, int(rng.integers(100)))]
    for i in range(others):
        drawn[i]["learning_rate"] = 9e-3 - 1e-3 * i
    return drawn


def test_trials_that_share_one_learning_rate_are_said_to_and_nothing_is_fitted(tmp_path):
    # The trial with another rate is so far below the rest that it is left out of the fit.
    params = mostly_at_one_rate(np.random.default_rng(0), 12)
    scores = np.random.default_rng(1).normal(0.5, 0.01, 12)

    def score(p, epoch):
        return -50.0 if p["learning_rate"] != SHARED else float(scores[params.index(p)])

    sweep = read(make(tmp_path / "made-up", params, score).path)
    advice = advise(sweep)
    assert isinstance(advice.responses[0], NoFit)
    assert "the 11 trials that can be compared share one learning rate, 0.001" in advice.responses[0].sentence
    assert "share one learning rate" in advice.reasons[0]
    assert report.write([sweep.folder.path]).page


def test_where_only_one_rate_was_completed_scores_are_compared_at_a_rung_that_others_reached(tmp_path):
    params = settings(24)
    for p in params[6:]:
        p["learning_rate"] = SHARED

    def score(p, epoch):  # trials with other rates than the shared one are stopped at the last rung
        return known(p, epoch) - (0.2 if p["learning_rate"] != SHARED and epoch > 1 else 0)

    params = params[6:8] + params[:6] + params[8:]
    sweep = read(make(tmp_path / "s", params, score, epochs=8, asha="{grace_epochs: 1, reduction_factor: 2}").path)
    group = sweep.groups[0]
    assert {t.training.learning_rate for t in group.ended if t.record.status == "completed"} == {SHARED}
    sample = choose_sample(group, needed=4)
    assert len({trial.training.learning_rate for trial in sample.trials}) > 1
    fit_response(group)


@pytest.mark.parametrize("offset", [0.0, -5.0])
def test_two_learning_rates_have_their_best_at_an_end(tmp_path, offset):
    params = [{**p, "learning_rate": rate} for p in settings(10) for rate in (1e-3, 2e-3)]
    response = fit_response(
        read(make(tmp_path / "s", params, lambda p, e: 50 * p["learning_rate"] + offset).path).groups[0]
    )
    assert isinstance(response, Response)
    assert "lies at or beyond the highest one tried, 0.002" in response.sentence


def test_a_learning_rate_that_the_space_fixes_stays_and_nothing_else_is_said(tmp_path):
    params = [{k: v for k, v in p.items() if k != "learning_rate"} for p in settings(12)]
    space = "{expansion_factor: {choice: [4, 8]}, weighting: {choice: [uniform, reverse]}}"
    sweep = read(make(tmp_path / "s", params, lambda p, e: 0.01 * p["expansion_factor"], space=space).path)
    advice = advise(sweep)
    assert advice.responses[0].sentence == "Block 5: every trial has learning rate 0.0008, so nothing is fitted."
    of_rate = [reason for reason in advice.reasons if reason.startswith("Learning rate")]
    assert len(of_rate) == 1
    assert "stays fixed at 0.0008" in of_rate[0]
    config = next_config(tmp_path, advice)
    assert "learning_rate" not in config.space
    assert config.training.learning_rate == sweep.config.training.learning_rate


def test_shares_with_what_no_setting_explains_alone_sum_to_one(tmp_path):
    def with_noise(params, epoch):
        rng = np.random.default_rng(int(params["learning_rate"] * 1e12) % 2**32)
        return known(params, epoch) + rng.normal(0, 0.06)

    response = response_of(sweep_of(tmp_path, 30, with_noise))
    assert 0.05 < response.unexplained < 0.6
    shares = sum(effect.share for effect in response.effects)
    assert shares + response.joint_share + response.unexplained == pytest.approx(1)
    assert shares < 0.95
