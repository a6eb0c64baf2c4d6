"""The front door. Each command imports what it needs when it runs, so that `--help` answers at once."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msae_sweep.errors import MsaeSweepError, TrackingError

if TYPE_CHECKING:
    from rich.console import Console

    from msae_sweep.config import SweepConfig

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
