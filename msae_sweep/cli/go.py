"""Commands on Go games: extract, boards. Each command imports its modules when it runs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from msae_sweep.cli.console import open_console

Games = Annotated[Path, typer.Option(metavar="PATH", help="SGF records, archives of them, or a folder of both.")]
PositionsPerGame = Annotated[int | None, typer.Option(min=1, help="Number of random positions per game; default: all.")]
SkipFirst = Annotated[int, typer.Option(min=0, help="Number of first moves of a game that are skipped.")]
NetworkPrecision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    typer.Option(help="Precision of the network; auto: fp16 on a GPU of compute capability 7.0 or higher, else fp32."),
]
FirstRow = Annotated[
    Literal["top", "bottom"],
    typer.Option(help="Board row that is the network's row 0; bottom, as in Leela Zero's own program, or top."),
]


def extract(
    weights: Annotated[Path, typer.Option(metavar="NET", help="Leela Zero's text weights, plain or .gz.")],
    games: Games,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Activation folder to create or to resume.")],
    blocks: Annotated[str, typer.Option(help="Residual blocks to extract, numbered from 0.")] = "5,20,35",
    positions_per_game: PositionsPerGame = None,
    skip_first: SkipFirst = 0,
    points: Annotated[
        str, typer.Option(help="Rows per position: mean over the board, all 361 points, or a number of random points.")
    ] = "mean",
    dtype: Annotated[Literal["float16", "float32"], typer.Option(help="Data type of the rows.")] = "float16",
    format: Annotated[str, typer.Option(help="File format: npy, h5, parquet, or several, e.g. npy,h5.")] = "npy",
    precision: NetworkPrecision = "auto",
    first_row: FirstRow = "bottom",
    seed: Annotated[int, typer.Option(help="Seed for sampling positions and points.")] = 0,
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
        raise ConfigError(f"--blocks: {blocks} must be numbers separated by commas, e.g. 5,20,35") from None
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
        typer.Argument(
            metavar="MODEL",
            help="Model file, sweep folder, champion:[NAME:]BLOCK, models:/NAME@ALIAS, models:/NAME/VERSION or "
            "runs:/RUN_ID.",
        ),
    ],
    weights: Annotated[
        Path, typer.Option(metavar="NET", help="Weights of the network whose activations the model was trained on.")
    ],
    games: Games,
    block: Annotated[
        int | None, typer.Option(help="Residual block, as MODEL's data names it; required if MODEL does not name it.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="HTML page to write.")] = Path("boards.html"),
    latents: Annotated[
        str, typer.Option(help="Number of latents, strongest first; or their indices, e.g. 12,77 (a single one: 12,).")
    ] = "40",
    top: Annotated[int, typer.Option(min=1, max=100, help="Boards per latent, each from a different game.")] = 8,
    k: Annotated[
        int | None, typer.Option(help="Number of active latents per point; default: the model's largest level.")
    ] = None,
    positions_per_game: PositionsPerGame = None,
    skip_first: SkipFirst = 0,
    precision: NetworkPrecision = "auto",
    first_row: Annotated[
        Literal["top", "bottom"] | None,
        typer.Option(help="Board row that is the network's row 0; default: as in the model's data, else bottom."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for sampling positions.")] = 0,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow tracking URI; default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db.")
    ] = None,
) -> None:
    """Write an HTML page of Go boards: the positions of real games at which a model's latents are most active."""
    from msae_sweep.data.sources.extraction_manifest import blocks_numbered_from
    from msae_sweep.errors import ConfigError
    from msae_sweep.go import top_activations as diagrams
    from msae_sweep.go.network_check import manifest_of_model, network_differences
    from msae_sweep.go.progress_bar import progress_display
    from msae_sweep.go.sampling import Sampling
    from msae_sweep.models.find import find
    from msae_sweep.sweep.ray_cluster import connect

    wanted = diagrams.parse_latents(latents)
    found = find(model, block, tracking_uri)
    block = found.block if block is None else block
    if block is None:
        raise ConfigError(f"--block: the block of {model} is unknown; give its number")
    manifest = manifest_of_model(found.where)
    if first_row is None:
        first_row = "top" if manifest.get("first_row") == "top" else "bottom"
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
        numbered_from=blocks_numbered_from(manifest),
        notes=network_differences(manifest, weights, first_row),
    )
    for note in settings.notes:
        open_console().print(f"note: {note}", highlight=False, soft_wrap=True)
    with progress_display(open_console()) as report:
        summary = diagrams.write_top_activations(settings, report, connect)
    open_console().print(summary.text(settings), highlight=False, soft_wrap=True)
