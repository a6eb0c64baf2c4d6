"""Tables that are printed at a sweep's end: each block's best trial, and the success criteria."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from msae_sweep.sweep_folder.summary import best_entries


def best_table(summary: Mapping[str, Any]) -> RenderableType:
    """Return a table of the best trials, with a row per block and set of k_levels: R² at every k, dead ratio, settings.

    If the console is too narrow for one table, the settings become a second table, so that no name or heading is cut.
    """
    rows: list[tuple[str, dict[str, Any] | None]] = []
    for name, block in summary["blocks"].items():
        winners = best_entries(block)
        rows += [(name, winner) for winner in winners] if winners else [(name, None)]
    levels = sorted({int(key[4:]) for _, w in rows if w for key in w["metrics"] if key.startswith("r2_k")})
    scores = [*(f"R² k={k}" for k in levels), "dead"]
    settings = ["lr", "expansion", "weighting"]
    recovery = any("dictionary_recovery" in block for block in summary["blocks"].values())
    last = ["epoch", *(["dictionary\nrecovered"] if recovery else [])]
    cells = [(name, winner, _cells(summary, name, winner, levels) if winner else {}) for name, winner in rows]
    title = "Best trial of each block (validation, best epoch)"
    whole = _table(title, [*scores, *settings, *last], cells)
    parts = [_table(title, scores, cells, fold=True), _table("Settings of these trials", [*settings, *last], cells)]
    return _Fitting(whole, parts)


def _cells(summary: Mapping[str, Any], name: str, winner: Mapping[str, Any], levels: Sequence[int]) -> dict[str, str]:
    """Return the cells of a block's best trial, by heading."""
    metrics, settings, block = winner["metrics"], {**summary["training"], **winner["params"]}, summary["blocks"][name]
    is_recovered = winner["trial_id"] == block["best"] and "dictionary_recovery" in block
    return {
        **{f"R² k={k}": f"{metrics[f'r2_k{k}']:.4f}" if f"r2_k{k}" in metrics else "–" for k in levels},
        "dead": f"{metrics['dead_ratio']:.1%}",
        "lr": f"{settings['learning_rate']:.2e}",
        "expansion": f"{settings['expansion_factor']:g}",
        "weighting": settings["weighting"],
        "epoch": f"{winner['best_epoch']}/{winner['epochs']}",
        "dictionary\nrecovered": f"{block['dictionary_recovery']:.3f}" if is_recovered else "–",
    }


def _table(
    title: str,
    headings: Sequence[str],
    rows: Sequence[tuple[str, Mapping[str, Any] | None, Mapping[str, str]]],
    *,
    fold: bool = False,
) -> Table:
    """Return a table of the cells under `headings`. With `fold`, the words of a heading are below each other."""
    table = Table(title=title, title_justify="left")
    table.add_column("block")
    table.add_column("trial", no_wrap=True)
    for heading in headings:
        text = heading.replace(" ", "\n") if fold else heading
        table.add_column(text, justify="left" if heading == "weighting" else "right")
    for name, winner, cells in rows:
        first = name.removeprefix("block"), winner["trial_id"] if winner else "no trial finished"
        table.add_row(*first, *(cells[heading] for heading in headings if winner))
    return table


class _Fitting:
    """Renders one table if the console is wide enough for it, else several tables below each other."""

    def __init__(self, whole: Table, parts: Sequence[Table]) -> None:
        self._whole, self._parts = whole, parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fits = Measurement.get(console, options.update(width=10_000), self._whole).maximum <= options.max_width
        yield from [self._whole] if fits else self._parts


def criteria_table(summary: Mapping[str, Any]) -> Table:
    """Return a table with PASS or FAIL of the notebook's three success criteria for each block's best trial."""
    return _criteria("Success criteria", summary, "success_criteria", "passed", ("PASS", "green"), ("FAIL", "red"))


def further_criteria_table(summary: Mapping[str, Any]) -> Group:
    """Return a table of the original series' further criteria, and below it a sentence on the meaning of each."""
    title, words = "Further criteria of the original series", (("met", "green"), ("not met", ""))
    table = _criteria(title, summary, "further_criteria", "met", *words)
    meanings = {
        name: found["meaning"]
        for block in summary["blocks"].values()
        for name, found in block["further_criteria"].items()
    }
    return Group(table, *(Text(f"{name}: {meaning}") for name, meaning in meanings.items()))


def _criteria(
    title: str, summary: Mapping[str, Any], section: str, key: str, yes: tuple[str, str], no: tuple[str, str]
) -> Table:
    """Return a table with a row per criterion of `section` and a column per block.

    Args:
        key: key of a criterion that tells whether it holds.
        yes: word and style for a criterion that holds.
        no: word and style for one that does not.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("criterion")
    blocks = summary["blocks"]
    for name in blocks:
        table.add_column(name)
    for criterion in {c: None for block in blocks.values() for c in block[section]}:
        cells = []
        for block in blocks.values():
            if (found := block[section].get(criterion)) is None:
                cells.append(Text("–"))
                continue
            word, style = yes if found[key] else no
            cells.append(Text(f"{found['value']:.4f} [{word}]", style=style))
        table.add_row(criterion, *cells)
    return table
