"""Check whether a block's activations are still those that a sweep was prepared from."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from msae_sweep.data.prepare.passes import PreparationJob, range_digest, rows_per_range
from msae_sweep.data.sources.base import BlockInfo, Source, digest


def describe_change(
    source: Source,
    info: BlockInfo,
    manifest: Mapping[str, Any],
    origin: Mapping[str, Any],
    say: Callable[[str], None] = lambda line: None,
) -> str | None:
    """Return a line that names what changed in a block since it was prepared, or None if its rows are the same.

    Headers, file sizes and modification times are compared. If only the times differ, as after a copy, the rows are
    read and compared.

    Args:
        manifest: manifest of the prepared block.
        origin: `PreparedBlock.origin`; empty if an earlier version prepared the block.
        say: called with a line for the user before rows are read.
    """
    before = manifest["source"]
    if source.fingerprint(info.block) == before["fingerprint"]:
        return None
    now = {"rows": info.n_rows, "input_dim": info.input_dim, "dtype": info.dtype}
    then = {"rows": before["rows"], "input_dim": manifest["input_dim"], "dtype": before["dtype"]}
    for name, value in now.items():
        if value != then[name]:
            return f"{info.where}: {name} is now {value} but was {then[name]}"
    if not origin:
        return f"{info.where}: its files have other names, sizes or modification times than before"
    files_now, files_then = source.files(info.block), origin["files"]
    for name in sorted(files_now.keys() ^ files_then.keys()):
        return f"{info.where}: {name} is {'gone' if name in files_then else 'new'}"
    for name in sorted(files_now):
        if files_now[name][0] != files_then[name][0]:
            return f"{info.where}: {name} now has {files_now[name][0]} bytes but had {files_then[name][0]}"
    say(f"{info.where}: files were rewritten since they were prepared; checking whether their rows are the same")
    if _content(source, info, manifest["split"]) == origin["content"]:
        return None
    changed = [name for name, file in files_now.items() if list(file) != list(files_then[name])]
    when = f" ({_time(files_now[changed[0]][1])}, before {_time(files_then[changed[0]][1])})" if changed else ""
    return f"{info.where}: {', '.join(changed[:3]) or 'a file'} was rewritten{when} and contains other rows"


def _content(source: Source, info: BlockInfo, split: Mapping[str, Any]) -> str:
    """Return the digest of a block's rows and of each row's side of the split, computed as the preparation does."""
    ranges = source.row_ranges(info.block, rows_per_range(info))
    job = PreparationJob(source, ranges, split["by"], split["seed"], split["val_split"])
    parts = []
    for i in range(len(ranges)):
        x, held_out, _ = job.read(i)
        parts.append(range_digest(x, held_out))
    return digest(*parts)


def _time(ns: int) -> str:
    return datetime.fromtimestamp(ns / 1e9, UTC).isoformat(sep=" ", timespec="seconds")
