"""The front door. Each command imports what it needs when it runs, so that `--help` answers at once."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from msae_sweep.errors import ConfigError, MsaeSweepError, TrackingError

if TYPE_CHECKING:
    from rich.console import Console

    from msae_sweep.config import SweepConfig
    from msae_sweep.results.evaluation import Report

app = typer.Typer(
    name="msae-sweep",
    help="Sweeps of Matryoshka sparse autoencoders over a network's activations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Space = Annotated[Path, typer.Argument(metavar="SPACE", help="Search-space file, e.g. search_spaces/quickstart.yaml.")]
Data = Annotated[
    str | None, typer.Option("--data", metavar="PATH", help="Activations: replaces data.path of the file.")
]
Storage = Annotated[str | None, typer.Option(help="Folder that holds the sweep folders and the prepared shards.")]
Name = Annotated[str | None, typer.Option(help="Name of the sweep: replaces the file's.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Set any key of the file, e.g. --set training.epochs=5. Repeatable."
    ),
]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow tracking URI: replaces tracking.uri of the file.")]
What = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Model file (.pt, .safetensors), sweep folder, champion:BLOCK, models:/NAME@ALIAS, models:/NAME/VERSION "
        "or runs:/RUN_ID.",
    ),
]
Rows = Annotated[
    Literal["all", "training", "validation"] | None,
    typer.Option(help="Which rows, split as a sweep would; all where --data is given."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Cluster = Annotated[bool, typer.Option("--cluster", help="Spread the rows over a Ray cluster.")]
DataOverrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key of data, e.g. --set data.val_split=0.2. Repeatable."),
]
Block = Annotated[int | None, typer.Option("--block", help="Which of a sweep's models, or of the data's blocks.")]
StoreUri = Annotated[str | None, typer.Option("--tracking-uri", help="Where MLflow is; else MLFLOW_TRACKING_URI.")]
SweepPath = Annotated[Path, typer.Argument(metavar="SWEEP", help="Folder of a sweep, e.g. sweeps/quickstart.")]


def main() -> None:
    """Run the command line; what a user can mend is one line on stderr and exit code 2."""
    try:
        app()
    except MsaeSweepError as error:
        print(f"msae-sweep: {error}", file=sys.stderr)
        sys.exit(2)


@app.command()
def run(
    space: Space,
    data: Data = None,
    storage: Storage = None,
    name: Name = None,
    overrides: Overrides = None,
    tracking_uri: TrackingUri = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the sweep of this name where it stopped; begin it if there is none."),
    ] = False,
) -> None:
    """Run a sweep: prepare the data, schedule the trials, track them, leave a finished comparison."""
    import yaml

    from msae_sweep import config

    named = {"data.path": data, "storage": storage, "name": name, "tracking.uri": tracking_uri}
    # json-like quoting, so that a path or URI is never read as anything but text
    options = [
        f"{key}={yaml.safe_dump(value, default_style=chr(34))}" for key, value in named.items() if value is not None
    ]
    _sweep(config.load(space, [*(overrides or []), *options]), resume=resume)


@app.command()
def resume(sweep: SweepPath, tracking_uri: TrackingUri = None) -> None:
    """Go on with a sweep that was interrupted; finished trials stay finished."""
    from msae_sweep.sweep.run import load_config

    _sweep(load_config(sweep, tracking_uri), resume=True)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Activations: folder, .h5, Parquet, or `planted`.")],
) -> None:
    """Show what lies in PATH: a row per block, and how much its principal components explain."""
    from msae_sweep.config import DataConfig
    from msae_sweep.data import inspect as inspection

    _console().print(inspection.render(inspection.inspect(DataConfig(path=path))))


@app.command()
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
        Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="Arithmetic of the network; auto: bf16 on a GPU.")
    ] = "auto",
    first_row: Annotated[
        Literal["top", "bottom"], typer.Option(help="Row 0 of the network; bottom for those Leela Zero itself trained.")
    ] = "top",
    seed: Annotated[int, typer.Option(help="Seed of positions and points.")] = 0,
) -> None:
    """Turn game records and a Leela Zero network into the activation folder that `run` reads."""
    from msae_sweep.go import extract as extraction
    from msae_sweep.go.plan import Sampling, points_asked_for
    from msae_sweep.go.progress import showing
    from msae_sweep.sweep.run import connect

    try:
        numbers = tuple(int(block) for block in blocks.split(","))
    except ValueError:
        raise ConfigError(f"--blocks: {blocks} must be numbers with commas, e.g. 5,20,35") from None
    settings = extraction.Settings(
        weights=weights,
        games=games,
        out=out,
        blocks=numbers,
        sampling=Sampling(positions_per_game, skip_first, points_asked_for(points), seed),
        dtype=dtype,
        formats=tuple(format.split(",")),
        precision=precision,
        first_row=first_row,
    )
    with showing(_console()) as report:
        summary = extraction.extract(settings, report, connect)
    _console().print(summary.text(settings), highlight=False, soft_wrap=True)


@app.command()
def export(
    what: What,
    format: Annotated[str, typer.Option(help="notebook, safetensors, saelens or sparsify.")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="File (notebook, safetensors) or folder to write.")],
    block: Block = None,
    k: Annotated[
        int | None, typer.Option(min=1, help="The one k of saelens and sparsify; the largest level without.")
    ] = None,
    tracking_uri: StoreUri = None,
) -> None:
    """Write a model in the format that the next tool reads."""
    from msae_sweep.results.export import LOADERS
    from msae_sweep.results.export import export as write
    from msae_sweep.results.models import find

    path = write(find(what, block, tracking_uri), format, out, k)
    print(f"{path}: {LOADERS[format].format(path=path)}")  # type: ignore[index]


@app.command("eval")
def evaluate(
    what: What,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="PATH", help="Activations; without, a sweep's own, its validation rows."),
    ] = None,
    block: Block = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="WHAT", help="Another model to match latents with, e.g. of another seed. Repeatable."),
    ] = None,
    rows: Rows = None,
    max_k: Annotated[int | None, typer.Option(min=1, help="Largest k; the model's largest level without.")] = None,
    device: Device = "auto",
    cluster: Cluster = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Everything as JSON.")] = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="R²(k) and firing frequencies, .png or .svg.")
    ] = None,
    overrides: DataOverrides = None,
    tracking_uri: StoreUri = None,
) -> None:
    """Measure a model on any activations: R² at every k, dead and firing latents, its dictionary."""
    import json

    from msae_sweep.results import evaluation
    from msae_sweep.results.evaluation_figure import check_suffix, evaluation_figure

    if figure is not None:
        check_suffix(figure)
    report = _evaluate(what, data, block, against or [], rows, max_k, device, cluster, overrides or [], tracking_uri)
    _console().print(evaluation.render(report), highlight=False)
    try:
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report.to_json(), indent=1, allow_nan=False), encoding="utf-8")
        if figure is not None:
            evaluation_figure(report.evaluation, figure, report.found.where)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}") from None


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Model file: the notebook's .pt, or .safetensors.")],
    data: Annotated[
        str | None, typer.Option("--data", metavar="PATH", help="Activations; without, the sweep's validation rows.")
    ] = None,
    sweep: Annotated[
        Path | None, typer.Option(metavar="SWEEP", help="Sweep whose trials it is compared with in MLflow.")
    ] = None,
    block: Annotated[int | None, typer.Option(help="Its block, where the file's name does not tell.")] = None,
    rows: Rows = None,
    champion: Annotated[bool, typer.Option("--champion", help="Give it the alias, too.")] = False,
    device: Device = "auto",
    cluster: Cluster = False,
    overrides: DataOverrides = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Measure a model from elsewhere, e.g. the notebook, and register it in MLflow beside the sweeps' own."""
    import json

    from msae_sweep.config import TrackingConfig
    from msae_sweep.results import evaluation
    from msae_sweep.results.models import find
    from msae_sweep.track.imports import Import, register_import
    from msae_sweep.track.uri import resolve_uri

    if file.is_dir():
        raise ConfigError(f"{file}: a folder; give one model file")
    block = find(file).block if block is None else block
    if block is None:
        raise ConfigError(f"--block: the name of {file} tells no block; say which it is of")
    if data is None and sweep is None:
        raise ConfigError("--data: give activations, or a --sweep whose validation rows to take")
    tracking, sweep_id = TrackingConfig(), None
    if sweep is not None:
        from msae_sweep.sweep.run import load_config

        tracking = load_config(sweep, tracking_uri).tracking
        sweep_id = json.loads((sweep / "identity.json").read_text(encoding="utf-8"))["sweep_id"]
    uri = resolve_uri(tracking_uri or tracking.uri)
    report = _evaluate(str(file), data, block, [], rows, None, device, cluster, overrides or [], None, sweep)
    _console().print(evaluation.render(report), highlight=False)
    measured = f"{report.evaluation.n_rows} {report.plan.side} rows of {report.plan.info.where}"
    what = Import(
        report.found.file,
        block,
        f"import-{file.stem}",
        report.metrics(),
        {"imported_from": str(file.absolute()), "measured_on": measured},
    )
    imported = register_import(
        what, tracking_uri=uri, experiment=tracking.experiment, sweep_id=sweep_id, champion=champion
    )
    print(f"registered: models:/{imported.model}/{imported.version} (run {imported.run_id})")


