"""The tables at a sweep's end: each block's best trial, and the success criteria."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from msae_sweep.results.summary import best_entries


def best_table(summary: Mapping[str, Any]) -> Table:
    """A row per block (and set of k_levels): R² at every k, dead ratio, and the settings of the best trial."""
    rows: list[tuple[str, dict[str, Any] | None]] = []
    for name, block in summary["blocks"].items():
        winners = best_entries(block)
        rows += [(name, winner) for winner in winners] if winners else [(name, None)]
    levels = sorted({int(key[4:]) for _, w in rows if w for key in w["metrics"] if key.startswith("r2_k")})
    recovery = any("dictionary_recovery" in block for block in summary["blocks"].values())
    table = Table(title="Best trial of each block (validation, best epoch)", title_justify="left")
    for heading in ("block", "trial", *(f"R² k={k}" for k in levels), "dead", "lr", "expansion", "weighting", "epoch"):
        table.add_column(heading, justify="left" if heading in ("block", "trial", "weighting") else "right")
    if recovery:
        table.add_column("dictionary recovered", justify="right")
    for name, winner in rows:
        if winner is None:
            table.add_row(name.removeprefix("block"), "no trial finished")
            continue
        metrics, settings = winner["metrics"], {**summary["training"], **winner["params"]}
        row = [
            name.removeprefix("block"),
            winner["trial_id"],
            *(f"{metrics[f'r2_k{k}']:.4f}" if f"r2_k{k}" in metrics else "–" for k in levels),
            f"{metrics['dead_ratio']:.1%}",
            f"{settings['learning_rate']:.2e}",
            f"{settings['expansion_factor']:g}",
            settings["weighting"],
            f"{winner['best_epoch']}/{winner['epochs']}",
        ]
        block = summary["blocks"][name]
        if recovery:
            is_best = winner["trial_id"] == block["best"]
            row.append(f"{block['dictionary_recovery']:.3f}" if is_best and "dictionary_recovery" in block else "–")
        table.add_row(*row)
    return table


def criteria_table(summary: Mapping[str, Any]) -> Table:
    """PASS or FAIL of the notebook's three success criteria for each block's best trial."""
    table = Table(title="Success criteria", title_justify="left")
    table.add_column("criterion")
    names = list(summary["blocks"])
    for name in names:
        table.add_column(name)
    criteria = {c: None for block in summary["blocks"].values() for c in block["success_criteria"]}
    for criterion in criteria:
        cells: list[Text] = []
        for name in names:
            found = summary["blocks"][name]["success_criteria"].get(criterion)
            if found is None:
                cells.append(Text("–"))
                continue
            word, style = ("PASS", "green") if found["passed"] else ("FAIL", "red")
            cells.append(Text(f"{found['value']:.4f} [{word}]", style=style))
        table.add_row(criterion, *cells)
    return table
