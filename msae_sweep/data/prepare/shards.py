"""Prepare activations once with Ray Data: row ranges → split → statistics → standardised shards on disk and in memory.

There are two passes, each a Ray Data pipeline with one task per row range:

1. Read the ranges, find non-finite rows, split, and sum the training rows' moments in float64. The driver merges the
   moments as they stream in, so that its memory does not grow with the data.
2. Read the ranges again, standardise them, write each range as one float32 `.npy` (training rows first, then validation
   rows), and keep it in the object store of the node that made it.

A block is measured while the blocks before it are being standardised, because much of a pass's time is overhead of Ray
Data, during which cores and disk are idle.

A later sweep reads the files instead of preparing again. In both cases, a shard that is lost with its node is restored
by lineage reconstruction. The source is read twice; the raw rows are not materialised between the passes. That would
need the same amount of object store again, and spill, whereas a second read of an npy or HDF5 file costs less than the
statistics do.
"""

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.data
from jaxtyping import Float32
from ray.data.block import BlockAccessor

from msae_sweep.config import DataConfig
from msae_sweep.data.prepare.passes import PreparationJob, measure_range, read_shard, rows_per_range, standardise_range
from msae_sweep.data.prepare.ray_tasks import over_ranges, plain_errors
from msae_sweep.data.prepare.shard_folder import ShardFolder
from msae_sweep.data.prepare.split import RunningMoments
from msae_sweep.data.sources.base import BlockInfo, RowRange, Source, digest
from msae_sweep.data.sources.catalog import open_source, select_blocks
from msae_sweep.errors import DataError
from msae_sweep.format_version import PREPARED_SHARDS
from msae_sweep.paths import StoragePath

STANDARDISED_AT_ONCE = 3
"""Maximum number of blocks in the second pass. When it is reached, the next block is measured only after the oldest of
them is ready."""

PROGRESS_SECONDS = 10
"""Minimum number of seconds between two progress lines about the first pass. Its end is reported if it took longer than
this."""


@dataclass(frozen=True)
class PreparedBlock:
    """Standardised rows of one block, held in the cluster's object stores; picklable, a few kilobytes."""

    block: int
    input_dim: int
    n_train: int
    n_val: int
    mean: Float32[np.ndarray, " input_dim"]
    """Mean of the training rows, or the given mean (`data.use_given_stats`), in raw units."""
    std: Float32[np.ndarray, " input_dim"]
    """Std of the training rows, or the given std, in raw units; 1 for constant channels, which standardise to 0."""
    manifest: dict[str, Any]
    """Content of the `manifest.json` beside the shards: source fingerprint, split, counts and list of shards."""
    refs: list[ray.ObjectRef]
    """References to the shards, one each; a shard holds training rows, then validation rows."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Files of the source and the digest of their rows, for `data.prepare.changes`."""

    def train_shards(self) -> list[Callable[[], np.ndarray]]:
        """Return one function per shard with training rows, which fetches these rows [rows, input_dim].

        The arrays are read-only, and zero-copy if the shard is on this node.
        """
        return [functools.partial(_fetch, ref, i, 0, n) for ref, i, n, _ in self._shards() if n]

    def val_shards(self) -> list[Callable[[], np.ndarray]]:
        """Return functions like those of `train_shards`, but for the validation rows."""
        return [functools.partial(_fetch, ref, i, n, n + n_val) for ref, i, n, n_val in self._shards() if n_val]

    def _shards(self) -> Iterator[tuple[ray.ObjectRef, int, int, int]]:
        for ref, (i, n_train, n_val) in zip(self.refs, self.manifest["shards"], strict=True):
            yield ref, i, n_train, n_val


