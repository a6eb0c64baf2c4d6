"""Everything msae_sweep raises on purpose.

    MsaeSweepError
    ├── ConfigError      the search-space file, --set or a command-line option says something that cannot be run
    ├── DataError        activations, games or weights are missing, malformed, or too few
    ├── DeviceError      the device asked for is not there
    ├── SweepError       a sweep cannot be started or resumed (name taken, data changed)
    │   └── StorageError  the sweep folder cannot be written or read: a full disk, a folder that became read-only
    └── TrackingError    MLflow could not be reached or refused; never raised inside a trial

Each message is one line that says what was wrong, the value seen, and what would be right.
"""


class MsaeSweepError(Exception):
    """Base of all errors that a user can mend; the CLI prints its message and exits with code 2."""


class ConfigError(MsaeSweepError):
    """A search-space file or an override says something that cannot be run."""


class DataError(MsaeSweepError):
    """Activations, game records or network weights are missing, malformed, or too few."""


class DeviceError(MsaeSweepError):
    """The device asked for is not there."""


class SweepError(MsaeSweepError):
    """A sweep cannot be started or resumed."""


class StorageError(SweepError):
    """The sweep folder cannot be written or read; with that mended the sweep can be resumed."""


class TrackingError(MsaeSweepError):
    """MLflow could not be reached, or refused; never raised inside a trial."""


def first_line(error: BaseException) -> str:
    """The first line of what another library says; its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
