"""Builds a report from sweeps, with everything that the page shows."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from msae_sweep.report import figures, score_figures
from msae_sweep.report.curves import MOST_PRODUCTS_AT_ONCE, Curves, curves
from msae_sweep.report.figures import Line
from msae_sweep.report.next_space import Advice, advise
from msae_sweep.report.page import Report, Section
from msae_sweep.report.pca_baseline import MOST_PRODUCTS_AT_ONCE as MOST_PRODUCTS_OF_PCA
from msae_sweep.report.pca_baseline import PcaBaselines, pca_baselines
from msae_sweep.report.recommendation import Recommendation, baselines, matryoshka, recommendations
from msae_sweep.report.response_surface import Response
from msae_sweep.report.style import Draw, Drawing, Job, draw_in_process
from msae_sweep.report.sweep_data import Group, Sweep, Trial


class _Plan(NamedTuple):
    """A section of the page whose figures are not drawn yet."""

    id: str
    heading: str
    lead: str
    jobs: list[Job]
    prefix: str = ""
    """Prefix of the figures' names."""
    note: str = ""


def build(sweeps: Sequence[Sweep], *, at_the_end: bool = False, draw: Draw = draw_in_process) -> Report:
    """Build the report: choose the recommended trials, fit the responses, measure R² at every k, and draw the figures.

    Besides `sweeps`, only prepared rows, models and the caches of what was measured are read.

    Args:
        at_the_end: leave out measurements that would delay a sweep's end; see `MOST_PRODUCTS_AT_ONCE` in `curves` and
            `pca_baseline`.
        draw: function that starts to draw figures. It is called first for the figures that do not need R² at every k,
            which is measured meanwhile.
    """
    found = recommendations(sweeps)
    advice = {sweep.label: advise(sweep) for sweep in sweeps if any(_is_matryoshka(group) for group in sweep.groups)}
    many = len(sweeps) > 1
    scores = {sweep.label: _scores(sweep, many=many) for sweep in sweeps}
    courses = {sweep.label: _course(sweep, many=many) for sweep in sweeps}
    fits = [_fits(sweep, advice[sweep.label], many=many) for sweep in sweeps if sweep.label in advice]
    begun = _begin([*_joined(scores), *_joined(courses), *fits], draw)
    most = MOST_PRODUCTS_AT_ONCE if at_the_end else float("inf")
    measured = {sweep.label: curves(sweep, most_products=most) for sweep in sweeps}
    most = MOST_PRODUCTS_OF_PCA if at_the_end else float("inf")
    components = {
        sweep.label: pca_baselines(sweep.folder, sweep.config.storage, sweep.manifests, most_products=most)
        for sweep in sweeps
    }
    limits = {label: _limits(measured[label], components[label]) for label in measured}
    at_every_k = _curves(sweeps, found, measured, components, limits)
    weightings = {s.label: _weightings(s, measured[s.label], components[s.label], many=many) for s in sweeps}
    begun_later = _begin([at_every_k, *_joined(weightings)], draw)
    sections = begun() | begun_later()
    order = [
        at_every_k,
        *(p for s in sweeps for plans in (scores, weightings, courses) for p in plans[s.label]),
        *fits,
    ]
    shown = [sections[p.id] for p in order if sections[p.id].drawings]
    return Report(list(sweeps), found, shown, components, limits, advice)


def _joined(plans: dict[str, list[_Plan]]) -> Iterator[_Plan]:
    return itertools.chain.from_iterable(plans.values())


def _begin(plans: Sequence[_Plan], draw: Draw) -> Callable[[], dict[str, Section]]:
    """Start to draw the figures. The returned function waits for them and returns the sections by ID."""
    drawings = draw([job for plan in plans for job in plan.jobs])

    def ended() -> dict[str, Section]:
        left = iter(drawings())
        sections = {}
        for plan in plans:
            kept = [drawing for drawing in itertools.islice(left, len(plan.jobs)) if drawing is not None]
            kept = [_renamed(drawing, plan.prefix) for drawing in kept]
            sections[plan.id] = Section(plan.id, plan.heading, plan.lead, kept, plan.note)
        return sections

    return ended