def prepare_blocks(
    config: DataConfig,
    storage: str,
    *,
    batch_size: int,
    on_progress: Callable[[str], None] = lambda line: None,
    on_ready: Callable[[PreparedBlock], None] = lambda prepared: None,
) -> dict[int, PreparedBlock]:
    """Return the standardised shards of every wanted block; a block prepared before under the same key is only loaded.

    Args:
        storage: an object store, or a path that every node shares; shards lie in `{storage}/prepared/block{B}-{key}/`.
        batch_size: the largest batch size in the sweep; fewer training rows are an error.
        on_progress: called with a progress line from time to time, from any thread.
        on_ready: called with each block when it is ready, from any thread.

    Raises:
        DataError: the rows cannot be used; the message names the file and the rows.
        SweepError: `storage` cannot be written.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = False
    # A failure is raised as an exception; Ray Data would print it as well.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    source = open_source(config)
    under_way: dict[int, Future[PreparedBlock]] = {}
    try:
        for info in select_blocks(source.infos(), config):
            for i, future in enumerate(under_way.values()):
                if future.done() or i <= len(under_way) - STANDARDISED_AT_ONCE:
                    future.result()
            finish = _begin(source, info, config, storage, batch_size, on_progress)
            under_way[info.block] = _in_background(finish, on_ready)
    finally:
        # Wait also if a block cannot be used: the blocks before it serve a later sweep, and Ray must not be shut down
        # while a thread uses it.
        wait(under_way.values())
    return {block: future.result() for block, future in under_way.items()}


def prepared_manifests(config: DataConfig, storage: str) -> dict[int, dict[str, Any]]:
    """Return the manifests of the wanted blocks that were prepared before and would only be loaded, by block number.

    Nothing is prepared or loaded by this call.
    """
    source = open_source(config)
    folders = {info.block: _folder(source, info, config, storage) for info in select_blocks(source.infos(), config)}
    manifests = {block: folder.manifest() for block, (folder, _) in folders.items()}
    return {block: manifest for block, manifest in manifests.items() if manifest is not None}


def _folder(source: Source, info: BlockInfo, config: DataConfig, storage: str) -> tuple[ShardFolder, str]:
    """Return the folder of a block's shards, and the block's key."""
    key = _key(source, info, config)
    return ShardFolder(StoragePath(storage) / "prepared" / f"block{info.block}-{key}"), key


def _begin(
    source: Source,
    info: BlockInfo,
    config: DataConfig,
    storage: str,
    batch_size: int,
    on_progress: Callable[[str], None],
) -> Callable[[], PreparedBlock]:
    """Measure a block unless it was prepared before, and return a function that does the rest of its preparation."""
    started = time.monotonic()
    folder, key = _folder(source, info, config, storage)
    manifest = folder.manifest()
    make: Callable[[], tuple[dict[str, Any], list[ray.ObjectRef]]]
    if manifest is None:
        measured, how = _measure(source, info, config, folder, on_progress), "prepared"
        n_train = measured.n_train
        make = functools.partial(_standardise, measured, info, config, folder, key)
    else:
        n_train, how = manifest["n_train"], "reused"
        make = functools.partial(_load, folder, manifest)
    if n_train < batch_size:
        raise DataError(
            f"{info.where}: {n_train} training rows, fewer than training.batch_size {batch_size}; "
            "lower batch_size or give more rows"
        )

    def finish() -> PreparedBlock:
        made, refs = make()
        mean, std = folder.stats()
        on_progress(_say(made, how, time.monotonic() - started))
        return PreparedBlock(
            block=info.block,
            input_dim=info.input_dim,
            n_train=made["n_train"],
            n_val=made["n_val"],
            mean=mean,
            std=std,
            manifest=made,
            refs=refs,
            origin=folder.origin(),
        )

    return finish


def _in_background(
    finish: Callable[[], PreparedBlock], on_ready: Callable[[PreparedBlock], None]
) -> Future[PreparedBlock]:
    """Call `finish`, then `on_ready`, in a daemon thread, so that an interrupted driver does not wait for data."""
    future: Future[PreparedBlock] = Future()

    def run() -> None:
        try:
            prepared = finish()
            on_ready(prepared)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(prepared)

    threading.Thread(target=run, name="standardising", daemon=True).start()
    return future


def _key(source: Source, info: BlockInfo, config: DataConfig) -> str:
    split = (config.seed, config.val_split, _split_by(info, config))
    return digest(PREPARED_SHARDS, source.fingerprint(info.block), split, config.use_given_stats, config.drop_nonfinite)


def _split_by(info: BlockInfo, config: DataConfig) -> str:
    return ("game_id" if info.has_groups else "row") if config.split_by == "auto" else config.split_by


class _Measured(NamedTuple):
    """Results of the first pass over a block."""

    job: PreparationJob
    counts: dict[int, tuple[int, int]]
    """Number of training rows and of validation rows in each range, by range number."""
    mean: np.ndarray
    std: np.ndarray
    """Standard deviation per channel; 0 for constant channels."""
    n_train: int
    n_val: int
    n_dropped: int
    content: str
    """Digest of the rows and of each row's side of the split."""


