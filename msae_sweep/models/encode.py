"""Codes of all rows of a block, for `msae-sweep encode`: plan, and the sparse codes as a folder of Parquet files.

A folder of codes holds one Parquet file per row range and a manifest, `_codes.json`. pandas, pyarrow and DuckDB read
such a folder as one table; `codes.py` reads it as sparse or dense arrays. A row's entries are sorted by value, so that
the first k entries are the code at every smaller level k. Files are written atomically, and the manifest names the
question, so the same command continues after any interruption.
"""

import collections
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float32, UInt

import msae_sweep
from msae_sweep.config import DataConfig
from msae_sweep.errors import ConfigError, DataError
from msae_sweep.format_version import CODES, check_format
from msae_sweep.models.codes import MANIFEST, part_name
from msae_sweep.models.evaluate import EvaluationPlan, make_plan
from msae_sweep.models.find import FoundModel
from msae_sweep.paths import StoragePath
from msae_sweep.sae.evaluation import CHUNK_ELEMENTS, encode_sorted
from msae_sweep.sae.model import MSAE

_PREFETCHED = 2
"""Number of row ranges that are read in advance, and of parts that wait to be written."""


class EncodingPlan(NamedTuple):
    """Rows of one block to encode, and the model. A plan is picklable, and making it reads no rows."""

    rows: EvaluationPlan
    config: dict[str, Any]
    """Constructor arguments of the model."""
    k: int
    """Number of entries per row: the largest level that the codes hold."""
    identity: dict[str, Any]
    """Question that a folder of codes answers: model, data and k."""

    @property
    def n_parts(self) -> int:
        """Number of parts, one per row range."""
        return self.rows.n_ranges


class RangeCodes(NamedTuple):
    """Sparse codes of the rows of one range, sorted by value within each row."""

    values: Float32[np.ndarray, "rows k"]
    indices: UInt[np.ndarray, "rows k"]
    columns: dict[str, np.ndarray]
    """Columns that tell where each row comes from; see `data.sources.base.INDEX`."""


def make_encoding_plan(found: FoundModel, data: DataConfig, block: int | None, k: int | None = None) -> EncodingPlan:
    """Plan the encoding of all rows of a block.

    Args:
        found: the model.
        data: location of the activations.
        block: block of the data; by default the model's own block, or else the only block of the data.
        k: number of latents per row; by default the model's largest level.

    Raises:
        ConfigError: `k` is not 1 to hidden_dim, or several blocks are there and none is named.
        DataError: the block does not exist, or its rows have another width than the model's.
    """
    model = found.file.model
    k = model.k_levels[-1] if k is None else k
    if not 1 <= k <= model.hidden_dim:
        raise ConfigError(f"--k: {k} must be 1 to {model.hidden_dim}, the model's number of latents")
    rows = make_plan(found, data, block, "all")
    # Codes stand beside the index columns of their rows, so no row may be left out.
    rows = rows._replace(drop_nonfinite=False, nonfinite_advice="fix them, because every row gets a code")
    identity = {
        "model_sha256": _model_sha256(found),
        "data_fingerprint": rows.job.source.fingerprint(rows.info.block),
        "block": rows.info.block,
        "n_rows": rows.info.n_rows,
        "input_dim": model.input_dim,
        "hidden_dim": model.hidden_dim,
        "k_levels": list(model.k_levels),
        "k": k,
        "n_parts": rows.n_ranges,
    }
    return EncodingPlan(rows, model.config, k, identity)


class CodesFolder:
    """Folder of sparse codes that is being written, on a disk or in an object store."""

    def __init__(self, out: str, plan: EncodingPlan) -> None:
        self.place, self.plan = StoragePath(out), plan
        self._manifest = self.place / MANIFEST

    def begin(self) -> set[int]:
        """Create the folder, or check that it answers the same question; return the numbers of the finished parts.

        Raises:
            ConfigError: the folder holds other codes or something else, or cannot be written.
            FormatError: a newer msae_sweep wrote it in another format.
        """
        try:
            self.place.check()
            there = {file.name for file in self.place.files()} if self.place.is_folder() else set()
            # Files whose writing a kill interrupted.
            for name in {name for name in there if name.startswith(".") and name.endswith(".part")}:
                there.remove(name)
                (self.place / name).delete()
            if self.place.is_file() or (there and MANIFEST not in there):
                raise ConfigError(f"--out {self.place}: exists and holds no codes; give another folder")
            if there:
                found = json.loads(self._manifest.read())
                check_format(found, CODES, str(self._manifest))
                for key, value in self.plan.identity.items():
                    if found.get(key) != value:
                        raise ConfigError(
                            f"--out {self.place}: holds other codes, with {key} {found.get(key)!r} instead of "
                            f"{value!r}; give another folder"
                        )
            else:
                self._write_manifest(complete=False)
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"--out {self.place}: cannot be used: {error}") from None
        return {i for i in range(self.plan.n_parts) if part_name(i) in there}

    def write(self, i: int, codes: RangeCodes) -> None:
        """Write the codes of range `i` as a Parquet file, atomically."""
        k = codes.values.shape[1]
        columns = {
            "indices": pa.FixedSizeListArray.from_arrays(pa.array(codes.indices.reshape(-1)), k),
            "values": pa.FixedSizeListArray.from_arrays(pa.array(codes.values.reshape(-1)), k),
            **{name: pa.array(values) for name, values in codes.columns.items()},
        }
        buffer = pa.BufferOutputStream()
        # Dictionaries and statistics of the lists cost most of the time of writing and are used by no reader.
        pq.write_table(pa.table(columns), buffer, compression="none", use_dictionary=False, write_statistics=False)
        (self.place / part_name(i)).write(memoryview(buffer.getvalue()))

    def finish(self) -> None:
        """Mark the codes as complete."""
        self._write_manifest(complete=True)

    def _write_manifest(self, *, complete: bool) -> None:
        source = self.plan.rows.info.where
        content = {"format": CODES, "msae_sweep": msae_sweep.__version__, **self.plan.identity, "data": source}
        content["complete"] = complete
        self._manifest.write((json.dumps(content, indent=2) + "\n").encode())


