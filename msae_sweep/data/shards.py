"""Ray Data prepares activations once: row ranges → split → statistics → standardised shards, on disk and in memory.

Two passes, each a Ray Data pipeline with one task a row range:

1. read the ranges, find non-finite rows, split, and sum the training rows' moments in float64 (merged on the driver as
   they stream in, so that its memory does not grow with the data);
2. read them again, standardise, write each range as one float32 `.npy` (training rows first, then validation rows) and
   keep it in the object store of the node that made it.

A later sweep reads the files instead; a shard that is lost with its node is made again by lineage, either way. The
source is read twice rather than materialised raw in between: that would need as much object store again, and spill,
while a second read of a memory map or HDF5 file costs less than the statistics do.
"""

import contextlib
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.data
from jaxtyping import Float32
from ray.data.block import BlockAccessor

from msae_sweep.config import DataConfig
from msae_sweep.data.source import BlockInfo, RowRange, Source, check, digest, open_source, select
from msae_sweep.data.split import Moments, is_validation, standardise
from msae_sweep.errors import DataError, MsaeSweepError, SweepError

__all__ = ["PreparedBlock", "check", "prepare"]

FORMAT = 1
"""Part of every key: raised when shards are written differently, so that old ones are not taken for new ones."""


@dataclass(frozen=True)
class PreparedBlock:
    """One block's standardised rows in the cluster's object stores; picklable, a few kilobytes."""

    block: int
    input_dim: int
    n_train: int
    n_val: int
    mean: Float32[np.ndarray, " input_dim"]
    """Of the training rows, raw units."""
    std: Float32[np.ndarray, " input_dim"]
    """The same; 1 for constant channels, which standardise to 0."""
    manifest: dict[str, Any]
    """Source fingerprint, split, counts, shards: the `manifest.json` beside the shards."""
    refs: list[ray.ObjectRef]
    """A shard each: training rows, then validation rows."""

    def train_shards(self) -> list[Callable[[], np.ndarray]]:
        """Functions that fetch the training rows [rows, input_dim] of a shard each.

        Read-only, and zero-copy where the shard is on this node.
        """
        return [functools.partial(_fetch, ref, i, 0, n) for ref, i, n, _ in self._shards() if n]

    def val_shards(self) -> list[Callable[[], np.ndarray]]:
        """The same for the validation rows."""
        return [functools.partial(_fetch, ref, i, n, n + n_val) for ref, i, n, n_val in self._shards() if n_val]

    def _shards(self) -> Iterator[tuple[ray.ObjectRef, int, int, int]]:
        for ref, (i, n_train, n_val) in zip(self.refs, self.manifest["shards"], strict=True):
            yield ref, i, n_train, n_val


def prepare(
    config: DataConfig,
    storage: str,
    *,
    batch_size: int,
    on_progress: Callable[[str], None] = lambda line: None,
) -> dict[int, PreparedBlock]:
    """Standardised shards of every wanted block; those prepared before under the same key are only loaded.

    Args:
        storage: shards lie in `{storage}/prepared/block{B}-{key}/`; a path that every node shares.
        batch_size: the largest in the sweep; fewer training rows are an error.

    Raises:
        DataError: the rows cannot be used; the message names file and rows.
        SweepError: `storage` cannot be written.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    source = open_source(config)
    prepared = {}
    for info in select(source.infos(), config):
        started = time.monotonic()
        key = _key(source, info, config)
        folder = Path(storage).absolute() / "prepared" / f"block{info.block}-{key}"
        manifest = _read_manifest(folder)
        how = "reused" if manifest else "prepared"
        if manifest is not None:
            refs = _load(folder, manifest)
        else:
            manifest, refs = _make(source, info, config, folder, key)
        if manifest["n_train"] < batch_size:
            raise DataError(
                f"{info.where}: {manifest['n_train']} training rows, fewer than training.batch_size {batch_size}; "
                "lower batch_size or give more rows"
            )
        mean, std = np.load(folder / "stats.npy", allow_pickle=False)
        prepared[info.block] = PreparedBlock(
            info.block, info.input_dim, manifest["n_train"], manifest["n_val"], mean, std, manifest, refs
        )
        on_progress(_say(manifest, how, time.monotonic() - started))
    return prepared


def _key(source: Source, info: BlockInfo, config: DataConfig) -> str:
    split = (config.seed, config.val_split, _split_by(info, config))
    return digest(FORMAT, source.fingerprint(info.block), split, config.use_given_stats, config.drop_nonfinite)


def _split_by(info: BlockInfo, config: DataConfig) -> str:
    return ("game_id" if info.has_groups else "row") if config.split_by == "auto" else config.split_by


def _rows_per_range(info: BlockInfo) -> int:
    """A 64th of the block, but 32 to 64 MiB of float32; by the data alone, as the order of streaming depends on it.

    Measured on two cores at 500,000 × 256: 8 MiB ranges take 7.1 s in all, as each task costs some 20 ms of its own.
    """
    row_bytes = 4 * info.input_dim
    return max(1, min(max(info.n_rows // 64, (32 << 20) // row_bytes), (64 << 20) // row_bytes))


class _Job(NamedTuple):
    """What the tasks of both reading passes need; travels to the workers."""

    source: Source
    ranges: list[RowRange]
    split_by: str
    seed: int
    val_split: float
    drop_nonfinite: bool

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of range i, whether each is held out, and whether each is finite."""
        row_range = self.ranges[i]
        x, groups = self.source.read(row_range)
        ids = groups if self.split_by == "game_id" else np.arange(row_range.first_row, row_range.first_row + len(x))
        assert ids is not None, "split by game_id is only chosen where the source has groups"
        finite = np.isfinite(x).all(axis=1)
        return x, is_validation(ids, self.seed, self.val_split), finite


