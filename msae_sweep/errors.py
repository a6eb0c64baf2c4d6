"""Exceptions that msae_sweep raises on purpose.

    MsaeSweepError
    ├── ConfigError      the search-space file, a --set override or a command-line option is invalid
    ├── DataError        activations, games or weights are missing, malformed, or too few
    ├── DeviceError      the requested device is not available
    ├── FormatError      a newer msae_sweep wrote the folder in a format that this version cannot read
    ├── SweepError       a sweep cannot be started or resumed (name taken, data changed)
    │   └── StorageError  the sweep folder cannot be written or read: the disk is full, or the folder became read-only
    └── TrackingError    MLflow could not be reached or refused a request; never raised inside a trial

Each message is one line that says what was wrong, the value seen, and what would be right.
"""


class MsaeSweepError(Exception):
    """Base class of all errors that the user can fix. The CLI prints the message and exits with code 2."""


class ConfigError(MsaeSweepError):
    """A search-space file, a --set override or a command-line option is invalid."""


class DataError(MsaeSweepError):
    """Activations, game records or network weights are missing, malformed, or too few."""


class DeviceError(MsaeSweepError):
    """The requested device is not available."""


class FormatError(MsaeSweepError):
    """A newer msae_sweep wrote the folder in a format that this version cannot read."""


class SweepError(MsaeSweepError):
    """A sweep cannot be started or resumed."""


class StorageError(SweepError):
    """The sweep folder cannot be written or read. Once that is fixed, the sweep can be resumed."""


class TrackingError(MsaeSweepError):
    """MLflow could not be reached or refused a request. This error is never raised inside a trial."""


def first_line(error: BaseException) -> str:
    """Return the first non-blank line of an exception's message, or the exception's type if the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
