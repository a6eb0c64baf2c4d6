"""Prints the plan of a sweep without starting Ray or writing a file."""

import os
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from msae_sweep.config import Distribution, SweepConfig, registered_name
from msae_sweep.data.batches.loader import machine_bytes
from msae_sweep.data.prepare import shards
from msae_sweep.data.sources.base import BlockInfo
from msae_sweep.errors import DeviceError, SweepError
from msae_sweep.sweep.memory import model_of, shard_bytes, size
from msae_sweep.sweep.resources import starts_ray_here, too_few_error
from msae_sweep.sweep.run import check_before_ray
from msae_sweep.sweep.space import plan
from msae_sweep.sweep_folder.folder import SweepFolder
from msae_sweep.sweep_folder.trial_record import FINAL_STATUSES, TrialRecord
from msae_sweep.track.uri import redact

ROWS_SHOWN = 12
"""Maximum number of trials in the table; its title gives the number of all trials."""


def print_plan(config: SweepConfig, *, resume: bool, console: Console) -> None:
    """Print what `run` would do with the same arguments.

    Raises:
        MsaeSweepError: `run` would refuse the sweep before its first trial, as far as that is known without Ray.
    """
    config, folder, infos = check_before_ray(config, resume=resume)
    _check_writable(folder)
    _check_devices(config)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    say(f"{config.name}: {len(infos)} x {config.n_trials_per_block()} trials; nothing is started (--dry-run)")
    console.print(_blocks(config, infos))
    console.print(_trials(config, infos))
    for line in (_resumed(config, folder, infos), _stopping(config), _devices(config), *_destinations(config, folder)):
        if line:
            say(line)


def _blocks(config: SweepConfig, infos: Sequence[BlockInfo]) -> Table:
    reusable = shards.prepared_manifests(config.data, config.storage)
    table = Table(title=escape(f"Data: {redact(config.data.path)}"), title_justify="left")
    for heading in ("block", "rows", "width", "dtype", "split by", "prepared shards", "size"):
        table.add_column(heading, justify="right")
    for info in infos:
        by_game = info.has_groups if config.data.split_by == "auto" else config.data.split_by == "game_id"
        known = "reused" if info.block in reusable else "to be prepared"
        cells = (
            str(info.block),
            f"{info.n_rows:,}",
            str(info.input_dim),
            info.dtype,
            "game_id" if by_game else "row",
            known,
            size(shard_bytes(info)),
        )
        table.add_row(*cells)
    return table


def _trials(config: SweepConfig, infos: Sequence[BlockInfo]) -> Table:
    """Return the table of a block's trials, with their settings and the sizes of their models.

    For `optuna`, which proposes settings while the sweep runs, the table lists the distributions it chooses from.
    """
    widths = sorted({info.input_dim for info in infos})
    if config.search.algorithm == "optuna":
        table = Table(title="Trials of each block: proposed by optuna while the sweep runs", title_justify="left")
        for heading in ("setting", "distribution"):
            table.add_column(heading)
        for key, distribution in config.space.items():
            table.add_row(key, escape(_text(distribution)))
        for width in widths:
            ends = [model_of(width, float(factor)) for factor in config.corners("expansion_factor")]
            small, large = min(ends), max(ends)
            held = f"{size(small.state_bytes)} to {size(large.state_bytes)}"
            table.add_row(f"hidden_dim at width {width}", f"{small.hidden_dim:,} to {large.hidden_dim:,}, state {held}")
        return table
    records = plan(config, [infos[0].block])
    more = f"; the first {ROWS_SHOWN} of {len(records)}" if len(records) > ROWS_SHOWN else ""
    table = Table(title=f"Trials of each block ({config.search.algorithm} search{more})", title_justify="left")
    for heading in ("trial", *config.space, "hidden_dim", "parameters", "state"):
        table.add_column(heading, justify="right")
    for record in records[:ROWS_SHOWN]:
        models = [model_of(width, record.training(config.training).expansion_factor) for width in widths]
        table.add_row(
            f"{record.index:03d}",
            *(escape(_value(record.params[key])) for key in config.space),
            " / ".join(f"{model.hidden_dim:,}" for model in models),
            " / ".join(f"{model.n_parameters:,}" for model in models),
            " / ".join(size(model.state_bytes) for model in models),
        )
    return table


