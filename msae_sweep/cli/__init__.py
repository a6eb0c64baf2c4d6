"""Command line of msae_sweep. Each command imports its modules when it runs, so that `--help` responds at once."""

import atexit
import os
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from msae_sweep import __version__, signals
from msae_sweep.cli import go, models
from msae_sweep.cli.console import open_console
from msae_sweep.errors import MsaeSweepError, TrackingError

if TYPE_CHECKING:
    from msae_sweep.config import SweepConfig
    from msae_sweep.track.sender import TrackingStatus


_UsageError: Any = typer.BadParameter.__base__
"""Base class of errors in a command's options. typer may bring its own copy of click, so click's class is no use."""


class _Commands(TyperGroup):
    """Command group that prints one line for an interrupted command, unless the command has reported it itself."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            _say("; ".join(["interrupted", *getattr(interrupt, "__notes__", [])]))
            raise typer.Exit(signals.exit_code()) from None


app = typer.Typer(
    name="msae-sweep",
    cls=_Commands,
    help="Sweeps of Matryoshka sparse autoencoders over a network's activations.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Space = Annotated[
    str, typer.Argument(metavar="SPACE", help="Search-space file or its URI, e.g. search_spaces/quickstart.yaml.")
]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="PATH", help="Path or URI of the activations; overrides data.path of the file."),
]
Storage = Annotated[
    str | None,
    typer.Option(
        help="Folder for sweeps and prepared shards, one that all nodes share or s3://bucket/folder; overrides storage "
        "of the file."
    ),
]
Name = Annotated[str | None, typer.Option(help="Name of the sweep; overrides name of the file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Set any key of the file, e.g. --set training.epochs=5. Repeatable."
    ),
]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow tracking URI; overrides tracking.uri of the file.")]
SweepPath = Annotated[
    str, typer.Argument(metavar="SWEEP", help="Sweep folder, e.g. sweeps/quickstart, or its URI in an object store.")
]


DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan without starting or writing anything.")]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"msae-sweep {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Sweeps of Matryoshka sparse autoencoders over a network's activations."""


def main() -> None:
    """Run the command line. A user's error gives one line on stderr and exit code 2, Ctrl-C gives 130, SIGTERM 143."""
    # Only `ray_cluster.connect` may start Ray. Otherwise a thread that still prepares data when a command is
    # interrupted would start a second Ray with its next call.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    # atexit calls functions in reverse order: this one is registered first, so it is called last.
    atexit.register(signals.exit_if_requested)
    with signals.sigterm_as_ctrl_c():
        code = _run()
        # The module is loaded only if the command has used Ray.
        cluster = sys.modules.get("msae_sweep.sweep.ray_cluster")
        try:
            if cluster and code not in (130, 143):
                cluster.disconnect(keep_session=code != 0)
        except KeyboardInterrupt:
            code = signals.exit_code()
    if code in (130, 143):
        if cluster:
            cluster.abandon()
        signals.request_immediate_exit(code)
    sys.exit(code)


def _run() -> Any:
    """Run the given command and return its exit code."""
    try:
        return app(standalone_mode=False) or 0
    except SystemExit as ended:
        return ended.code
    except MsaeSweepError as error:
        _say(str(error))
    except _UsageError as error:
        if len(sys.argv) == 1:
            error.show()  # the help
        else:
            text = " ".join(error.format_message().split()).rstrip(".")
            _say(f"{text}; see {error.ctx.command_path if error.ctx else 'msae-sweep'} --help")
    return 2


