"""Format versions of the folders that a later msae_sweep reads again.

A format's number increases only when an older msae_sweep could no longer read a folder correctly. A new key that older
versions may ignore does not change the number: every version keeps the keys that it does not know.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msae_sweep
from msae_sweep.errors import FormatError

SWEEP_FOLDER = 1
"""Format of a sweep folder, written to its `identity.json`."""
EXTRACTION = 2
"""Format of an extraction, written to its `manifest.json`. Format 1 numbered blocks from 1, format 2 from 0."""
PREPARED_SHARDS = 1
"""Format of a block's prepared shards. It is part of their key, so shards of another format are prepared anew."""


def check_format(content: Mapping[str, Any], supported: int, file: str | Path) -> None:
    """Check that this version can read what was written in the format that `content` states.

    Args:
        content: keys of `file`; a missing `format` means 1, because the first versions did not write it.
        supported: the newest format that this version reads.
        file: the file or URI, for the message.

    Raises:
        FormatError: the format is newer than `supported`.
    """
    found = content.get("format", 1)
    if isinstance(found, int) and found <= supported:
        return
    raise FormatError(
        f"{file}: format {found!r} was written by msae_sweep {content.get('msae_sweep', '(unknown)')}, but this is "
        f"msae_sweep {msae_sweep.__version__}, which reads formats up to {supported}; install a newer msae_sweep"
    )
