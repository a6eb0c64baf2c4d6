"""The notebook's figure: four panels that compare the best trials of the blocks."""

import io
from collections.abc import Mapping
from typing import Any

from msae_sweep.config import DEAD_RATIO_ALLOWED


def import_ahead() -> None:
    """Import matplotlib while there is nothing else to do. The import takes a second or more."""
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg
    import matplotlib.figure  # noqa: F401


def training_figure(histories: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Draw training loss, validation loss and dead latent ratio by epoch, and R² by sparsity level.

    The result is a PNG of 300 dpi, as in the notebook. A thin vertical line marks each best epoch. A dotted line marks
    the dead ratio that the success criteria allow. Dotted lines beside R² show as many principal components as latents.

    Args:
        histories: history of each block's best trial in the notebook's format, by block name (`block5`, …), with
            `best_epoch` (counted from 1) and, if it is known, `pca_r2` (`k16` … → R² of as many principal components).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 10), layout="tight")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    # Okabe and Ito's colours, which colour-blind readers can tell apart too. Line styles repeat the difference.
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
    styles = ["-", "--", "-.", ":"]
    by_epoch = {
        "train_loss": (panels[0, 0], "Training Loss"),
        "val_loss": (panels[0, 1], "Validation Loss"),
        "dead_ratio": (panels[1, 0], "Dead Latent Ratio"),
    }
    for i, (name, history) in enumerate(histories.items()):
        look = {"color": colours[i % len(colours)], "linestyle": styles[i % len(styles)], "label": name}
        for key, (panel, _) in by_epoch.items():
            panel.plot(range(1, len(history[key]) + 1), history[key], **look)
            panel.axvline(history["best_epoch"], color=look["color"], linewidth=0.6, alpha=0.5)
        best = history["best_epoch"] - 1
        levels = {int(key[4:]): values[best] for key, values in history["val_r2"].items()}
        panels[1, 1].plot(list(levels), list(levels.values()), marker="o", **look)
        if components := {int(k[1:]): r2 for k, r2 in history.get("pca_r2", {}).items() if int(k[1:]) in levels}:
            dotted = {
                "color": look["color"],
                "linestyle": ":",
                "marker": ".",
                "label": f"{name}, k principal components",
            }
            panels[1, 1].plot(list(components), list(components.values()), **dotted)
    for panel, title in by_epoch.values():
        panel.set(title=title, xlabel="Epoch", ylabel=title)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    dead = panels[1, 0]
    dead.axhline(DEAD_RATIO_ALLOWED, color="grey", linestyle=":", linewidth=1)
    dead.set_ylim(0, max(DEAD_RATIO_ALLOWED + 0.05, dead.get_ylim()[1]))
    last = panels[1, 1]
    last.set(title="Best R² by Sparsity Level", xlabel="k (sparsity level)", ylabel="R²")
    last.set_xscale("log", base=2)
    ticks = sorted({int(key[4:]) for history in histories.values() for key in history["val_r2"]})
    last.set_xticks(ticks, [str(tick) for tick in ticks])
    last.grid(alpha=0.3)
    for panel in panels.flat:
        if panel.has_data():
            panel.legend()
    png = io.BytesIO()
    figure.savefig(png, dpi=300, bbox_inches="tight", format="png")
    return png.getvalue()