def encode(
    folder: CodesFolder,
    encoded: Callable[[EncodingPlan, Sequence[int]], Iterator[int]],
    on_progress: Callable[[int, int], None] = lambda rows, n_rows: None,
) -> bool:
    """Encode all rows into a folder, continuing where an earlier call was interrupted; return False if it was complete.

    Args:
        folder: the folder to write.
        encoded: function that encodes and writes the given parts and yields each one's number of rows when it is
            written, e.g. `encode_here` for one device.
        on_progress: called with the number of encoded rows, of earlier calls too, and the number of all rows.

    Raises:
        ConfigError: the folder holds something else.
        DataError: a row contains NaN or Inf, or the disk is full; finished parts are kept.
    """
    plan = folder.plan
    done = folder.begin()
    left = [i for i in range(plan.n_parts) if i not in done]
    ranges, n_rows = plan.rows.job.ranges, plan.rows.info.n_rows
    rows = sum(ranges[i].stop - ranges[i].start for i in done)
    on_progress(rows, n_rows)
    try:
        for written in encoded(plan, left):
            rows += written
            on_progress(rows, n_rows)
        folder.finish()
    except KeyboardInterrupt as interrupt:
        interrupt.add_note("finished parts are kept; run the same command to continue")
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(
            f"{folder.place}: {reason}; finished parts are kept; run the same command to continue"
        ) from None
    return bool(left)


def encode_here(
    plan: EncodingPlan,
    parts: Sequence[int],
    *,
    model: MSAE,
    device: torch.device,
    write: Callable[[int, RangeCodes], None],
) -> Iterator[int]:
    """Encode parts in this process, while threads read the next ones and write the last ones; yield numbers of rows."""
    on_device = model.on(device)
    ahead = collections.deque(parts)
    reading: collections.deque[Future[tuple[np.ndarray, dict[str, np.ndarray]]]] = collections.deque()
    writing: collections.deque[tuple[Future[None], int]] = collections.deque()
    with ThreadPoolExecutor(1) as readers, ThreadPoolExecutor(2) as writers:
        for i in parts:
            while ahead and len(reading) <= _PREFETCHED:
                reading.append(readers.submit(read_range, plan, ahead.popleft()))
            x, index = reading.popleft().result()
            codes = RangeCodes(*encode_rows(on_device, x, plan.k), index)
            writing.append((writers.submit(write, i, codes), len(x)))
            while len(writing) > _PREFETCHED:
                yield _finished(writing)
        while writing:
            yield _finished(writing)


def read_range(plan: EncodingPlan, i: int) -> tuple[Float32[np.ndarray, "rows input_dim"], dict[str, np.ndarray]]:
    """Return the standardised rows of range `i`, and their index columns.

    Raises:
        DataError: a row contains NaN or Inf.
    """
    return plan.rows.read(i).x, plan.rows.job.source.index(plan.rows.job.ranges[i])


@torch.no_grad()
def encode_rows(
    model: MSAE, x: Float32[np.ndarray, "rows input_dim"], k: int
) -> tuple[Float32[np.ndarray, "rows k"], UInt[np.ndarray, "rows k"]]:
    """Return the values, descending, and latents of standardised rows, computed in float32 on the model's device."""
    device = model.W_enc.device
    at_once = max(1, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cpu"]) // model.hidden_dim)
    parts = [
        encode_sorted(rows - model.pre_bias, model.W_enc, k)
        for rows in torch.split(torch.from_numpy(x).to(device), at_once)
    ]
    values, indices = (torch.cat(found) for found in zip(*parts, strict=True))
    narrow = np.uint16 if model.hidden_dim <= 1 << 16 else np.uint32
    return values.cpu().numpy(), indices.int().cpu().numpy().astype(narrow)


def _finished(writing: collections.deque[tuple[Future[None], int]]) -> int:
    written, rows = writing.popleft()
    written.result()
    return rows


def _model_sha256(found: FoundModel) -> str:
    """Return a hash of everything that decides a model's codes."""
    sha = hashlib.sha256()
    for tensor in found.file.model.state_dict().values():
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for statistics in (found.file.mean, found.file.std):
        sha.update(np.ascontiguousarray(statistics).tobytes())
    return sha.hexdigest()
