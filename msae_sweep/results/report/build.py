"""From sweeps to everything that the page shows."""

from collections import defaultdict
from collections.abc import Sequence

from msae_sweep.results.report import figures
from msae_sweep.results.report.answer import Answer, answers, baselines, matryoshka
from msae_sweep.results.report.curves import Curves, curves
from msae_sweep.results.report.data import Group, Sweep, Trial
from msae_sweep.results.report.figures import Line
from msae_sweep.results.report.next_space import Advice, advise
from msae_sweep.results.report.page import Report, Section
from msae_sweep.results.report.response import Response
from msae_sweep.results.report.style import Drawing, styled


def build(sweeps: Sequence[Sweep], most_products: float = float("inf")) -> Report:
    """Read nothing more than prepared rows and models, measure and fit, draw.

    Args:
        most_products: what measuring R² at every k may cost; see `curves`.
    """
    measured = {sweep.label: curves(sweep, most_products=most_products) for sweep in sweeps}
    found = answers(sweeps)
    advice = {sweep.label: advise(sweep) for sweep in sweeps if any(_is_matryoshka(group) for group in sweep.groups)}
    with styled():
        sections = [
            _curves(sweeps, found, measured),
            *(section for sweep in sweeps for section in _of_sweep(sweep, measured[sweep.label], many=len(sweeps) > 1)),
            *(_fits(sweep, advice[sweep.label], many=len(sweeps) > 1) for sweep in sweeps if sweep.label in advice),
        ]
    return Report(list(sweeps), found, [s for s in sections if s.drawings], measured, advice)


def _is_matryoshka(group: Group) -> bool:
    return len(group.levels) > 1


def _curves(sweeps: Sequence[Sweep], found: Sequence[Answer], measured: dict[str, Curves]) -> Section:
    drawings = []
    uneven: dict[str, list[str]] = defaultdict(list)
    many = len(sweeps) > 1
    for answer in found:
        offers = [(s, g) for s in sweeps for g in matryoshka(s, answer.block) if _is_matryoshka(g)]
        # The recommended one first: the sentence is about it.
        offers.sort(key=lambda offer: offer[1].best is not answer.trial)
        lines = [
            Line(
                f"{sweep.label}: {group.best.trial_id}" if many else group.best.trial_id,
                measured[sweep.label].by_trial[group.best.trial_id],
                group.levels,
            )
            for sweep, group in offers
        ]
        alone = baselines(sweeps, answer.block, answer.sweep)
        if lines:
            drawings.append(figures.r2_by_k(answer.block, lines, {t.levels[0]: t.r2[0] for t in alone}))
        if lines and alone and (why := _uneven(sweeps, answer, alone)):
            uneven[why].append(str(answer.block))
    notes = [f"Block {', '.join(blocks)}: {why}" for why, blocks in uneven.items()]
    for label, of_sweep in measured.items():
        where = f"{label}, block" if many else "Block"
        notes += [f"{where} {block}: trained levels only; {why}." for block, why in of_sweep.missing.items()]
    lead = (
        "One sorted code gives every smaller one, so an MSAE has an R² at every k: here the best of each block on its "
        "validation rows. Markers are the levels that were trained."
    )
    return Section("r2", "How much is explained with k latents", lead, drawings, " ".join(notes))


def _uneven(sweeps: Sequence[Sweep], answer: Answer, alone: Sequence[Trial]) -> str:
    """What was spent on the SAEs for one k and on the MSAE, where it is not the same; else empty."""
    groups = [group for sweep in sweeps for group in sweep.groups_of(answer.block)]
    spent = sorted({(len(g.trials), g.best.training.epochs) for g in groups if any(g.best is t for t in alone)})
    of_msae = len(answer.group.trials), answer.trial.training.epochs
    if spent == [of_msae]:
        return ""
    ways = " or ".join(f"{n} trial{'s' if n > 1 else ''} of {epochs} epochs" for n, epochs in spent)
    return (
        f"not an even comparison: each for one k alone is the best of {ways}, "
        f"the MSAE the best of {of_msae[0]} of {of_msae[1]} epochs."
    )


def _of_sweep(sweep: Sweep, measured: Curves, *, many: bool) -> list[Section]:
    """The sections about one sweep; of SAEs for one k alone only the table and the curves above are shown."""
    groups = [group for group in sweep.groups if _is_matryoshka(group)]
    if not groups:
        return []
    suffix, prefix = (f" ({sweep.label})", f"{sweep.label}_") if many else ("", "")

    def section(name: str, heading: str, lead: str, drawings: Sequence[Drawing | None]) -> Section:
        kept = [drawing for drawing in drawings if drawing is not None]
        return Section(f"{prefix}{name}", heading + suffix, lead, [_renamed(d, prefix) for d in kept])

    score = "Score means R² averaged over the trained levels, less any share of dead latents above 30%."
    return [
        section(
            *("learning-rate", "Learning rate"),
            f"{score} Filled markers weight small k more (reverse), hollow ones all levels alike (uniform).",
            [figures.learning_rate(group) for group in groups],
        ),
        section(
            *("size", "What more latents bring"),
            "Mean R² against the number of latents; nothing smaller beats the trials on the line.",
            [figures.against_size(group) for group in groups],
        ),
        section(
            *("dead", "Dead latents"),
            "A high R² can hide latents that never fire: the best trials stand at the top left.",
            [figures.against_dead(group) for group in groups],
        ),
        section(
            *("weighting", "Uniform beside reverse weighting"),
            "Reverse puts more weight on small k in training: it should be better there, and may be worse at large k.",
            [figures.weightings(group, measured.by_trial) for group in groups],
        ),
        section(
            *("early-stopping", "What was stopped, and when"),
            "Trials are judged at the dotted epochs against those before them; a bar ends where its trial did, and the "
            "number says how much higher its score would have had to be to go on.",
            [figures.early_stopping(group) for group in groups],
        ),
        section(
            *("training", "Training of the best trials"),
            "As in the notebook, epoch by epoch; the marker is the epoch that the model is from.",
            figures.training(groups),
        ),
    ]


def _fits(sweep: Sweep, advice: Advice, *, many: bool) -> Section:
    drawings = [figures.fitted(response) for response in advice.responses if isinstance(response, Response)]
    suffix, prefix = (f" ({sweep.label})", f"{sweep.label}_") if many else ("", "")
    lead = "A simple curve through the trials: where the best learning rate lies, as far as they can tell."
    return Section(f"{prefix}fit", f"Best learning rate, fitted{suffix}", lead, [_renamed(d, prefix) for d in drawings])


def _renamed(drawing: Drawing, prefix: str) -> Drawing:
    """With file name and ids of its own where several sweeps are on the page."""
    if not prefix:
        return drawing
    svg = drawing.svg.replace(f'"{drawing.name}-', f'"{prefix}{drawing.name}-').replace(
        f"#{drawing.name}-", f"#{prefix}{drawing.name}-"
    )
    return Drawing(prefix + drawing.name, drawing.title, drawing.reading, svg, drawing.svg_file, drawing.png_file)