def _is_matryoshka(group: Group) -> bool:
    return len(group.levels) > 1


def _limits(measured: Curves, components: PcaBaselines) -> dict[int, str]:
    """Return what could not be measured and why, by block."""
    texts: dict[int, str] = {}
    for block in dict.fromkeys((*measured.missing, *components.missing)):
        curve, pca = measured.missing.get(block), components.missing.get(block)
        if curve == pca:
            texts[block] = f"R² at the trained levels only, without principal components; {curve}"
            continue
        parts = [f"R² at the trained levels only; {curve}"] if curve else []
        parts += [f"no principal components; {pca}"] if pca else []
        texts[block] = "; ".join(parts)
    return texts


def _curves(
    sweeps: Sequence[Sweep],
    found: Sequence[Recommendation],
    measured: dict[str, Curves],
    components: dict[str, PcaBaselines],
    limits: dict[str, dict[int, str]],
) -> _Plan:
    jobs: list[Job] = []
    uneven: dict[str, list[str]] = defaultdict(list)
    many = len(sweeps) > 1
    for answer in found:
        offers = [(s, g) for s in sweeps for g in matryoshka(s, answer.block) if _is_matryoshka(g)]
        # The recommended trial comes first, because the figure's sentence describes the first line.
        offers.sort(key=lambda offer: offer[1].best is not answer.trial)
        lines = [
            Line(
                f"{sweep.label}: {group.best.shown_as}" if many else group.best.shown_as,
                measured[sweep.label].by_trial[group.best.trial_id],
                group.levels,
            )
            for sweep, group in offers
        ]
        alone = baselines(sweeps, answer.block, answer.sweep)
        if lines:
            stopped = {t.levels[0]: t.record.epochs for t in alone if t.record.status == "stopped_early"}
            baseline = {t.levels[0]: t.r2[0] for t in alone}
            pca = components[answer.sweep.label].by_block.get(answer.block, ())
            jobs.append(partial(figures.r2_by_k, answer.block, lines, baseline, stopped, pca))
        if lines and alone and (why := _uneven(sweeps, answer, alone)):
            uneven[why].append(str(answer.block))
    notes = [f"Block {', '.join(blocks)}: {why}" for why, blocks in uneven.items()]
    for label, of_sweep in limits.items():
        where = f"{label}, block" if many else "Block"
        notes += [f"{where} {block}: {text}." for block, text in of_sweep.items()]
    lead = (
        "For every k, the k strongest latents of a row reconstruct it, so one MSAE has an R² at every k. The figures "
        "show the best MSAE of each block on its validation rows. Markers are the trained levels. The dashed grey line "
        "is what an MSAE must beat: k principal components of the training rows, measured on the same validation rows."
    )
    return _Plan("r2", "Variance explained with k latents", lead, jobs, note=" ".join(notes))


def _uneven(sweeps: Sequence[Sweep], answer: Recommendation, alone: Sequence[Trial]) -> str:
    """Return how trials and epochs differ between the MSAE and the SAEs for one k; "" if they are the same."""
    groups = [group for sweep in sweeps for group in sweep.groups_of(answer.block)]
    spent = sorted({(len(g.trials), g.best.training.epochs) for g in groups if any(g.best is t for t in alone)})
    of_msae = len(answer.group.trials), answer.trial.training.epochs
    if spent == [of_msae]:
        return ""
    ways = " or ".join(f"{n} trial{'s' if n > 1 else ''} of {epochs} epochs" for n, epochs in spent)
    return (
        f"the comparison is uneven, because each SAE for one k alone is the best of {ways}, "
        f"but the MSAE is the best of {of_msae[0]} trial{'s' if of_msae[0] > 1 else ''} of {of_msae[1]} epochs."
    )