def _measure(batch: dict[str, np.ndarray], job: Any) -> dict[str, Any]:
    """Pass 1 over one range: counts, the place of non-finite rows, the training rows' moments."""
    work: _Job = ray.get(job)
    i = int(batch["i"][0])
    x, held_out, finite = work.read(i)
    bad = np.flatnonzero(~finite)
    n, mean, m2 = Moments.of(x[~held_out & finite])
    return {
        "i": [i],
        "n_train": [n],
        "n_val": [int((held_out & finite).sum())],
        "n_bad": [len(bad)],
        "bad_first": [int(bad[0]) if len(bad) else -1],
        "bad_last": [int(bad[-1]) if len(bad) else -1],
        "mean": mean[np.newaxis],
        "m2": m2[np.newaxis],
    }


def _standardise(
    batch: dict[str, np.ndarray], job: Any, folder: Path, mean: np.ndarray, std: np.ndarray
) -> dict[str, Any]:
    """Pass 2 over one range: its standardised rows, training rows first; written, and kept as a shard."""
    work: _Job = ray.get(job)
    i = int(batch["i"][0])
    x, held_out, finite = work.read(i)
    order = np.concatenate([np.flatnonzero(~held_out & finite), np.flatnonzero(held_out & finite)])
    z = standardise(x[order], mean, std)
    _save(folder / _shard_name(i), z)
    return _shard(z, i)


