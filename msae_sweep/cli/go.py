"""Commands on Go games: extract, boards. Each command imports its modules when it runs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from msae_sweep.cli.console import open_console

RECIPES: dict[str, dict[str, object]] = {
    "notebook": {
        "max_games": 4999,
        "positions_per_game": 100,
        "consecutive": True,
        "min_move": 10,
        "max_move": 150,
        "points": "mean",
        "dtype": "float32",
        "format": "npy,h5",
    }
}
"""Options of `extract` that each recipe sets, unless the command line gives them."""
_ALL_POSITIONS = {
    "max_games": None,
    "positions_per_game": None,
    "consecutive": False,
    "min_move": 0,
    "max_move": None,
}
"""Options that choose positions, with the values that choose all."""


def _set_recipe(context: typer.Context, recipe: str | None) -> str | None:
    if recipe is not None:
        context.default_map = {**(context.default_map or {}), **RECIPES[recipe]}
    return recipe


_GAMES = typer.Option(metavar="PATH", help="SGF records (also .gz, .xz, .bz2), .tar or .zip of them, or a folder.")
Games = Annotated[Path, _GAMES]
MaxGames = Annotated[int | None, typer.Option(min=1, help="Size of a random sample of the games; default: all games.")]
FirstGames = Annotated[
    int | None,
    typer.Option(min=1, help="Stop reading after so many usable games in stored order; this is no random sample."),
]
PositionsPerGame = Annotated[int | None, typer.Option(min=1, help="Number of random positions per game; default: all.")]
MinMove = Annotated[
    int,
    typer.Option(
        "--min-move", "--skip-first", min=0, help="Minimum number of moves before a position (once --skip-first)."
    ),
]
MaxMove = Annotated[int | None, typer.Option(min=0, help="Maximum number of moves before a position.")]
Consecutive = Annotated[
    bool,
    typer.Option(
        "--consecutive", help="Take --positions-per-game positions that follow one another, from a random one on."
    ),
]
NetworkPrecision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    typer.Option(help="Precision of the network; auto: fp16 on a GPU of compute capability 7.0 or higher, else fp32."),
]
FirstRow = Annotated[
    Literal["top", "bottom"],
    typer.Option(help="Board row that is the network's row 0; bottom, as in Leela Zero's own program, or top."),
]


def extract(
    context: typer.Context,
    weights: Annotated[Path, typer.Option(metavar="NET", help="Leela Zero's text weights, plain or .gz.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Activation folder to create or to resume.")],
    games: Annotated[Path | None, _GAMES] = None,
    positions: Annotated[
        Path | None, typer.Option(metavar="FILE.hdf5", help="The original series' positions, in place of --games.")
    ] = None,
    recipe: Annotated[
        Literal["notebook"] | None,
        typer.Option(
            is_eager=True, callback=_set_recipe, help="Take other defaults: notebook, the original series' data."
        ),
    ] = None,
    blocks: Annotated[str, typer.Option(help="Residual blocks to extract, numbered from 0.")] = "5,20,35",
    max_games: MaxGames = None,
    first_games: FirstGames = None,
    positions_per_game: PositionsPerGame = None,
    min_move: MinMove = 0,
    max_move: MaxMove = None,
    consecutive: Consecutive = False,
    points: Annotated[
        str, typer.Option(help="Rows per position: mean over the board, all 361 points, or a number of random points.")
    ] = "mean",
    dtype: Annotated[Literal["float16", "float32"], typer.Option(help="Data type of the rows.")] = "float16",
    format: Annotated[str, typer.Option(help="File format: npy, h5, parquet, or several, e.g. npy,h5.")] = "npy",
    precision: NetworkPrecision = "auto",
    first_row: FirstRow = "bottom",
    write_positions: Annotated[
        Path | None,
        typer.Option(metavar="FILE.hdf5", help="Also write the positions, in the original series' format."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for sampling games, positions and points.")] = 0,
) -> None:
    """Extract activations of a Leela Zero network on recorded games into a folder that `run` can read."""
    from msae_sweep.errors import ConfigError
    from msae_sweep.go import extract as extraction
    from msae_sweep.go.game_choice import GameChoice
    from msae_sweep.go.progress_bar import progress_display
    from msae_sweep.go.sampling import Sampling, parse_points
    from msae_sweep.sweep.ray_cluster import connect

    try:
        numbers = tuple(int(block) for block in blocks.split(","))
    except ValueError:
        raise ConfigError(f"--blocks: {blocks} must be numbers separated by commas, e.g. 5,20,35") from None
    chosen = {name: context.params[name] for name in _ALL_POSITIONS}
    for name, all_positions in _ALL_POSITIONS.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "DEFAULT_MAP" and (positions or (first_games and name == "max_games")):
            chosen[name] = all_positions  # what the recipe chooses gives way to what the command line chooses
    choice = GameChoice(chosen.pop("max_games"), first_games)
    settings = extraction.ExtractionSettings(
        weights=weights,
        games=games,
        out=out,
        blocks=numbers,
        sampling=Sampling(**chosen, points=parse_points(points), seed=seed),
        dtype=dtype,
        formats=tuple(format.split(",")),
        precision=precision,
        first_row=first_row,
        choice=choice,
        positions=positions,
        write_positions=write_positions,
    )
    with progress_display(open_console()) as report:
        summary = extraction.extract(settings, report, connect, report.show_bytes)
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
    max_games: MaxGames = None,
    first_games: FirstGames = None,
    positions_per_game: PositionsPerGame = None,
    min_move: MinMove = 0,
    max_move: MaxMove = None,
    consecutive: Consecutive = False,
    precision: NetworkPrecision = "auto",
    first_row: Annotated[
        Literal["top", "bottom"] | None,
        typer.Option(help="Board row that is the network's row 0; default: as in the model's data, else bottom."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for sampling games and positions.")] = 0,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow tracking URI; default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db.")
    ] = None,
) -> None:
    """Write an HTML page of Go boards: the positions of real games at which a model's latents are most active."""
    from msae_sweep.data.sources.extraction_manifest import blocks_numbered_from
    from msae_sweep.errors import ConfigError
    from msae_sweep.go import top_activations as diagrams
    from msae_sweep.go.game_choice import GameChoice
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
        sampling=Sampling(
            positions_per_game=positions_per_game,
            min_move=min_move,
            points="all",
            seed=seed,
            max_move=max_move,
            consecutive=consecutive,
        ),
        choice=GameChoice(max_games, first_games),
        precision=precision,
        first_row=first_row,
        numbered_from=blocks_numbered_from(manifest),
        notes=network_differences(manifest, weights, first_row),
    )
    for note in settings.notes:
        open_console().print(f"note: {note}", highlight=False, soft_wrap=True)
    with progress_display(open_console()) as report:
        summary = diagrams.write_top_activations(settings, report, connect, report.show_bytes)
    open_console().print(summary.text(settings), highlight=False, soft_wrap=True)
