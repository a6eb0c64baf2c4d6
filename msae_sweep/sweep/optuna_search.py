"""Optuna's TPE, one study a block, as a Tune searcher; a resumed sweep tells the studies what was already found."""

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
    """Proposes trials for the blocks in turn; what it proposes depends on the results known when it is asked.

    So a sweep with `optuna` repeats exactly only with one trial at a time; each trial's own result never depends on it.
    """

    def __init__(
        self,
        config: SweepConfig,
        blocks: Sequence[int],
        known: Sequence[TrialRecord],
        to_spec: Callable[[TrialRecord], dict[str, Any]],
    ) -> None:
        """`known`: trials of an interrupted run; those that have not ended are proposed first, under their numbers."""
        super().__init__()  # no metric: a result holds every epoch's, not one
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
        """The next trial's config, or FINISHED; `trial_id` is Tune's own."""
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
        """Keep the epochs, so that a stopped trial counts with the best it reached."""
        if trial_id in self._asked:
            self._asked[trial_id][2].add_points(result.get("points", []))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study the best objective, or that the trial failed."""
        block, trial, record = self._asked.pop(trial_id)
        record.add_points((result or {}).get("points", []))
        if error or not record.points:
            self._studies[block].tell(trial, state=TrialState.FAIL)
        else:
            self._studies[block].tell(trial, record.best["objective"])

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the sweep folder's records hold all that a resumed sweep tells a new searcher."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as for `save`."""

    def _learn(self, record: TrialRecord) -> None:
        if record.points:
            self._studies[record.block].add_trial(
                create_trial(
                    params=self._encode(record.params), distributions=self._space, value=record.best["objective"]
                )
            )

    def _encode(self, params: dict[str, Any]) -> dict[str, Any]:
        """Options by their number, because Optuna's categories must be plain values and k_levels are lists."""
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
