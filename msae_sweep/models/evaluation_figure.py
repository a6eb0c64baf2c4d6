"""Figure of one model's evaluation: R² at every k, and the latents' firing frequencies."""

import math
from collections.abc import Sequence
from pathlib import Path

from msae_sweep.errors import ConfigError
from msae_sweep.sae.evaluation import Evaluation

FORMATS = (".png", ".svg", ".pdf")
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8a8a8a"
"""Colours from the palette of Okabe and Ito, which colour-blind readers can tell apart, and grey."""


def check_suffix(path: Path) -> None:
    """Check that the suffix of a figure's file is a supported format.

    Raises:
        ConfigError: the suffix is not in `FORMATS`.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"--figure: {path} must end in {', '.join(FORMATS)}")


def evaluation_figure(evaluation: Evaluation, path: Path, title: str, pca_r2: Sequence[float] = ()) -> None:
    """Draw R²(k) with the levels marked, and a histogram of firing frequencies with a separate bar for dead latents.

    Args:
        pca_r2: R² of k = 1, 2, … principal components of the evaluated rows, drawn beside R²(k).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    curve, histogram = figure.subplots(1, 2)
    figure.suptitle(title)

    curve.plot(range(1, len(evaluation.r2) + 1), evaluation.r2, color=BLUE, label="k latents")
    if pca_r2:
        components = range(1, len(pca_r2) + 1)
        curve.plot(components, pca_r2, color=GREY, linestyle="--", label="k principal components of these rows")
        curve.legend(loc="lower right")
    marked = [evaluation.r2[k - 1] for k in evaluation.levels]
    curve.plot(evaluation.levels, marked, "o", color=BLUE)
    for k, r2 in zip(evaluation.levels, marked, strict=True):
        curve.annotate(f"{r2:.3f}", (k, r2), xytext=(3, -14), textcoords="offset points", fontsize=8)
    curve.set_xscale("log", base=2)
    ticks = sorted({*(2**i for i in range(len(evaluation.r2).bit_length())), *evaluation.levels})
    ticks = [k for k in ticks if k <= len(evaluation.r2)]
    curve.set_xticks(ticks, [str(k) for k in ticks])
    curve.set(xlabel="k (largest number of active latents)", ylabel="R²", title="R² at every k")
    curve.grid(alpha=0.3)

    frequencies = (evaluation.firing.double() / evaluation.n_rows).numpy()
    alive = frequencies[frequencies > 0]
    lowest = math.floor(math.log10(1 / evaluation.n_rows))
    n_bins = 8 * -lowest if lowest else 8
    bins = [10 ** (lowest * (1 - i / n_bins)) for i in range(n_bins + 1)]
    histogram.hist(alive, bins=bins, color=BLUE, label=f"{len(alive):,} latents that fire")
    n_dead = len(frequencies) - len(alive)
    if n_dead:
        histogram.bar(
            10 ** (lowest - 0.5), n_dead, width=10 ** (lowest - 0.3), color=ORANGE, label=f"{n_dead:,} that never fire"
        )
    histogram.set_xscale("log")
    histogram.set(
        xlabel=f"share of rows in which a latent is active (k = {evaluation.levels[-1]})",
        ylabel="latents",
        title="Firing frequency",
    )
    histogram.legend()
    histogram.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, format=path.suffix.lstrip("."))
