"""Search-space files: their keys (`schema`), reading their YAML (`yaml_file`), and how keys vary (`distribution`)."""

from msae_sweep.config.distribution import Distribution
from msae_sweep.config.schema import (
    DEAD_RATIO_ALLOWED,
    MODEL_NAME,
    AshaConfig,
    DataConfig,
    PlantedConfig,
    SweepConfig,
    TrackingConfig,
    TrainingConfig,
    Weighting,
    load,
    parse,
    registered_name,
)

__all__ = [
    "DEAD_RATIO_ALLOWED",
    "MODEL_NAME",
    "AshaConfig",
    "DataConfig",
    "Distribution",
    "PlantedConfig",
    "SweepConfig",
    "TrackingConfig",
    "TrainingConfig",
    "Weighting",
    "load",
    "parse",
    "registered_name",
]
