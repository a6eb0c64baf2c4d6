"""Search-space files: their keys (`schema`), how keys vary (`distribution`), and reading (`load`, `yaml_file`)."""

from msae_sweep.config.distribution import Distribution
from msae_sweep.config.load import load, parse
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
