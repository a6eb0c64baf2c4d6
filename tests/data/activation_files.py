"""Functions that write the same rows in every format that can be read."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

INPUT_DIM = 6
N_ROWS = 500


Writer = Callable[..., str]


def write_npy(folder: Path, x: np.ndarray, games: np.ndarray | None = None, block: int = 5, chunks: int = 3) -> str:
    """Write the notebook's folder layout and return data.path."""
    (folder / f"block{block}").mkdir(parents=True, exist_ok=True)
    for i, chunk in enumerate(np.array_split(x, chunks)):
        np.save(folder / f"block{block}" / f"chunk_{i:04d}.npy", chunk)
    if games is not None:
        np.save(folder / "game_id.npy", games)
    return str(folder)


def write_h5(folder: Path, x: np.ndarray, games: np.ndarray | None = None, name: str = "block5") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "activations.h5", "a") as file:
        file[name] = x
        if games is not None and "game_id" not in file:
            file["game_id"] = games
    return str(folder / "activations.h5")


def table(x: np.ndarray, games: np.ndarray | None = None, name: str = "block5") -> pa.Table:
    columns = {name: pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])}
    if games is not None:
        columns["game_id"] = pa.array(games)
    return pa.table(columns)


def write_parquet(folder: Path, x: np.ndarray, games: np.ndarray | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(x, games), folder / "rows.parquet", row_group_size=70)
    return str(folder / "rows.parquet")


def write_arrow(folder: Path, x: np.ndarray, games: np.ndarray | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    pa.feather.write_feather(table(x, games), folder / "rows.arrow", chunksize=70, compression="uncompressed")
    return str(folder)


WRITERS: dict[str, Writer] = {"npy": write_npy, "hdf5": write_h5, "parquet": write_parquet, "arrow": write_arrow}