def _say(line: str) -> None:
    # A path in the message may contain any character, including line breaks and terminal control codes.
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    print(f"msae-sweep: {line}", file=sys.stderr)


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
        typer.Option(
            "--resume", help="Continue the sweep of this name where it stopped; start it if it does not exist."
        ),
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Run a sweep: prepare the data, train the trials, log them to MLflow, and write the results and a report."""
    import yaml

    from msae_sweep import config

    named = {"data.path": data, "storage": storage, "name": name, "tracking.uri": tracking_uri}
    # Values are quoted as in JSON, so that YAML reads a path or URI as text and nothing else.
    options = [
        f"{key}={yaml.safe_dump(value, default_style=chr(34))}" for key, value in named.items() if value is not None
    ]
    _sweep_or_show(config.load(space, [*(overrides or []), *options]), resume=resume, dry_run=dry_run)


@app.command()
def resume(sweep: SweepPath, tracking_uri: TrackingUri = None, dry_run: DryRun = False) -> None:
    """Resume an interrupted sweep. Trials that have ended are not run again, except those that failed."""
    from msae_sweep.sweep.resume import load_config

    _sweep_or_show(load_config(sweep, tracking_uri), resume=True, dry_run=dry_run)


@app.command()
def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Activations: a folder, an .h5 or Parquet file, or `planted`.")
    ],
) -> None:
    """Show statistics of each block of activations in PATH, and the R² of its principal components."""
    from msae_sweep.config import DataConfig
    from msae_sweep.data import inspection
    from msae_sweep.data.sources.extraction_manifest import numbering_note

    open_console().print(inspection.render(inspection.inspect(DataConfig(path=path))))
    if note := numbering_note(path):
        open_console().print(f"note: {note}", highlight=False, soft_wrap=True)


app.command()(go.extract)
app.command()(go.boards)


@app.command()
def report(
    sweeps: Annotated[
        list[str], typer.Argument(metavar="SWEEP...", help="Sweep folders; several are compared side by side.")
    ],
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Folder or URI to write to; default: report/ in the first sweep's folder."),
    ] = None,
) -> None:
    """Write a report on sweeps: a self-contained HTML page, Markdown, CSV, figures, and a search space to run next."""
    from msae_sweep import report as reporting

    written = reporting.write(sweeps, out)
    for line in written.notes:
        print(line)
    print(f"report: {written.page}")
    for name in written.next_spaces:
        print(f"next: msae-sweep run {shlex.quote(f'{written.where}/{name}')}")


@app.command()
def ui(
    sweep: Annotated[str | None, typer.Argument(metavar="[SWEEP]", help="Sweep whose trials are compared.")] = None,
    tracking_uri: TrackingUri = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default only this machine can connect.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open a browser if there is one.")] = True,
) -> None:
    """Compare a sweep's trials in MLflow: on its tracking server, or on a server that runs here until Ctrl-C."""
    from msae_sweep.config import TrackingConfig
    from msae_sweep.track import mlflow_ui as pages

    folder, tracking = None, TrackingConfig(uri=tracking_uri)
    if sweep is not None:
        from msae_sweep.sweep.resume import config_of
        from msae_sweep.sweep_folder.folder import SweepFolder

        found = SweepFolder.at(sweep)
        folder, tracking = found.path, config_of(found, tracking_uri).tracking
    pages.serve(folder, tracking, where=sweep or "", host=host, port=port, open_browser=browser)


@app.command("track-sync")
def track_sync(sweep: SweepPath, tracking_uri: TrackingUri = None) -> None:
    """Send MLflow the events that a sweep could not send while it ran. It is safe to repeat this."""
    from msae_sweep.sweep.resume import config_of
    from msae_sweep.sweep_folder.folder import SweepFolder
    from msae_sweep.track.tracker import sync

    folder = SweepFolder.at(sweep)
    tracking = config_of(folder, tracking_uri).tracking
    with folder.lock_and_sync():
        report = sync(folder.path, tracking.uri, tracking, fetch=folder.fetch, on_progress=_Waiting().heard)
    if report.pending:
        raise TrackingError(str(report))
    print(report)


app.command()(models.export)
app.command()(models.encode)
app.command("eval")(models.evaluate)
app.command("import")(models.import_)


class _Waiting:
    """Prints why nothing can be sent, once for each reason, because a silent server is given up only after a minute."""

    def __init__(self) -> None:
        self._said = ""

    def heard(self, status: "TrackingStatus") -> None:
        if status.last_error and status.last_error != self._said:
            print(f"waiting for MLflow: {status.last_error}; trying again", flush=True)
        self._said = status.last_error


def _sweep_or_show(config: "SweepConfig", *, resume: bool, dry_run: bool) -> None:
    if not dry_run:
        _sweep(config, resume=resume)
        return
    from msae_sweep.sweep.dry_run import print_plan

    print_plan(config, resume=resume, console=open_console())


def _sweep(config: "SweepConfig", *, resume: bool) -> None:
    from msae_sweep.sweep.run import run as run_sweep

    console = open_console()
    command = shlex.join(["msae-sweep", *sys.argv[1:]])
    result = run_sweep(config, resume=resume, command=command, console=console)
    console.print(f"results: {result.folder}", highlight=False, soft_wrap=True)
    if result.report:
        console.print(f"report: {result.report}", highlight=False, soft_wrap=True)
    if result.tracking.pending:
        console.print(
            f"{result.tracking.pending} events were not sent to MLflow ({result.tracking.reason}); "
            f"send them later with: msae-sweep track-sync {result.folder}",
            highlight=False,
            soft_wrap=True,
        )
    if result.interrupted:
        console.print(f"interrupted; continue with: msae-sweep resume {result.folder}", highlight=False, soft_wrap=True)
        raise typer.Exit(signals.exit_code())
    if any(block["best"] is None for block in result.summary["blocks"].values()):
        raise typer.Exit(1)
