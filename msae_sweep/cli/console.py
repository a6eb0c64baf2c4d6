"""Console that the commands print on."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def open_console() -> "Console":
    """Return a console. In a file or a job's log it is 160 columns wide, so that tables are not squeezed."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)