@app.command("track-sync")
def track_sync(sweep: SweepPath, tracking_uri: TrackingUri = None) -> None:
    """Send MLflow what a sweep could not send while it ran; safe to repeat."""
    from msae_sweep.sweep.run import load_config
    from msae_sweep.track.tracker import sync

    tracking = load_config(sweep, tracking_uri).tracking
    report = sync(sweep, tracking.uri, tracking)
    if report.pending:
        raise TrackingError(str(report))
    print(report)


def _console() -> "Console":
    """Tables in a file or a job's log are as wide as they need to be."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)


def _evaluate(
    what: str,
    data: str | None,
    block: int | None,
    against: list[str],
    rows: Literal["all", "training", "validation"] | None,
    max_k: int | None,
    device: str,
    cluster: bool,
    overrides: list[str],
    tracking_uri: str | None,
    sweep: Path | None = None,
) -> "Report":
    from functools import partial

    from rich.progress import Progress

    from msae_sweep.results import evaluation
    from msae_sweep.results.models import find

    side = rows or ("validation" if data is None else "all")
    config = evaluation.data_of(what if sweep is None else str(sweep), data, overrides)
    # Of a file, --block names the block of the data only: a model may be tried on another one.
    found = find(what, block if Path(what).is_dir() else None, tracking_uri)
    others = [find(other, found.block if Path(other).is_dir() else None, tracking_uri) for other in against]
    plan = evaluation.plan(found, config, block, side)
    if cluster:
        from msae_sweep.sweep.evaluation import sums_on_cluster
        from msae_sweep.sweep.run import connect

        if device != "auto":
            raise ConfigError(f"--device: {device} is for this machine; leave it out with --cluster")
        connect()
        parts = sums_on_cluster
    else:
        parts = partial(evaluation.sums_here, device=evaluation.choose_device(device))
    with Progress(console=_console(), transient=True) as progress:
        task = progress.add_task("row ranges", total=plan.n_ranges)
        return evaluation.evaluate(
            found,
            plan,
            parts,
            max_k=max_k,
            against=others,
            on_progress=lambda done, _: progress.update(task, completed=done),
        )


def _sweep(config: "SweepConfig", *, resume: bool) -> None:
    from msae_sweep.results.table import best_table, criteria_table
    from msae_sweep.sweep.run import run as run_sweep

    console = _console()
    command = shlex.join(["msae-sweep", *sys.argv[1:]])
    result = run_sweep(config, resume=resume, command=command, console=console)
    console.print(best_table(result.summary), criteria_table(result.summary))
    console.print(f"results: {result.folder.path}", highlight=False, soft_wrap=True)
    if result.tracking.pending:
        console.print(
            f"{result.tracking.pending} events not sent to MLflow ({result.tracking.reason}); "
            f"later: msae-sweep track-sync {result.folder.path}",
            highlight=False,
            soft_wrap=True,
        )
    if result.interrupted:
        console.print(
            f"interrupted; go on with: msae-sweep resume {result.folder.path}", highlight=False, soft_wrap=True
        )
        raise typer.Exit(130)
    if any(block["best"] is None for block in result.summary["blocks"].values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