def _scores(sweep: Sweep, *, many: bool) -> list[_Plan]:
    """Plan the sections with the trials' scores.

    SAEs for one k alone are left out here and in the sections below. The page shows them only in its table and its
    curves.
    """
    score = (
        "The score is R² averaged over the trained levels, minus any share of dead latents above 30%. The vertical "
        "axis shows 1 − score on a logarithmic scale, so that the best trials, at the bottom, can be distinguished."
    )
    weights = (
        "Filled markers are trials that weight small k more (reverse); hollow ones weight all levels equally (uniform)."
    )
    return _plans(
        sweep,
        many,
        ("learning-rate", "Learning rate", f"{score} {weights}", score_figures.learning_rate),
        (
            *("size", "Effect of more latents"),
            "1 − mean R² against the number of latents: lower is better. No smaller trial beats those on the line.",
            score_figures.against_size,
        ),
        (
            *("dead", "Dead latents"),
            "A high R² can hide latents that never fire: the best trials are at the bottom left.",
            score_figures.against_dead,
        ),
    )


def _weightings(sweep: Sweep, measured: Curves, components: PcaBaselines, *, many: bool) -> list[_Plan]:
    lead = (
        "The reverse weighting puts more weight on small k in training: it should be better at small k, and may be "
        "worse at large k."
    )
    groups = [group for group in sweep.groups if _is_matryoshka(group)]
    jobs: list[Job] = [
        partial(figures.weightings, group, measured.by_trial, components.by_block.get(group.block, ()))
        for group in groups
    ]
    return [_plan(sweep, many, "weighting", "Uniform and reverse weighting", lead, jobs)] if groups else []


def _course(sweep: Sweep, *, many: bool) -> list[_Plan]:
    """Plan the sections on the course of the trials: early stopping and training."""
    plans = _plans(
        sweep,
        many,
        (
            *("early-stopping", "Early stopping"),
            "At each dotted epoch (rung) before its own last epoch, a trial is compared with the trials of smaller "
            "number. A bar ends at the last epoch that its trial trained. The number beside a stopped trial is its "
            "shortfall: how much higher its score would have had to be to continue.",
            figures.early_stopping,
        ),
    )
    if groups := [group for group in sweep.groups if _is_matryoshka(group)]:
        lead = "Metrics of each epoch, as in the notebook. The marker is the epoch that the model is from."
        jobs: list[Job] = [partial(figures.training, groups, key) for key in figures.TRAINING]
        plans.append(_plan(sweep, many, "training", "Training of the best trials", lead, jobs))
    return plans


def _fits(sweep: Sweep, advice: Advice, *, many: bool) -> _Plan:
    jobs: list[Job] = [
        partial(score_figures.fitted_learning_rate, response)
        for response in advice.responses
        if isinstance(response, Response)
    ]
    lead = (
        "A simple curve fitted to the trials, drawn as 1 − score (lower is better). Its lowest point estimates the "
        "best learning rate."
    )
    return _plan(sweep, many, "fit", "Best learning rate, fitted", lead, jobs)


def _plans(sweep: Sweep, many: bool, *sections: tuple[str, str, str, Callable[[Group], Drawing | None]]) -> list[_Plan]:
    """Plan sections from tuples (id, heading, lead, figure), with one figure per group with several levels.

    If there is no such group, there are no sections.
    """
    groups = [group for group in sweep.groups if _is_matryoshka(group)]
    return [
        _plan(sweep, many, name, heading, lead, [partial(draw, group) for group in groups])
        for name, heading, lead, draw in sections
        if groups
    ]


def _plan(sweep: Sweep, many: bool, name: str, heading: str, lead: str, jobs: list[Job]) -> _Plan:
    """Plan a section about one sweep. If the page has many sweeps, heading and names contain the sweep's label."""
    suffix, prefix = (f" ({sweep.label})", f"{sweep.label}_") if many else ("", "")
    return _Plan(f"{prefix}{name}", heading + suffix, lead, jobs, prefix)


def _renamed(drawing: Drawing, prefix: str) -> Drawing:
    """Return a drawing with `prefix` in its file name and its SVG IDs, so that they are unique on the page."""
    if not prefix:
        return drawing
    svg = drawing.svg.replace(f'"{drawing.name}-', f'"{prefix}{drawing.name}-').replace(
        f"#{drawing.name}-", f"#{prefix}{drawing.name}-"
    )
    return Drawing(prefix + drawing.name, drawing.title, drawing.reading, svg, drawing.svg_file, drawing.png_file)
