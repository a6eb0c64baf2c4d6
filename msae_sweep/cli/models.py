"""Commands on one model: export, eval, import. Each command imports its modules when it runs."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from msae_sweep.cli.console import open_console, rows_display
from msae_sweep.errors import ConfigError

if TYPE_CHECKING:
    from msae_sweep.models.evaluate import EvaluationReport

What = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Model file (.pt, .safetensors), sweep folder, champion:BLOCK, champion:NAME:BLOCK (another "
        "tracking.model_name), models:/NAME@ALIAS, models:/NAME/VERSION or runs:/RUN_ID.",
    ),
]
Rows = Annotated[
    Literal["all", "training", "validation"] | None,
    typer.Option(help="Rows to use, split as in a sweep; default: all with --data, else validation."),
]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda or mps.")]
Cluster = Annotated[bool, typer.Option("--cluster", help="Distribute the rows over a Ray cluster.")]
DataOverrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key of data, e.g. --set data.val_split=0.2. Repeatable."),
]
Block = Annotated[
    int | None, typer.Option("--block", help="Block of the model or data; required if there are several blocks.")
]
StoreUri = Annotated[
    str | None, typer.Option("--tracking-uri", help="MLflow tracking URI; default: MLFLOW_TRACKING_URI.")
]


def export(
    what: What,
    format: Annotated[str, typer.Option(help="File format: notebook, safetensors, saelens or sparsify.")],
    out: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            help="File (notebook, safetensors) or folder (saelens, sparsify) to write; with notebook, a .zip takes all "
            "models, results and figures of the sweep MODEL.",
        ),
    ],
    block: Block = None,
    k: Annotated[
        int | None, typer.Option(min=1, help="The single k of a saelens or sparsify model; default: the largest level.")
    ] = None,
    tracking_uri: StoreUri = None,
) -> None:
    """Write a model in a format that other tools read, or a sweep's models as the archive of the original notebook."""
    if format == "notebook" and out.suffix == ".zip":
        from msae_sweep.models.notebook_archive import export_archive

        archive = export_archive(what, out, block=block, k=k)
        left_out = f"; without {', '.join(archive.without)}, which the sweep has not written" if archive.without else ""
        print(f"{archive.path}: {', '.join(archive.names)}{left_out}")
        return
    from msae_sweep.models.export import LOADERS
    from msae_sweep.models.export import export as write
    from msae_sweep.models.find import find

    path = write(find(what, block, tracking_uri), format, out, k)
    print(f"{path}: {LOADERS[format].format(path=path)}")  # type: ignore[index]


def evaluate(
    what: What,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="PATH", help="Activations; default: the validation rows of the sweep MODEL."),
    ] = None,
    block: Block = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="WHAT", help="Another model to match latents with, e.g. one of another seed. Repeatable."),
    ] = None,
    rows: Rows = None,
    max_k: Annotated[
        int | None, typer.Option(min=1, help="Largest k to evaluate; default: the model's largest level.")
    ] = None,
    device: Device = "auto",
    cluster: Cluster = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file to write all results to.")] = None,
    figure: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Figure (.png or .svg) of R²(k) and firing frequencies to write."),
    ] = None,
    overrides: DataOverrides = None,
    tracking_uri: StoreUri = None,
) -> None:
    """Evaluate a model on any activations: R² at every k, dead latents, firing frequencies, decoder coherence."""
    import json

    from msae_sweep.models import evaluate
    from msae_sweep.models.evaluation_figure import check_suffix, evaluation_figure
    from msae_sweep.paths import check_file

    if figure is not None:
        check_suffix(figure)
        check_file("--figure", figure)
    if out is not None:
        check_file("--out", out)
    report = _evaluate(
        what,
        data=data,
        block=block,
        against=against or [],
        rows=rows,
        max_k=max_k,
        device=device,
        cluster=cluster,
        overrides=overrides,
        tracking_uri=tracking_uri,
    )
    open_console().print(evaluate.render(report), highlight=False)
    try:
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report.to_json(), indent=1, allow_nan=False), encoding="utf-8")
        if figure is not None:
            evaluation_figure(report.evaluation, figure, report.found.where, report.pca_r2)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}") from None