def _resumed(config: SweepConfig, folder: SweepFolder, infos: Sequence[BlockInfo]) -> str:
    if not folder.exists():
        return ""
    records, _ = folder.read_records()  # a trial whose record is damaged is trained again
    n_finished = sum(_is_finished(record) for record in records.values())
    n_begun = sum(not _is_finished(r) and (r.epochs > 0 or r.status != "pending") for r in records.values())
    n_left = config.n_trials_per_block() * len(infos) - n_finished - n_begun
    return f"resume: {n_finished} trials are finished, {n_begun} would be resumed, {n_left} would begin"


def _is_finished(record: TrialRecord) -> bool:
    return record.status in FINAL_STATUSES and record.status != "failed"  # a failed trial is tried again


def _stopping(config: SweepConfig) -> str:
    epochs = sorted({int(e) for e in config.corners("epochs")})
    most = f"at most {' to '.join(map(str, epochs))} epochs per trial"
    if config.asha is None:
        return f"early stopping: none by ASHA; {most}"
    asha = f"ASHA from epoch {config.asha.grace_epochs}, 1 in {config.asha.reduction_factor} continues"
    return f"early stopping: {asha}; {most}"


def _devices(config: SweepConfig) -> str:
    held = f"{config.resources.cpu:g} CPU and {config.resources.gpu} GPU per trial"
    if not starts_ray_here():
        return f"devices: {held}, on the Ray cluster to which the sweep connects"
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = ", ".join(
        f"{torch.cuda.get_device_name(i)} ({size(torch.cuda.get_device_properties(i).total_memory)})"
        for i in range(cuda)
    )
    here = f"{os.cpu_count()} CPUs, {gpus or 'no GPU'}, {size(machine_bytes())} of memory"
    return f"devices: {held}; this machine has {here}"


def _destinations(config: SweepConfig, folder: SweepFolder) -> tuple[str, ...]:
    tracking = config.tracking
    name = registered_name(tracking.model_name, 0).removesuffix("0")
    models = (
        f"each block's best model is registered as {name}{{B}}@champion"
        if tracking.register_models
        else "no model is registered"
    )
    return (
        f"results: {folder}",
        f"MLflow: {redact(str(tracking.uri))}, experiment {tracking.experiment}; {models}",
    )


def _check_writable(folder: SweepFolder) -> None:
    """Check that the folder can be written, as far as that shows without writing; an object store is not checked.

    Raises:
        SweepError: the folder cannot be written.
    """
    if "://" in str(folder):
        return
    there = next(path for path in (folder.path, *folder.path.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "not a folder" if not there.is_dir() else "no permission"
        raise SweepError(f"storage: {folder} cannot be written: {reason}: {there}")


def _check_devices(config: SweepConfig) -> None:
    """Check that this machine has the CPUs and GPUs of one trial, if Ray would be started on it.

    Raises:
        DeviceError: this machine has too few CPUs or GPUs.
    """
    if not starts_ray_here():
        return
    cpus, gpus = os.cpu_count() or 1, torch.cuda.device_count() if torch.cuda.is_available() else 0
    asked = config.resources
    if asked.cpu > cpus:
        raise too_few_error("cpu", asked.cpu, cpus)
    if asked.gpu != "auto" and asked.gpu > gpus:
        raise too_few_error("gpu", asked.gpu, gpus)
    if "cuda" in config.corners("device") and not (gpus if asked.gpu == "auto" else asked.gpu):
        raise DeviceError("training.device: cuda, but a trial gets no GPU; write resources.gpu: 1 if there is a GPU")


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(distribution: Distribution) -> str:
    return f"{distribution.kind}: {_value(distribution.values)}"
