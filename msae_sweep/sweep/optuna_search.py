"""Tune searcher that runs Optuna's TPE, one study per block; a resumed sweep adds earlier results to the studies."""

from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from ray.tune.search import Searcher

from msae_sweep.config import Distribution, SweepConfig
from msae_sweep.sweep.space import trial_record
from msae_sweep.sweep_folder.trial_record import TrialRecord


class BlockOptuna(Searcher):  # type: ignore[misc]
    """Searcher that proposes trials for the blocks in turn, each from the results that are known at that time.

    A sweep with `optuna` therefore repeats exactly only if it runs one trial at a time. The result of a trial with
    given settings never depends on the other trials.
    """

    def __init__(
        self,
        config: SweepConfig,
        blocks: Sequence[int],
        known: Sequence[TrialRecord],
        to_spec: Callable[[TrialRecord], dict[str, Any]],
    ) -> None:
        """Create the studies and add the results of an interrupted run to them.

        Args:
            known: trials of an interrupted run; those that have not ended are proposed first, under their numbers.
            to_spec: takes a proposed trial and returns its config for `MSAETrial`.
        """
        super().__init__()  # no metric is named: a result holds the metrics of several epochs
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._config, self._blocks, self._to_spec = config, list(blocks), to_spec
        self._options = {key: list(d.values) for key, d in config.space.items() if d.kind in ("choice", "grid")}
        self._space = {key: _to_optuna(d) for key, d in config.space.items()}
        self._studies = {
            block: optuna.create_study(
                direction="maximize", sampler=optuna.samplers.TPESampler(seed=config.search.seed + block)
            )
            for block in self._blocks
        }
        self._next = dict.fromkeys(self._blocks, 0)
        self._again = [record for record in known if not record.finished]
        self._asked: dict[str, tuple[int, optuna.trial.Trial, TrialRecord]] = {}
        for record in known:
            self._next[record.block] = max(self._next[record.block], record.index + 1)
            if record not in self._again:
                self._learn(record)

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its settings for `Tuner.restore`, which is not used here.
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial's config, or FINISHED; `trial_id` is Tune's own id."""
        if self._again:
            record = self._again.pop(0)
            study = self._studies[record.block]
            study.enqueue_trial(self._encode(record.params))
            trial = study.ask(self._space)
        else:
            block = min(self._blocks, key=lambda b: (self._next[b], self._blocks.index(b)))
            index = self._next[block]
            if index >= self._config.n_trials_per_block():
                return str(Searcher.FINISHED)
            self._next[block] += 1
            trial = self._studies[block].ask(self._space)
            record = trial_record(self._config, block, index, self._decode(trial.params))
        self._asked[trial_id] = (record.block, trial, record)
        return {"trial": self._to_spec(record)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record the epochs, so that a stopped trial counts with the best objective that it reached."""
        if trial_id in self._asked:
            self._asked[trial_id][2].add_points(result.get("points", []))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass the trial's best objective to the study, or that the trial failed."""
        block, trial, record = self._asked.pop(trial_id)
        record.add_points((result or {}).get("points", []))
        if error or not record.points:
            self._studies[block].tell(trial, state=TrialState.FAIL)
        else:
            self._studies[block].tell(trial, record.best["objective"])

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: a resumed sweep builds a new searcher from the sweep folder's records."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, for the same reason as `save`."""

    def _learn(self, record: TrialRecord) -> None:
        if record.points:
            self._studies[record.block].add_trial(
                create_trial(
                    params=self._encode(record.params), distributions=self._space, value=record.best["objective"]
                )
            )

    def _encode(self, params: dict[str, Any]) -> dict[str, Any]:
        """Replace options by their index, because Optuna's categories must be plain values and k_levels are lists."""
        listed = {key: [_tuple(option) for option in options] for key, options in self._options.items()}
        return {key: listed[key].index(_tuple(v)) if key in listed else v for key, v in params.items()}

    def _decode(self, params: dict[str, Any]) -> dict[str, Any]:
        return {key: self._options[key][v] if key in self._options else v for key, v in params.items()}


def _to_optuna(distribution: Distribution) -> BaseDistribution:
    kind, values = distribution.kind, distribution.values
    if kind in ("choice", "grid"):
        return CategoricalDistribution(list(range(len(values))))
    if kind == "randint":
        return IntDistribution(values[0], values[1] - 1)
    if kind == "quniform":
        return FloatDistribution(values[0], distribution.largest, step=values[2])
    return FloatDistribution(values[0], values[1], log=kind == "loguniform")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
