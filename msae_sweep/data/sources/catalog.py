"""Open the source at a path, and check from file headers alone whether the wanted blocks can be swept."""

from msae_sweep.config import DataConfig
from msae_sweep.data.sources.base import BlockInfo, Source, block_number
from msae_sweep.data.sources.hdf5 import Hdf5Source
from msae_sweep.data.sources.npy import NpySource
from msae_sweep.data.sources.parquet import SUFFIXES, ParquetSource
from msae_sweep.data.sources.planted import PlantedSource
from msae_sweep.errors import DataError, SweepError
from msae_sweep.paths import StoragePath


def open_source(config: DataConfig) -> Source:
    """Return the source at `data.path`; the kind of source is determined by the files found there.

    Raises:
        DataError: the path does not exist, or holds no activations that can be read.
    """
    if config.path == "planted":
        return PlantedSource(config.planted, config.blocks)
    try:
        path = StoragePath(config.path)
        path.check()
        return _source_at(path)
    except (SweepError, OSError) as error:
        raise DataError(f"data.path: {error}") from None


def _source_at(path: StoragePath) -> Source:
    info = path.info()
    if info.type.name == "NotFound":
        raise DataError(f"data.path: {path} does not exist; give a folder of activations, an .h5 or a Parquet file")
    if not info.is_file:
        chunks = [folder for folder in path.folders() if any(file.suffix == ".npy" for file in folder.files())]
        if any(block_number(folder.name) is not None for folder in chunks):
            return NpySource(path)
        if (path / "activations.h5").is_file():
            return Hdf5Source(path / "activations.h5")
        if any(file.suffix in SUFFIXES for file in path.files(recursive=True)):
            return ParquetSource(path)
    elif path.suffix in (".h5", ".hdf5"):
        return Hdf5Source(path)
    elif path.suffix in SUFFIXES:
        return ParquetSource(path)
    raise DataError(
        f"data.path: {path} holds no activations; expected block{{B}}/chunk_*.npy, an .h5 file, or Parquet/Arrow files"
    )


def check_blocks(config: DataConfig, *, batch_size: int) -> list[BlockInfo]:
    """Check the wanted blocks against the headers and the split settings, and return them; no rows are read.

    Raises:
        DataError: a block is missing, the files of a block do not match, game_id or given statistics are asked for and
            missing, or fewer training rows than a batch are left.
    """
    source = open_source(config)
    infos = select_blocks(source.infos(), config)
    for info in infos:
        if config.split_by == "game_id" and not info.has_groups:
            raise DataError(f"data.split_by: game_id, but {info.where} has no game_id; add one or write row")
        if round(info.n_rows * (1 - config.val_split)) < batch_size:
            raise DataError(
                f"{info.where}: {info.n_rows} rows leave about {round(info.n_rows * (1 - config.val_split))} for "
                f"training, fewer than training.batch_size {batch_size}; lower batch_size or give more rows"
            )
        if config.use_given_stats and source.given_stats(info.block) is None:
            raise DataError(f"data.use_given_stats: {info.where} has no normalization_stats.npz beside it")
    return infos


def select_blocks(infos: dict[int, BlockInfo], config: DataConfig) -> list[BlockInfo]:
    """Return the blocks that the configuration asks for, in the configuration's order; all blocks if it names none.

    Raises:
        DataError: a block that the configuration names is not in `infos`.
    """
    wanted = config.blocks or tuple(infos)
    for block in wanted:
        if block not in infos:
            found = ", ".join(str(b) for b in infos) or "none"
            raise DataError(f"data.blocks: no block {block} in {config.path}; found {found}")
    return [infos[block] for block in wanted]
