"""Recommendation of an MSAE for each block, with the reasons in plain words."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from msae_sweep.report.sweep_data import Group, Sweep, Trial
from msae_sweep.sweep_folder.summary import Criterion

CLOSE = 0.01
"""Largest gap in score at which a smaller MSAE is still named as the cheaper choice; chosen by eye."""


class Recommendation(NamedTuple):
    """Recommendation for one block."""

    block: int
    sweep: Sweep
    group: Group
    claim: str
    """Sentence with the most important numbers, without its subject."""
    reasons: list[str]
    """Sentences with the reasons for this trial, and with points against it."""

    @property
    def trial(self) -> Trial:
        """Recommended trial."""
        return self.group.best

    @property
    def failed(self) -> list[Criterion]:
        """Success criteria that the recommended trial fails."""
        return [criterion for criterion in self.group.criteria if not criterion.passed]

    @property
    def verdict(self) -> str:
        """Verdict on the success criteria, e.g. `passes all 3 criteria` or `fails 1 of 3 criteria`."""
        n = len(self.group.criteria)
        return f"fails {len(self.failed)} of {n} criteria" if self.failed else f"passes all {n} criteria"

    @property
    def model(self) -> str:
        """Path or URI of the model file: under `models/` if the sweep has put it there, else in the trial's folder."""
        trial_id = self.trial.trial_id
        known = self.sweep.winners.get(self.block) == trial_id
        return f"{self.sweep.folder}/{f'models/msae_block{self.block}' if known else f'trials/{trial_id}/model'}.pt"


def recommendations(sweeps: Sequence[Sweep]) -> list[Recommendation]:
    """Return a recommendation for every block, in the sweeps' order of blocks.

    A recommended trial is the best one of all sweeps whose scores can be compared.
    """
    blocks = dict.fromkeys(block for sweep in sweeps for block in sweep.blocks)
    return [_answer(block, sweeps) for block in blocks]


def matryoshka(sweep: Sweep, block: int) -> list[Group]:
    """Return a block's groups with several levels, or all of its groups if none has several levels."""
    groups = sweep.groups_of(block)
    return [group for group in groups if len(group.levels) > 1] or groups


def baselines(sweeps: Sequence[Sweep], block: int, like: Sweep) -> list[Trial]:
    """Return, for every k, the best SAE that was trained for this k alone, on the same data as the sweep `like`."""
    best: dict[int, Trial] = {}
    for sweep in (sweep for sweep in sweeps if sweep is like or same_validation_rows(sweep, like, block)):
        for group in sweep.groups_of(block):
            (k, *more), trial = group.levels, group.best
            if not more and (k not in best or trial.best["objective"] > best[k].best["objective"]):
                best[k] = trial
    return [best[k] for k in sorted(best)]


def same_validation_rows(a: Sweep, b: Sweep, block: int) -> bool:
    """Return whether two sweeps measured a block's R² on the same validation rows; False if that is not known."""
    keys = {sweep.manifests.get(block, {}).get("key") for sweep in (a, b)}
    return len(keys) == 1 and None not in keys


def _answer(block: int, sweeps: Sequence[Sweep]) -> Recommendation:
    offers = [(sweep, group) for sweep in sweeps for group in matryoshka(sweep, block)]
    # Prefer several levels to a single one, whatever the scores, because their scores cannot be compared.
    first_sweep, first = next((offer for offer in offers if len(offer[1].levels) > 1), offers[0])
    rivals = [
        (s, g)
        for s, g in offers
        if g.levels == first.levels and (s is first_sweep or same_validation_rows(s, first_sweep, block))
    ]
    sweep, group = max(rivals, key=lambda offer: offer[1].best.best["objective"])
    trial, n = group.best, sum(len(g.trials) for _, g in rivals)
    at = dict(zip(group.levels, trial.r2, strict=True))
    low, high = group.levels[0], group.levels[-1]
    claim = f"explains {at[high]:.1%} of the variance with {high} latents in use"
    if low != high:
        claim += f", and still {at[low]:.1%} with {low}"
    dead = trial.best["dead_ratio"]
    claim += f"; {f'{dead:.1%}' if dead else 'none'} of its latents {'are' if dead else 'is'} dead."
    reasons = _reasons(group, rivals, n)
    if low != high and (against := _against(at, baselines(sweeps, block, sweep))):
        reasons.append(against)
    return Recommendation(block, sweep, group, claim, reasons)


def _against(at: Mapping[int, float], alone: Sequence[Trial]) -> str:
    """Return a sentence that compares a trial with the SAEs that were trained for one of its levels alone.

    Args:
        at: R² of the trial by level.
        alone: SAEs that were trained for one k alone.

    Returns:
        "" if no SAE has one of the trial's levels.
    """
    gaps = {t.levels[0]: at[t.levels[0]] - t.r2[0] for t in alone if t.levels[0] in at}
    if not gaps:
        return ""
    ahead, (k, gap) = sum(gap > 0 for gap in gaps.values()), min(gaps.items(), key=lambda item: item[1])
    text = f"It is better than the SAE trained for one k alone at {ahead} of {len(gaps)} levels"
    return f"{text}; the {'smallest lead' if gap > 0 else 'largest deficit'} is {abs(gap):.3f}, at k={k}."


def _reasons(group: Group, rivals: Sequence[tuple[Sweep, Group]], n: int) -> list[str]:
    trial = group.best
    score, others = (
        trial.best["objective"],
        sorted((t for _, g in rivals for t in g.ended if t is not trial), key=lambda t: -t.best["objective"]),
    )
    reasons = [
        f"Its score, {score:.4f}, is the highest of {n} trials"
        if n > 1
        else f"It is the only trial (score {score:.4f})"
    ]
    if others:
        gap = score - others[0].best["objective"]
        reasons[0] += f"; {others[0].trial_id} comes next, {gap:.4f} behind"
    reasons[0] += "."
    passed = [criterion for criterion in group.criteria if criterion.passed]
    if len(passed) == len(group.criteria):
        reasons.append(f"It passes all {len(passed)} success criteria.")
    else:
        failed = [c for c in group.criteria if not c.passed]
        reasons.append(f"It fails: {'; '.join(f'{c.name} (the value is {c.value:.3f})' for c in failed)}.")
    size = trial.hidden_dim
    smaller = [t for t in others if t.hidden_dim and size and t.hidden_dim < size]
    if smaller and (gap := score - smaller[0].best["objective"]) <= CLOSE:
        reasons.append(
            f"If size matters, consider {smaller[0].trial_id} with {smaller[0].hidden_dim} latents, {gap:.4f} behind."
        )
    if trial.still_rising:
        reasons.append(f"Its mean R² was still rising: {trial.late_gain}. What more epochs would add is not known.")
    return reasons
