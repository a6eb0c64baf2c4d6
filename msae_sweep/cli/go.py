"""Commands on Go games: extract, boards. Each command imports its modules when it runs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from msae_sweep.cli.console import open_console


def extract(
    weights: Annotated[Path, typer.Option(metavar="NET", help="Leela Zero text weights, plain or .gz.")],
    games: Annotated[Path, typer.Option(metavar="PATH", help="SGF records, archives of them, or a folder of both.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Activation folder to make, or to go on with.")],
    blocks: Annotated[str, typer.Option(help="Residual blocks to tap, numbered from 1.")] = "5,20,35",
    positions_per_game: Annotated[
        int | None, typer.Option(min=1, help="Random positions of a game; all without.")
    ] = None,
    skip_first: Annotated[int, typer.Option(min=0, help="Moves at the beginning whose positions are left out.")] = 0,
    points: Annotated[str, typer.Option(help="Rows of a position: mean, all, or N random points of the 361.")] = "mean",
    dtype: Annotated[Literal["float16", "float32"], typer.Option(help="Type of the rows.")] = "float16",
    format: Annotated[str, typer.Option(help="npy, h5, parquet, or several: npy,h5.")] = "npy",
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option(help="Arithmetic of the network; auto: fp16 on a GPU (compute capability 7.0), else fp32."),
    ] = "auto",
    first_row: Annotated[
        Literal["top", "bottom"], typer.Option(help="Row 0 of the network; bottom for those Leela Zero itself trained.")
    ] = "top",
    seed: Annotated[int, typer.Option(help="Seed of positions and points.")] = 0,
) -> None:
    """Extract activations of a Leela Zero network on recorded games into a folder that `run` can read."""
    from msae_sweep.errors import ConfigError
    from msae_sweep.go import extract as extraction
    from msae_sweep.go.progress_bar import progress_display
    from msae_sweep.go.sampling import Sampling, parse_points
    from msae_sweep.sweep.ray_cluster import connect

    try:
        numbers = tuple(int(block) for block in blocks.split(","))
    except ValueError:
        raise ConfigError(f"--blocks: {blocks} must be numbers with commas, e.g. 5,20,35") from None
    settings = extraction.ExtractionSettings(
        weights=weights,
        games=games,
        out=out,
        blocks=numbers,
        sampling=Sampling(positions_per_game, skip_first, parse_points(points), seed),
        dtype=dtype,
        formats=tuple(format.split(",")),
        precision=precision,
        first_row=first_row,
    )
    with progress_display(open_console()) as report:
        summary = extraction.extract(settings, report, connect)
    open_console().print(summary.text(settings), highlight=False, soft_wrap=True)


def boards(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Model file, a sweep, champion:[NAME:]BLOCK, or what MLflow calls it."),
    ],
    weights: Annotated[Path, typer.Option(metavar="NET", help="The network whose activations the model knows.")],
    games: Annotated[Path, typer.Option(metavar="PATH", help="SGF records, archives of them, or a folder of both.")],
    block: Annotated[
        int | None, typer.Option(help="The residual block, numbered from 1, where MODEL does not tell it.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="The page to write.")] = Path("boards.html"),
    latents: Annotated[
        str, typer.Option(help="How many, those strongest where they fire; or which, with commas: 12,77 (one: 12,).")
    ] = "40",
    top: Annotated[int, typer.Option(min=1, max=100, help="Boards of a latent, each of another game.")] = 8,
    k: Annotated[int | None, typer.Option(help="Latents active at a point; the model's largest level without.")] = None,
    positions_per_game: Annotated[
        int | None, typer.Option(min=1, help="Random positions of a game; all without.")
    ] = None,
    skip_first: Annotated[int, typer.Option(min=0, help="Moves at the beginning whose positions are left out.")] = 0,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option(help="Arithmetic of the network; auto: fp16 on a GPU (compute capability 7.0), else fp32."),
    ] = "auto",
    first_row: Annotated[
        Literal["top", "bottom"], typer.Option(help="Row 0 of the network; bottom for those Leela Zero itself trained.")
    ] = "top",
    seed: Annotated[int, typer.Option(help="Seed of the positions.")] = 0,
    tracking_uri: Annotated[str | None, typer.Option(help="Where MLflow is; as for run.")] = None,
) -> None:
    """Write an HTML page of Go boards: the positions of real games at which a model's latents are most active."""
    from msae_sweep.errors import ConfigError
    from msae_sweep.go import top_activations as diagrams
    from msae_sweep.go.network_check import network_differences
    from msae_sweep.go.progress_bar import progress_display
    from msae_sweep.go.sampling import Sampling
    from msae_sweep.models.find import find
    from msae_sweep.sweep.ray_cluster import connect

    wanted = diagrams.parse_latents(latents)
    found = find(model, block, tracking_uri)
    block = found.block if block is None else block
    if block is None:
        raise ConfigError(f"--block: {model} does not tell its block; say which")
    settings = diagrams.TopActivationSettings(
        model=found.file,
        name=found.where,
        weights=weights,
        games=games,
        block=block,
        out=out,
        latents=wanted,
        top=top,
        k=found.file.model.k_levels[-1] if k is None else k,
        sampling=Sampling(positions_per_game, skip_first, "all", seed),
        precision=precision,
        first_row=first_row,
        notes=network_differences(found.where, weights, first_row),
    )
    for note in settings.notes:
        open_console().print(f"note: {note}", highlight=False, soft_wrap=True)
    with progress_display(open_console()) as report:
        summary = diagrams.write_top_activations(settings, report, connect)
    open_console().print(summary.text(settings), highlight=False, soft_wrap=True)
