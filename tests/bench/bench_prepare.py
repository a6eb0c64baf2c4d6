"""How long preparing activations takes, cold and reused, and how much memory the driver needs for it.

    python tests/bench/bench_prepare.py [--rows 500000] [--input-dim 256]

Writes the same random rows as npy chunks, HDF5 and Parquet into a temporary folder, starts Ray, and prepares each once
cold and once again. Times are after `ray.init`; memory is the driver's peak above what it had before the first one.
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
from msae_sweep.data import shards


def write(folder: Path, form: str, rows: int, input_dim: int) -> str:
    """One block of float32 rows in chunks of 50,000; returns data.path."""
    target = folder / form
    (target / "block5").mkdir(parents=True)
    starts = range(0, rows, 50_000)
    chunks = ((i, np.random.default_rng(i).standard_normal((min(50_000, rows - s), input_dim), dtype=np.float32))
              for i, s in enumerate(starts))  # fmt: skip
    if form == "npy":
        for i, chunk in chunks:
            np.save(target / "block5" / f"chunk_{i:04d}.npy", chunk)
        return str(target)
    if form == "hdf5":
        with h5py.File(target / "activations.h5", "w") as file:
            dataset = file.create_dataset("block5", (rows, input_dim), dtype="f4")
            for i, chunk in chunks:
                dataset[i * 50_000 : i * 50_000 + len(chunk)] = chunk
        return str(target / "activations.h5")
    for i, chunk in chunks:
        column = pa.FixedSizeListArray.from_arrays(pa.array(chunk.reshape(-1)), input_dim)
        pq.write_table(pa.table({"block5": column}), target / "block5" / f"{i:04d}.parquet", row_group_size=8192,
                       compression="none")  # fmt: skip
    return str(target)


def main() -> None:
    """Print a row per format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--input-dim", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        forms = ("npy", "hdf5", "parquet")
        # Written in a child process, whose memory is not the driver's.
        with ProcessPoolExecutor(1) as pool:
            paths = {form: pool.submit(write, folder, form, args.rows, args.input_dim).result() for form in forms}
        os.sync()  # what is still to be written would be written meanwhile
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        print(f"{args.rows:,} x {args.input_dim} float32; {machine}; ray {ray.__version__}")
        for form, path in paths.items():
            for attempt in ("cold", "reused"):
                started = time.perf_counter()
                prepared = shards.prepare(DataConfig(path=path), str(folder / "storage"), batch_size=4096)
                seconds = time.perf_counter() - started
                peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
                print(f"{form:8} {attempt:7} {seconds:6.1f} s   driver +{peak:,.0f} MiB")
                del prepared
        ray.shutdown()


if __name__ == "__main__":
    main()
