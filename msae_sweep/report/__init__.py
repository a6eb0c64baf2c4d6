"""The report of one or several sweeps: a self-contained HTML page, the same in Markdown, a CSV table, and figures.

`sweep_data` reads sweeps, `curves` measures R² at every k and `pca_baseline` that of principal components,
`recommendation` recommends an MSAE for each block, and `response_surface` and `next_space` propose what to run next.
`figures`, `score_figures` and `style` draw the figures, `build` runs all of this, and `page` writes the result. Modules
are imported only when they are needed, because torch and matplotlib take seconds to import.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from msae_sweep.report.style import Draw
    from msae_sweep.report.sweep_data import Sweep
    from msae_sweep.sweep_folder.folder import SweepFolder

FOLDER = "report"
"""Name of the folder of a sweep's own report, inside the sweep folder."""
PAGE = "report.html"
"""File name of the HTML page inside the report's folder."""


class ReportFiles(NamedTuple):
    """Location of a report's files, and notes on the report."""

    where: str
    """Path or object store URI of the folder with `report.html`, `report.md`, `trials.csv` and `figures/`."""
    next_spaces: list[str]
    """Names of the files inside `where` with the search space that is proposed after each sweep."""
    notes: list[str]
    """Notes on limits of the report, e.g. that prepared rows are missing or that a sweep is unfinished."""

    @property
    def page(self) -> str:
        """Path or URI of the HTML page."""
        return f"{self.where}/{PAGE}"


def write(places: Sequence[str | Path], out: str | Path | None = None) -> ReportFiles:
    """Write the report of one sweep, or a report that compares several sweeps.

    Args:
        places: paths or URIs of sweep folders.
        out: path or URI of the folder to write. By default it is `report/` in the first sweep's folder; for several
            sweeps, a folder inside `report/` that is named after the others.

    Raises:
        SweepError: there is no sweep in a folder, no trial of it has ended, or `out` cannot be written.
    """
    from msae_sweep.report.sweep_data import read_all

    return _write(read_all(places), out)


def write_at_the_end(folder: "SweepFolder", draw: "Draw | None" = None) -> ReportFiles:
    """Write the report of a sweep that just ended, without the parts that would delay the sweep's end.

    Args:
        draw: function that draws the figures; by default this process draws them.
    """
    from msae_sweep.report.sweep_data import read

    return _write([read(folder)], None, draw, at_the_end=True)


def _write(
    sweeps: "Sequence[Sweep]", out: str | Path | None, draw: "Draw | None" = None, *, at_the_end: bool = False
) -> ReportFiles:
    from msae_sweep.errors import SweepError
    from msae_sweep.paths import StoragePath
    from msae_sweep.report import page
    from msae_sweep.report.build import build
    from msae_sweep.report.style import draw_in_process

    first, *others = sweeps
    within = FOLDER if not others else f"{FOLDER}/{'-'.join(['with', *(sweep.name for sweep in others)])}"
    folder, where = first.folder, f"{first.folder}/{within}"
    elsewhere = None if out is None else StoragePath(out)
    if elsewhere is not None:  # checked first, so that an error is reported before the work
        where = str(elsewhere)
        elsewhere.check()
        try:
            if not elsewhere.is_remote:
                elsewhere.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SweepError(f"--out: {out} cannot be created: {error.strerror}") from None
    report = build(sweeps, at_the_end=at_the_end, draw=draw or draw_in_process)
    files = {f"figures/{d.name}.svg": d.svg_file for d in report.drawings}
    files |= {f"figures/{d.name}.png": d.png_file for d in report.drawings}
    texts = {"report.md": page.markdown(report), "trials.csv": page.trials_csv(report.sweeps)}
    texts |= {f"{advice.name}.yaml": advice.yaml for advice in report.advice.values()}
    texts[PAGE] = page.html(report)  # written last, so that all other files exist if the page exists
    try:
        for name, content in (files | {name: text.encode() for name, text in texts.items()}).items():
            if elsewhere is not None:
                (elsewhere / name).write(content)
            else:
                folder.write(folder.path / within / name, content, durable=False)
    except OSError as error:
        raise SweepError(f"{where} cannot be written: {error.strerror or error}") from None
    unfinished = [
        f"{sweep.label}: {state}"
        for sweep, state in zip(report.sweeps, page.states(report), strict=True)
        if not sweep.is_whole
    ]
    missing = [f"block {block}: {text}" for limits in report.limits.values() for block, text in limits.items()]
    return ReportFiles(where, [f"{advice.name}.yaml" for advice in report.advice.values()], [*unfinished, *missing])
