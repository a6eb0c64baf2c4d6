"""Rendering of a report as an HTML page, as Markdown, and as a CSV table of trials."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import msae_sweep
from msae_sweep.data.sources.extraction_manifest import numbering_note
from msae_sweep.report.next_space import Advice
from msae_sweep.report.pca_baseline import PcaBaselines
from msae_sweep.report.recommendation import Recommendation, same_validation_rows
from msae_sweep.report.style import Drawing
from msae_sweep.report.sweep_data import Sweep, Trial


@dataclass(frozen=True)
class Section:
    """Section of the page: figures under one heading."""

    id: str
    heading: str
    lead: str
    """Introduction that says what the figures show."""
    drawings: list[Drawing]
    note: str = ""
    """Note on what is missing or not comparable, and the reason; may be empty."""


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    sweeps: list[Sweep]
    answers: list[Recommendation]
    sections: list[Section]
    components: dict[str, PcaBaselines]
    """R² of principal components, by the sweep's label."""
    limits: dict[str, dict[int, str]]
    """What could not be measured and why, by the sweep's label and block."""
    advice: dict[str, Advice]
    """Advice on the next sweep, by the sweep's label."""

    @property
    def drawings(self) -> list[Drawing]:
        """Figures of every section."""
        return [drawing for section in self.sections for drawing in section.drawings]


def html(report: Report) -> str:
    """Return the report as one self-contained HTML page."""
    return _environment(autoescape=True).get_template("report.html.j2").render(_context(report))


def markdown(report: Report) -> str:
    """Return the report as Markdown, with its figures as links to `figures/`."""
    return _environment(autoescape=False).get_template("report.md.j2").render(_context(report))


def trials_csv(sweeps: Sequence[Sweep]) -> str:
    """Return a CSV table with a row for every trial of every sweep, ranked within its block and set of k_levels.

    The columns are the trial's settings, then the metrics of its best epoch.
    """
    rows = []
    for sweep in sweeps:
        for trials in (*(group.trials for group in sweep.groups), sweep.unranked):
            for rank, trial in enumerate(trials, 1):
                record = trial.record
                rows.append(
                    {
                        "sweep": sweep.label,
                        "block": record.block,
                        "rank": rank if trial.ended_well else "",
                        "trial_id": record.trial_id,
                        "status": record.status,
                        "reason": record.reason,
                        "hidden_dim": trial.hidden_dim or "",
                        "k_levels": json.dumps(list(trial.levels)),
                        **{
                            key: getattr(trial.training, key)
                            for key in ("learning_rate", "expansion_factor", "weighting")
                        },
                        **{k: v for k, v in record.params.items() if k != "k_levels"},
                        "seed": record.seed,
                        "epochs": record.epochs,
                        "seconds": round(record.seconds, 1),
                        **{("best_epoch" if k == "epoch" else k): v for k, v in trial.best.items()},
                        **_gap(trial),
                    }
                )
    columns = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _gap(trial: Trial) -> dict[str, float]:
    """Return the column with R² at the largest level minus R² at the smallest; none if there is no such gap."""
    smallest, largest = (trial.best.get(f"r2_k{k}") for k in (trial.levels[0], trial.levels[-1]))
    if smallest is None or largest is None or len(trial.levels) == 1:
        return {}
    return {"reconstruction_gap": largest - smallest}


def _environment(*, autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("msae_sweep.report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"duration": duration, "cell": lambda text: str(text).replace("|", "\\|").replace("\n", " ")}
    return environment


def _context(report: Report) -> dict[str, Any]:
    return {
        "report": report,
        "sweeps": report.sweeps,
        "answers": report.answers,
        "sections": report.sections,
        "components": {label: found.by_block for label, found in report.components.items()},
        "advice": report.advice,
        "comparison": _comparison(report),
        "states": states(report),
        "levels": sorted({k for answer in report.answers for k in answer.group.levels}),
        "same_levels": len({answer.group.levels for answer in report.answers}) == 1,
        "further": {c.name: c.meaning for answer in report.answers for c in answer.group.further_criteria},
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": msae_sweep.__version__,
    }


def states(report: Report) -> list[str]:
    """Return the progress of each sweep, in a sentence or two."""
    return [_state(sweep) for sweep in report.sweeps]


def _state(sweep: Sweep) -> str:
    counts = sweep.counts()
    words = {
        "completed": "completed",
        "stopped_early": "stopped early",
        "diverged": "diverged",
        "failed": "failed",
    }
    parts = [f"{counts[status]} {word}" for status, word in words.items() if counts.get(status)]
    text = f"{sweep.n_ended} of {sweep.n_planned} trials have ended ({', '.join(parts)})"
    if sweep.blocks_without:
        text += f"; no trial of block {', '.join(map(str, sweep.blocks_without))} has ended with a model"
    if note := numbering_note(sweep.config.data.path):
        text += f". {note}"
    if sweep.is_whole:
        return f"{text}."
    return (
        f"{text}. The sweep is unfinished, so this report may change: the sweep is still running, or it was "
        "interrupted and can be resumed."
    )


def _comparison(report: Report) -> list[dict[str, Any]]:
    """Return a row for every block and group of every sweep; no rows if there is only one sweep."""
    if len(report.sweeps) < 2:
        return []
    rows = []
    for answer in report.answers:
        for sweep in report.sweeps:
            for group in sweep.groups_of(answer.block):
                same = sweep is answer.sweep or same_validation_rows(sweep, answer.sweep, answer.block)
                rows.append({"sweep": sweep, "group": group, "trial": group.best, "same_data": same})
    return rows


def duration(seconds: float | None) -> str:
    """Return a duration as text, e.g. `3 h 05 min`, `2 min 10 s` or `8.4 s`."""
    if seconds is None:
        return "not recorded"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
