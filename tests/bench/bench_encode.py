"""Benchmark of `msae-sweep encode`: the codes of all rows of a block, from files to files.

    python tests/bench/bench_encode.py [--rows 500000] [--input-dim 256] [--hidden-dim 4096] [--k 128] [--save FILE]
                                       [--dense-rows 0]

Rows and model are random; the rows lie in npy chunks of 50,000, as the original series writes them. Everything is
written in a temporary folder. The codes of a sample of rows are compared with `MSAE.encode`, and no row is printed if
they differ. The time runs from the call to the last file written, without imports. `--dense-rows N` also writes the
original series' dense file of N rows.
"""

import argparse
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

import machine
import numpy as np
import torch

import msae_sweep as ms
from msae_sweep.config import DataConfig
from msae_sweep.models import dense_codes, encode
from msae_sweep.models.find import FoundModel
from msae_sweep.sae.model import MSAE
from msae_sweep.sae.model_file import ModelFile

CHUNK_ROWS = 50_000


def write_rows(folder: Path, n_rows: int, input_dim: int) -> np.ndarray:
    """Write random rows as the series' chunks, and return the first thousand."""
    generator = np.random.default_rng(0)
    (folder / "block20").mkdir(parents=True)
    first: np.ndarray | None = None
    for number, start in enumerate(range(0, n_rows, CHUNK_ROWS)):
        rows = generator.standard_normal((min(CHUNK_ROWS, n_rows - start), input_dim), dtype=np.float32)
        np.save(folder / "block20" / f"chunk_{number:04d}.npy", rows)
        first = rows[:1000] if first is None else first
    assert first is not None
    return first


def random_model(input_dim: int, hidden_dim: int, k: int) -> FoundModel:
    torch.manual_seed(0)
    model = MSAE(input_dim, hidden_dim, [k])
    model.W_enc.data += 0.1 * torch.randn_like(model.W_enc)
    return FoundModel(ModelFile(model, np.zeros(input_dim, "f4"), np.ones(input_dim, "f4"), {}), 20, "random")


def check(path: Path, found: FoundModel, sample: np.ndarray) -> None:
    """Raise AssertionError if the codes of the first rows are not those of `MSAE.encode`."""
    with torch.no_grad():
        expected = found.file.model.encode(torch.from_numpy(sample)).numpy()
    np.testing.assert_allclose(ms.open_codes(path).dense(0, len(sample)), expected, rtol=1e-4, atol=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--input-dim", type=int, default=256)
    parser.add_argument("--hidden-dim", type=int, default=4096)
    parser.add_argument("--k", type=int, default=128)
    parser.add_argument("--dense-rows", type=int, default=0)
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = random_model(args.input_dim, args.hidden_dim, args.k)
    lines = [f"{machine.described(device)}; {args.rows:,} x {args.input_dim} float32 rows, {args.hidden_dim} latents"]
    with tempfile.TemporaryDirectory() as temporary:
        sample = write_rows(Path(temporary) / "data", args.rows, args.input_dim)
        plan = encode.make_encoding_plan(found, DataConfig(path=f"{temporary}/data"), None)
        # The first products load the libraries and clocks up; they belong to start-up.
        encode.encode_rows(found.file.model.on(device), sample, args.k)
        folder = encode.CodesFolder(f"{temporary}/codes", plan)
        started = time.perf_counter()
        encode.encode(folder, partial(encode.encode_here, model=found.file.model, device=device, write=folder.write))
        seconds = time.perf_counter() - started
        check(Path(temporary) / "codes", found, sample)
        n_bytes = sum(file.stat().st_size for file in Path(temporary, "codes").iterdir())
        lines.append(
            f"sparse, k = {args.k}   {seconds:.1f} s, {args.rows / seconds:,.0f} rows/s, {n_bytes / 1e6:,.0f} MB in "
            f"{plan.n_parts} files"
        )
        if args.dense_rows:
            write_rows(Path(temporary) / "few", args.dense_rows, args.input_dim)
            few = encode.make_encoding_plan(found, DataConfig(path=f"{temporary}/few"), None)
            file = dense_codes.DenseFile(Path(temporary) / "block20_features.h5", few)
            started = time.perf_counter()
            dense_codes.write_dense(file, found.file.model, device)
            seconds = time.perf_counter() - started
            size = file.path.stat().st_size / 1e6
            lines.append(f"dense file         {seconds:.1f} s, {args.dense_rows / seconds:,.0f} rows/s, {size:,.0f} MB")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        lines.append(f"memory             {peak:.2f} GiB at the most, data and model included")
    machine.report(lines, args.save)


if __name__ == "__main__":
    main()
