"""Benchmark of the preparation of activations: its time, cold and reused, and the memory that the driver needs.

    python tests/bench/bench_prepare.py [--blocks 1] [--rows 500000] [--input-dim 256] [--dtype float32] [--at-once 3]

The benchmark writes the same random rows as npy chunks, HDF5 and Parquet into a temporary folder, starts Ray, and
prepares each format twice: first cold, then reusing the result. Times begin after `ray.init`. Memory is the driver's
peak above its memory before the first preparation.
"""

import argparse
import os
import platform
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from msae_sweep.config import DataConfig
from msae_sweep.data.prepare import shards


def write(folder: Path, form: str, blocks: int, rows: int, input_dim: int, dtype: str) -> str:
    """Write blocks of random rows in chunks of 50,000, and return data.path."""
    target = folder / form
    for block in range(blocks):
        (target / f"block{block}").mkdir(parents=True)
        for i, start in enumerate(range(0, rows, 50_000)):
            chunk = (
                np.random.default_rng([block, i])
                .standard_normal((min(50_000, rows - start), input_dim), dtype=np.float32)
                .astype(dtype)
            )
            if form == "npy":
                np.save(target / f"block{block}" / f"chunk_{i:04d}.npy", chunk)
            elif form == "hdf5":
                with h5py.File(target / "activations.h5", "a") as file:
                    dataset = file.require_dataset(f"block{block}", (rows, input_dim), dtype=dtype)
                    dataset[start : start + len(chunk)] = chunk
            else:
                column = pa.FixedSizeListArray.from_arrays(pa.array(chunk.reshape(-1)), input_dim)
                path = target / f"block{block}" / f"{i:04d}.parquet"
                pq.write_table(pa.table({f"block{block}": column}), path, row_group_size=8192, compression="none")
    return str(target / "activations.h5" if form == "hdf5" else target)


def main() -> None:
    """Print one row per format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--input-dim", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--at-once", type=int, help="blocks; with 1, each waits for the whole of the one before it")
    args = parser.parse_args()
    shards.STANDARDISED_AT_ONCE = args.at_once or shards.STANDARDISED_AT_ONCE
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        forms = ("npy", "hdf5", "parquet")
        # The files are written in a child process, so that its memory does not count as the driver's.
        with ProcessPoolExecutor(1) as pool:
            paths = {
                form: pool.submit(write, folder, form, args.blocks, args.rows, args.input_dim, args.dtype).result()
                for form in forms
            }
        os.sync()  # otherwise pending writes would happen during the measurement
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        print(f"{args.blocks} x {args.rows:,} x {args.input_dim} {args.dtype}; {machine}; ray {ray.__version__}")
        for form, path in paths.items():
            for attempt in ("cold", "reused"):
                started = time.perf_counter()
                prepared = shards.prepare_blocks(DataConfig(path=path), str(folder / "storage"), batch_size=4096)
                seconds = time.perf_counter() - started
                peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
                print(f"{form:8} {attempt:7} {seconds:6.1f} s   driver +{peak:,.0f} MiB")
                del prepared
        ray.shutdown()


if __name__ == "__main__":
    main()
