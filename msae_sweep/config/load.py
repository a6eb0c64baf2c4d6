"""Reading of a search-space file into one frozen `SweepConfig`, with the `--set a.b=c` overrides applied."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from msae_sweep.config.schema import SweepConfig
from msae_sweep.config.yaml_file import (
    apply_override,
    first_error_line,
    read_text,
    read_yaml,
    reject_overrides_of_varied_keys,
)
from msae_sweep.errors import ConfigError


def load(path: str | Path, overrides: Iterable[str] = (), *, source: str | None = None) -> SweepConfig:
    """Read a search-space file, apply the overrides and return the validated configuration.

    Args:
        path: path or URI of the file.
        overrides: texts of the form `a.b=c`; the right-hand sides are YAML.
        source: name of the file in error messages; the default is `path`.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or has an unknown key or an illegal value. The message names
            the first such error.
    """
    source = source or str(path)
    return parse(read_text(path, source), overrides, source=source)


def parse(text: str, overrides: Iterable[str] = (), *, source: str = "search space") -> SweepConfig:
    """Return the validated configuration of a search-space text, as `load` does; error messages call it `source`."""
    try:
        raw = read_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: must be a mapping with the keys {', '.join(SweepConfig.model_fields)}")
    overridden = dict(apply_override(raw, override) for override in overrides)
    try:
        config = SweepConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{source}: {first_error_line(error, SweepConfig)}") from None
    reject_overrides_of_varied_keys(overridden, config.space)
    return config