def encode(
    what: What,
    out: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            help="Folder of Parquet files to create or to continue, e.g. codes.parquet; with --format notebook an .h5 "
            "file, or the folder of block{B}_features.h5.",
        ),
    ],
    data: Annotated[
        str | None, typer.Option("--data", metavar="PATH", help="Activations; default: those of the sweep MODEL.")
    ] = None,
    block: Block = None,
    k: Annotated[
        int | None, typer.Option(min=1, help="Latents per row, sorted by value; default: the model's largest level.")
    ] = None,
    format: Annotated[
        Literal["parquet", "notebook"],
        typer.Option(
            help="parquet: sparse codes of every level up to k; notebook: all latents before any top-k, HDF5."
        ),
    ] = "parquet",
    device: Device = "auto",
    cluster: Cluster = False,
    tracking_uri: StoreUri = None,
) -> None:
    """Encode all rows of a block: sparse codes that hold every level up to k, or the original series' dense file."""
    import time
    from functools import partial

    from msae_sweep.models import dense_codes
    from msae_sweep.models import encode as encoding
    from msae_sweep.models.evaluate import check_unchanged, choose_evaluation_device, data_config_for
    from msae_sweep.models.find import find, names_a_folder

    if format == "notebook" and (k is not None or cluster):
        raise ConfigError(f"--{'k' if k is not None else 'cluster'}: only for --format parquet; leave it out")
    if cluster and device != "auto":
        raise ConfigError(f"--device: {device} applies to this machine only; leave it out with --cluster")
    config = data_config_for(what, data, ())
    found = find(what, block if names_a_folder(what) else None, tracking_uri)
    plan = encoding.make_encoding_plan(found, config, block, k)
    if data is None:
        check_unchanged(what, plan.rows, lambda line: print(line, file=sys.stderr))
    model, started, was_complete = found.file.model, time.monotonic(), False
    with rows_display(open_console()) as report:
        if format == "notebook":
            file = dense_codes.DenseFile(Path(out).expanduser(), plan)
            was_complete = not dense_codes.write_dense(file, model, choose_evaluation_device(device), report)
            text = f"{file.path}: {plan.rows.info.n_rows:,} rows x {model.hidden_dim:,} latents, before any top-k"
        else:
            folder = encoding.CodesFolder(out, plan)
            if cluster:
                from msae_sweep.sweep.ray_cluster import connect
                from msae_sweep.sweep.ray_encoding import encode_on_cluster

                connect()
                encoded = partial(encode_on_cluster, model=model, folder=folder)
            else:
                here = choose_evaluation_device(device)
                encoded = partial(encoding.encode_here, model=model, device=here, write=folder.write)
            was_complete = not encoding.encode(folder, encoded, report)
            text = f"{folder.place}: {plan.rows.info.n_rows:,} rows x {model.hidden_dim:,} latents, k = 1 to {plan.k}"
    state = "was complete already" if was_complete else f"{time.monotonic() - started:.1f} s"
    reader = "" if format == "notebook" else f'; msae_sweep.open_codes("{out}") reads it'
    open_console().print(f"{text}, {state}{reader}", highlight=False, soft_wrap=True)


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Model file: the notebook's .pt, or .safetensors.")],
    data: Annotated[
        str | None, typer.Option("--data", metavar="PATH", help="Activations; default: the validation rows of --sweep.")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="SWEEP", help="Sweep with whose trials MLflow compares the model.")
    ] = None,
    block: Annotated[
        int | None, typer.Option(help="Block of the model; required if the file name does not contain it.")
    ] = None,
    rows: Rows = None,
    model_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Register the model as NAME-blockB; default: the sweep's name for it, or msae."
        ),
    ] = None,
    champion: Annotated[bool, typer.Option("--champion", help="Also give the model the alias champion.")] = False,
    device: Device = "auto",
    cluster: Cluster = False,
    overrides: DataOverrides = None,
    tracking_uri: StoreUri = None,
) -> None:
    """Evaluate a model from elsewhere, e.g. the notebook, and register it in MLflow beside the models of sweeps."""
    import json

    from msae_sweep.config import parse
    from msae_sweep.models import evaluate
    from msae_sweep.models.find import find
    from msae_sweep.track.model_import import ModelImport, register_import
    from msae_sweep.track.uri import resolve_uri

    if file.is_dir():
        raise ConfigError(f"{file}: is a folder; give a model file")
    block = find(file).block if block is None else block
    if block is None:
        raise ConfigError(f"--block: the name of {file} contains no block number; give the model's block")
    if data is None and sweep is None:
        raise ConfigError("--data: missing; give activations, or give --sweep to use its validation rows")
    named = {} if model_name is None else {"model_name": model_name}
    asked = {"name": "import", "data": {"path": data or "."}, "tracking": named}
    tracking, sweep_id = parse(json.dumps(asked), source="--model-name").tracking, None
    if sweep is not None:
        from msae_sweep.sweep.resume import config_of
        from msae_sweep.sweep_folder.folder import SweepFolder

        folder = SweepFolder.at(sweep)
        tracking = config_of(folder, tracking_uri).tracking.model_copy(update=named)
        sweep_id = json.loads((folder.path / "identity.json").read_text(encoding="utf-8"))["sweep_id"]
    uri = resolve_uri(tracking_uri or tracking.uri)
    report = _evaluate(
        str(file), data=data, block=block, rows=rows, device=device, cluster=cluster, overrides=overrides, sweep=sweep
    )
    open_console().print(evaluate.render(report), highlight=False)
    measured = f"{report.evaluation.n_rows} {report.plan.side} rows of {report.plan.info.where}"
    what = ModelImport(
        report.found.file,
        block,
        f"import-{file.stem}",
        report.metrics(),
        {"imported_from": str(file.absolute()), "measured_on": measured},
    )
    imported = register_import(
        what,
        tracking_uri=uri,
        experiment=tracking.experiment,
        model_name=tracking.model_name,
        sweep_id=sweep_id,
        champion=champion,
    )
    print(f"registered: models:/{imported.model}/{imported.version} (run {imported.run_id})")