def _read_shard(batch: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """One shard that was written before."""
    i = int(batch["i"][0])
    return _shard(np.load(folder / _shard_name(i), mmap_mode="r", allow_pickle=False), i)


def _shard(z: np.ndarray, i: int) -> dict[str, np.ndarray]:
    return {"x": z, "shard": np.full(len(z), i, dtype=np.int32)}


def _shard_name(i: int) -> str:
    return f"shard-{i:05d}.npy"


def _make(
    source: Source, info: BlockInfo, config: DataConfig, folder: Path, key: str
) -> tuple[dict[str, Any], list[ray.ObjectRef]]:
    """Both passes; the manifest is written last, as the mark that the shards are whole."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"storage: {folder} cannot be made: {error.strerror}") from None
    ranges = source.row_ranges(info.block, _rows_per_range(info))
    split_by = _split_by(info, config)
    work = _Job(source, ranges, split_by, config.seed, config.val_split, config.drop_nonfinite)
    job = ray.put(work)

    moments = Moments.of(np.empty((0, info.input_dim)))
    counts: dict[int, tuple[int, int]] = {}
    bad: list[tuple[RowRange, int, int, int]] = []
    with _plain_errors():
        for row in _over(range(len(ranges)), functools.partial(_measure, job=job)).iter_rows():
            counts[int(row["i"])] = int(row["n_train"]), int(row["n_val"])
            moments = moments.merge(Moments(int(row["n_train"]), row["mean"], row["m2"]))
            if row["n_bad"]:
                bad.append((ranges[int(row["i"])], int(row["n_bad"]), int(row["bad_first"]), int(row["bad_last"])))
    n_val = sum(held_out for _, held_out in counts.values())
    n_dropped = sum(count for _, count, _, _ in bad)
    if bad and not config.drop_nonfinite:
        row_range, _, first, last = min(bad)
        more = f" ({n_dropped} rows in all)" if n_dropped > 1 else ""
        raise DataError(
            f"{row_range.name(first, last)}: NaN or Inf{more}; mend them, or drop them with data.drop_nonfinite: true"
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
        if any(len(v) != info.input_dim for v in given):
            raise DataError(f"{info.where}: normalization_stats.npz has {len(given[0])} channels, not {info.input_dim}")
        mean, std = given

    # A range without a usable row makes no shard.
    kept = [i for i in range(len(ranges)) if sum(counts[i])]
    with _plain_errors():
        made = _over(kept, functools.partial(_standardise, job=job, folder=folder, mean=mean, std=std)).materialize()
    constant = np.flatnonzero(std == 0)
    _save(folder / "stats.npy", np.stack([mean, np.where(std == 0, 1.0, std)]).astype(np.float32))
    manifest = {
        "format": FORMAT,
        "key": key,
        "block": info.block,
        "source": {
            "where": info.where,
            "rows": info.n_rows,
            "dtype": info.dtype,
            "fingerprint": source.fingerprint(info.block),
        },
        "input_dim": info.input_dim,
        "split": {"by": split_by, "seed": config.seed, "val_split": config.val_split},
        "statistics": "given" if config.use_given_stats else "training rows",
        "n_train": moments.n,
        "n_val": n_val,
        "n_dropped": n_dropped,
        "constant_channels": constant.tolist(),
        "shards": [[i, *counts[i]] for i in kept],
    }
    _save_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    return manifest, _refs(made, manifest)


def _over(numbers: Iterable[int], function: Callable[..., dict[str, Any]]) -> ray.data.Dataset:
    """A Ray Data pipeline that calls `function` for each number, in a task of its own."""
    items = [{"i": i} for i in numbers]
    return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(function, batch_size=1)


def _load(folder: Path, manifest: dict[str, Any]) -> list[ray.ObjectRef]:
    """Shards that were written before, into the object stores."""
    with _plain_errors():
        numbers = [i for i, _, _ in manifest["shards"]]
        return _refs(_over(numbers, functools.partial(_read_shard, folder=folder)).materialize(), manifest)


def _refs(made: Any, manifest: dict[str, Any]) -> list[ray.ObjectRef]:
    refs: list[ray.ObjectRef] = made.to_arrow_refs()
    assert len(refs) == len(manifest["shards"]), "Ray Data cut a shard in two"
    return refs


def _fetch(ref: ray.ObjectRef, number: int, start: int, stop: int) -> np.ndarray:
    shard = BlockAccessor.for_block(ray.get(ref))
    assert int(shard.to_numpy("shard")[0]) == number, "shards are out of order"
    x: np.ndarray = shard.to_numpy("x")
    return x[start:stop]


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished preparation whose files are all there; None where it must be made (again)."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    row_bytes = 4 * manifest["input_dim"]
    for i, n_train, n_val in manifest["shards"]:
        file = folder / _shard_name(i)
        if not file.is_file() or file.stat().st_size < (n_train + n_val) * row_bytes:
            return None
    return manifest


def _save(file: Path, array: np.ndarray) -> None:
    """Write an array whole or not at all."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as opened:
            np.save(opened, array, allow_pickle=False)
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise SweepError(f"storage: {file} cannot be written: {error.strerror or error}") from None


def _save_text(file: Path, text: str) -> None:
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


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


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """What a task raised on purpose comes out as it was raised, without Ray's wrapping."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MsaeSweepError):
                raise type(cause)(_message(cause)) from None
            cause = getattr(cause, "cause", None) or cause.__cause__ or cause.__context__
        raise


def _message(error: MsaeSweepError) -> str:
    """Ray appends the worker's traceback to the text of an error that it carries over."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (
        (lines[-1] if len(lines) > 1 else lines[0]).removeprefix(f"{type(error).__module__}.").split("Error: ", 1)[-1]
    )