def _measure(
    source: Source, info: BlockInfo, config: DataConfig, folder: ShardFolder, on_progress: Callable[[str], None]
) -> _Measured:
    """Run the first pass, and raise an error if the rows cannot be used."""
    folder.create()
    ranges = source.row_ranges(info.block, rows_per_range(info))
    split_by = _split_by(info, config)
    job = PreparationJob(source, ranges, split_by, config.seed, config.val_split)

    moments = RunningMoments.of(np.empty((0, info.input_dim)))
    counts: dict[int, tuple[int, int]] = {}
    digests: dict[int, str] = {}
    bad: list[tuple[RowRange, int, int, int]] = []
    said = started = time.monotonic()
    with plain_errors():
        for row in over_ranges(range(len(ranges)), functools.partial(measure_range, job=job)).iter_rows():
            counts[int(row["i"])] = int(row["n_train"]), int(row["n_val"])
            digests[int(row["i"])] = row["digest"]
            moments = moments.merge(RunningMoments(int(row["n_train"]), row["mean"], row["m2"]))
            if row["n_bad"]:
                bad.append((ranges[int(row["i"])], int(row["n_bad"]), int(row["bad_first"]), int(row["bad_last"])))
            if time.monotonic() - said > PROGRESS_SECONDS:
                said = time.monotonic()
                on_progress(f"block {info.block}: {len(counts)} of {len(ranges)} row ranges measured")
    n_val = sum(held_out for _, held_out in counts.values())
    n_dropped = sum(count for _, count, _, _ in bad)
    if bad and not config.drop_nonfinite:
        row_range, _, first, last = min(bad)
        more = f" ({n_dropped} rows in all)" if n_dropped > 1 else ""
        raise DataError(
            f"{row_range.name(first, last)}: NaN or Inf{more}; fix them, or drop them with data.drop_nonfinite: true"
        )
    if not moments.n or not n_val:
        side, kind = ("validation" if moments.n else "training"), "game" if split_by == "game_id" else "row"
        raise DataError(
            f"data.val_split: {config.val_split} leaves no {side} rows of {info.where} "
            f"({moments.n + n_val} rows, split by {kind}); choose another val_split"
        )
    mean, std = moments.mean, moments.std()
    if config.use_given_stats:
        given = source.given_stats(info.block)
        assert given is not None, "checked before"
        mean, std = given
    if not np.isfinite(std).all():
        channel = int(np.flatnonzero(~np.isfinite(std))[0])
        raise DataError(f"{info.where}: values of channel {channel} overflow when squared in float64; scale them down")
    if time.monotonic() - started > PROGRESS_SECONDS:
        on_progress(f"block {info.block}: measured in {time.monotonic() - started:.0f} s; standardising")
    content = digest(*(digests[i] for i in range(len(ranges))))
    return _Measured(
        job=job,
        counts=counts,
        mean=mean,
        std=std,
        n_train=moments.n,
        n_val=n_val,
        n_dropped=n_dropped,
        content=content,
    )


def _standardise(
    measured: _Measured, info: BlockInfo, config: DataConfig, folder: ShardFolder, key: str
) -> tuple[dict[str, Any], list[ray.ObjectRef]]:
    """Run the second pass; the manifest is written last, because it marks the shards as complete."""
    job, counts, mean, std, n_train, n_val, n_dropped, content = measured
    # A range without usable rows gives no shard.
    kept = [i for i in range(len(job.ranges)) if sum(counts[i])]
    with plain_errors():
        made = over_ranges(
            kept, functools.partial(standardise_range, job=job, folder=folder, mean=mean, std=std)
        ).materialize()
    constant = np.flatnonzero(std == 0)
    folder.save_stats(mean, np.where(std == 0, 1.0, std))
    manifest = {
        "format": PREPARED_SHARDS,
        "key": key,
        "block": info.block,
        "source": {
            "where": info.where,
            "rows": info.n_rows,
            "dtype": info.dtype,
            "fingerprint": job.source.fingerprint(info.block),
        },
        "input_dim": info.input_dim,
        "split": {"by": job.split_by, "seed": config.seed, "val_split": config.val_split},
        "statistics": "given" if config.use_given_stats else "training rows",
        "n_train": n_train,
        "n_val": n_val,
        "n_dropped": n_dropped,
        "constant_channels": constant.tolist(),
        "shards": [[i, *counts[i]] for i in kept],
    }
    folder.save_origin({"files": job.source.files(info.block), "content": content})
    folder.save_manifest(manifest)
    return manifest, _refs(made, manifest)


def _load(folder: ShardFolder, manifest: dict[str, Any]) -> tuple[dict[str, Any], list[ray.ObjectRef]]:
    """Load shards that were written before into the object stores; return their manifest and references."""
    with plain_errors():
        numbers = [i for i, _, _ in manifest["shards"]]
        made = over_ranges(numbers, functools.partial(read_shard, folder=folder)).materialize()
    return manifest, _refs(made, manifest)


def _refs(made: Any, manifest: dict[str, Any]) -> list[ray.ObjectRef]:
    refs: list[ray.ObjectRef] = made.to_arrow_refs()
    assert len(refs) == len(manifest["shards"]), "Ray Data cut a shard in two"
    return refs


def _fetch(ref: ray.ObjectRef, number: int, start: int, stop: int) -> np.ndarray:
    shard = BlockAccessor.for_block(ray.get(ref))
    assert int(shard.to_numpy("shard")[0]) == number, "shards are out of order"
    x: np.ndarray = shard.to_numpy("x")
    return x[start:stop]


def _say(manifest: dict[str, Any], how: str, seconds: float) -> str:
    parts = [
        f"block {manifest['block']}: {how} {manifest['n_train']:,} training and {manifest['n_val']:,} validation rows "
        f"of width {manifest['input_dim']}, split by {manifest['split']['by']}, in {seconds:.1f} s"
    ]
    if constant := manifest["constant_channels"]:
        parts.append(f"{len(constant)} constant channels standardised to 0: {_some(constant)}")
    if manifest["n_dropped"]:
        parts.append(f"{manifest['n_dropped']:,} rows with NaN or Inf dropped")
    return "; ".join(parts)


def _some(numbers: list[int]) -> str:
    return ", ".join(str(n) for n in numbers[:8]) + (", …" if len(numbers) > 8 else "")