def _evaluate(
    what: str,
    *,
    data: str | None,
    block: int | None,
    rows: Literal["all", "training", "validation"] | None,
    device: str,
    cluster: bool,
    overrides: list[str] | None,
    against: Sequence[str] = (),
    max_k: int | None = None,
    tracking_uri: str | None = None,
    sweep: str | None = None,
) -> "EvaluationReport":
    from functools import partial

    from rich.progress import Progress

    from msae_sweep.models import evaluate
    from msae_sweep.models.find import find, names_a_folder

    overrides = overrides or []
    side = rows or ("validation" if data is None else "all")
    config = evaluate.data_config_for(what if sweep is None else str(sweep), data, overrides)
    # Unless MODEL is a folder, --block selects only the data's block: a model may be evaluated on another block.
    found = find(what, block if names_a_folder(what) else None, tracking_uri)
    others = [find(other, found.block if names_a_folder(other) else None, tracking_uri) for other in against]
    plan = evaluate.make_plan(found, config, block, side)
    if data is None and not any(override.startswith("data.path=") for override in overrides):
        evaluate.check_unchanged(what if sweep is None else sweep, plan, lambda line: print(line, file=sys.stderr))
    if cluster:
        from msae_sweep.sweep.ray_cluster import connect
        from msae_sweep.sweep.ray_evaluation import sums_on_cluster

        if device != "auto":
            raise ConfigError(f"--device: {device} applies to this machine only; leave it out with --cluster")
        connect()
        parts = sums_on_cluster
    else:
        parts = partial(evaluate.local_sums, device=evaluate.choose_evaluation_device(device))
    with Progress(console=open_console(), transient=True) as progress:
        task = progress.add_task("row ranges", total=plan.n_ranges)
        return evaluate.evaluate(
            found,
            plan,
            parts,
            max_k=max_k,
            against=others,
            on_progress=lambda done, _: progress.update(task, completed=done),
        )
