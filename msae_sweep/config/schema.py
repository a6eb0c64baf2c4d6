"""Keys of a search-space file, validated and resolved once into frozen pydantic models.

This module imports neither torch nor ray nor mlflow, so a misspelt key is reported within a second.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from msae_sweep.config.distribution import Distribution
from msae_sweep.config.frozen_model import FrozenModel
from msae_sweep.config.yaml_file import (
    first_error_line,
    section,
    suggest,
)
from msae_sweep.errors import ConfigError

DEAD_RATIO_ALLOWED = 0.30
"""Share of dead latents above which the objective is reduced; it is the notebook's success criterion."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
PLANTED = "planted"
"""Value of `data.path` that selects the built-in data."""
MODEL_NAME = "msae"
"""Default of `tracking.model_name`."""

Weighting = Literal["uniform", "reverse"]
# The discriminator picks a member of the union before validation, so that errors are reported for that one only. Tags
# in brackets are not part of a key: `first_error_line` leaves them out of messages.
KLevels = Annotated[
    Annotated[tuple[Annotated[int, Field(ge=1)], ...], Tag("[list]")] | Annotated[str, Tag("[all]")],
    Discriminator(lambda levels: "[all]" if isinstance(levels, str) else "[list]"),
]


class PlantedConfig(FrozenModel):
    """Settings of the built-in data (`data.path: planted`): sparse combinations of a known, random dictionary."""

    rows: int = Field(40_000, ge=100)
    """Number of rows per block."""
    input_dim: int = Field(64, ge=2)
    """Width of a row."""
    dictionary_size: int = Field(256, ge=2)
    """Number of unit-norm directions in the true dictionary."""
    active: float = Field(12.0, gt=0)
    """Mean number of directions that are active in a row."""
    power: float = Field(0.7, ge=0)
    """Exponent of the power law of the directions' frequencies: the i-th most frequent fires with p ∝ i^-power."""
    noise: float = Field(0.05, ge=0)
    """Standard deviation of the noise in a channel, relative to the signal's root mean square per channel."""
    rows_per_group: int = Field(10, ge=1)
    """Number of rows in one group, a stand-in for one game. Rows of a group share some of their active directions."""
    seed: int = 0
    """Seed of the dictionary and the rows."""


class DataConfig(FrozenModel):
    """Location of the activations, and their split into training and validation rows."""

    path: str = Field(min_length=1)
    """Activation folder, `.h5` file, Parquet file or folder, or the word `planted`."""
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Residual blocks to sweep; null means every block found."""
    val_split: float = Field(0.1, gt=0, lt=1)
    """Share of rows (or of games, see `split_by`) that is held out for validation."""
    split_by: Literal["auto", "row", "game_id"] = "auto"
    """Unit of the split. `auto` splits by game if the data has a `game_id`, else by row. A split by row puts
    near-duplicates from one game on both sides."""
    seed: int = 0
    """Seed of the split and of nothing else, so that a sweep with another `search.seed` reuses the prepared shards."""
    use_given_stats: bool = False
    """Standardise with the folder's `normalization_stats.npz` instead of statistics of the training rows."""
    drop_nonfinite: bool = False
    """Drop rows with NaN or Inf and count them, instead of rejecting the data."""
    planted: PlantedConfig = PlantedConfig()
    """Settings of the built-in data; used only when `path` is `planted`."""

    @field_validator("blocks", mode="before")
    @classmethod
    def _blocks_as_list(cls, blocks: object) -> object:
        return [blocks] if isinstance(blocks, int) else blocks

    @field_validator("blocks")
    @classmethod
    def _blocks_distinct(cls, blocks: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if blocks is not None and (not blocks or len(set(blocks)) != len(blocks)):
            raise ValueError(f"{list(blocks)} must name at least one block, and none twice")
        return blocks


class TrainingConfig(FrozenModel):
    """Settings of one trial. Names and defaults follow the notebook."""

    k_levels: KLevels = (16, 32, 64, 128)
    """Sparsity levels in ascending order; a single level gives a plain TopK SAE. `all:128` puts every k up to 128 into
    the loss (the multi-budget SAE of arXiv 2505.24473) and measures R² at k/8, k/4, k/2 and k for k = 128, so that the
    two kinds can be compared."""
    expansion_factor: float = Field(16, gt=0, le=1e9)
    """Number of latents per input dimension: `hidden_dim = round(input_dim × expansion_factor)`."""
    weighting: Weighting = "uniform"
    """Weights of the levels in the loss: `uniform` weights all levels equally, `reverse` gives small k more weight."""
    learning_rate: float = Field(8e-4, gt=0)
    """Step size of Adam."""
    batch_size: int = Field(4096, ge=1)
    """Number of rows per training step."""
    epochs: int = Field(30, ge=1)
    """Maximum number of passes over the training rows."""
    early_stopping_patience: int | None = Field(5, ge=1)
    """Number of epochs without a better objective after which a trial ends; null trains for all `epochs`."""
    aux_k: int = Field(512, ge=0)
    """Number of dead latents that reconstruct the residual in the auxiliary loss; 0 turns that loss off.
    Source: arXiv 2406.04093, A.2."""
    aux_coefficient: float = Field(1 / 32, ge=0)
    """Weight of the auxiliary loss. Source: arXiv 2406.04093, A.2."""
    dead_after_samples: int | None = Field(None, ge=1)
    """Rows without firing after which a latent is dead in the auxiliary loss; null means one epoch of training rows."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Adam's decay rate of the gradient's running mean."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Adam's decay rate of the squared gradient's running mean."""
    adam_eps: float = Field(1e-8, gt=0)
    """Number that Adam adds to the denominator of its step."""
    normalize_decoder: bool = True
    """Keep decoder rows at unit norm, and project the part parallel to the row out of the gradient."""
    warmup_steps: int = Field(0, ge=0)
    """Number of steps over which the learning rate rises linearly from 0. The notebook has no warm-up: 0."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """Decay of the learning rate to 0 over the last `decay_fraction` of all steps. The notebook has `none`."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """Share of all steps, at the end of training, over which `decay` acts."""
    gradient_clip: float | None = Field(None, gt=0)
    """Maximum gradient norm over all parameters; null turns gradient clipping off."""
    pre_bias_init: Literal["zero", "geometric_median"] = "zero"
    """Initial `pre_bias`: zero, because the data is standardised, or the geometric median of the first batch."""
    encoder_init: Literal["transpose", "scaled"] = "transpose"
    """Initial `W_enc`: `transpose` takes the decoder's rows, and `scaled` multiplies these by the one factor that
    reconstructs the first batch best. R² with `scaled` is much higher in short runs and lower in long ones; figures are
    in the docstring of `encoder_scale` in `sae/state.py`."""
    precision: Literal["fp32", "tf32", "bf16"] = "bf16"
    """Arithmetic of matrix products on CUDA, with float32 weights and sums: bf16, which the fused step requires, tf32,
    or fp32 for full float32. CPU and MPS always use float32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of a trial; `auto` means CUDA if the trial holds a GPU, else MPS if available, else the CPU."""
    seed: int | None = None
    """Seed of initialisation and row order; null derives it from `search.seed`, the block and the trial number."""

    @field_validator("k_levels", mode="before")
    @classmethod
    def _k_levels_as_list(cls, k_levels: object) -> object:
        return [k_levels] if isinstance(k_levels, int) else k_levels

    @field_validator("k_levels")
    @classmethod
    def _k_levels_ascend(cls, k_levels: tuple[int, ...] | str) -> tuple[int, ...] | str:
        if isinstance(k_levels, str):
            if not re.fullmatch(r"all:[1-9]\d{0,5}", k_levels):
                raise ValueError(
                    f"{k_levels!r} must be a list such as [16, 32, 64, 128], or all:128 for every k to 128"
                )
            return k_levels
        if not k_levels or any(a >= b for a, b in itertools.pairwise(k_levels)):
            right = sorted(set(k_levels)) or [16, 32, 64, 128]
            raise ValueError(f"{list(k_levels)} must ascend without repeats; write {right}")
        return k_levels

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels of the model: the k at which R² is measured, in ascending order."""
        if isinstance(self.k_levels, str):
            largest = int(self.k_levels.removeprefix("all:"))
            return tuple(sorted({-(-largest // part) for part in (8, 4, 2, 1)}))
        return self.k_levels

    @property
    def loss_levels(self) -> tuple[int, ...]:
        """Every k whose reconstruction is in the loss, in ascending order."""
        return tuple(range(1, self.levels[-1] + 1)) if isinstance(self.k_levels, str) else self.k_levels

    def hidden_dim(self, input_dim: int) -> int:
        """Return the number of latents for rows of width `input_dim`.

        Raises:
            ConfigError: the largest k exceeds the number of latents.
        """
        hidden_dim = round(input_dim * self.expansion_factor)
        if self.levels[-1] > hidden_dim:
            raise ConfigError(
                f"training.k_levels: {self.levels[-1]} exceeds hidden_dim {hidden_dim} "
                f"(input_dim {input_dim} × expansion_factor {self.expansion_factor:g}); "
                "lower k or raise expansion_factor"
            )
        return hidden_dim


class SearchConfig(FrozenModel):
    """Number of trials, and the algorithm that proposes their settings."""

    algorithm: Literal["random", "grid", "optuna"] = "random"
    """Search algorithm: `random` draws each trial independently, `grid` runs every combination, and `optuna` learns
    from finished trials (TPE)."""
    trials_per_block: int | None = Field(None, ge=1)
    """Number of trials per block; null means 16, or the whole grid."""
    seed: int = 0
    """Seed of the proposals and of the trials' own seeds."""


class AshaConfig(FrozenModel):
    """Settings of asynchronous successive halving (ASHA). Source: arXiv 1810.05934."""

    grace_epochs: int = Field(3, ge=1)
    """Number of epochs that every trial trains before it is first judged; this is the first rung."""
    reduction_factor: int = Field(3, ge=2)
    """Factor between rungs, which are the epochs grace_epochs × reduction_factor^i. About one trial in
    `reduction_factor` passes each rung."""


class ResourcesConfig(FrozenModel):
    """Resources that one trial holds while it runs, and how it is restarted."""

    cpu: float = Field(1, gt=0)
    """CPU cores per trial; torch uses as many threads."""
    gpu: float | Literal["auto"] = "auto"
    """GPUs per trial: 0, a fraction below 1, or a whole number; `auto` means 1 if the cluster has a GPU, else 0."""
    max_failures: int = Field(3, ge=0)
    """Maximum number of times that a trial is restarted from its checkpoint after its worker or node was lost."""
    max_concurrent: int | None = Field(None, ge=1)
    """Maximum number of trials that run at once; null means that only the resources limit it."""
    checkpoint_seconds: float = Field(30, ge=0)
    """Seconds between two checkpoints of a trial, which also saves one when it has to wait for others. A lost trial
    resumes from its last checkpoint."""

    @field_validator("gpu")
    @classmethod
    def _gpu_share(cls, gpu: float | Literal["auto"]) -> float | Literal["auto"]:
        if gpu != "auto" and (gpu < 0 or (gpu > 1 and gpu != int(gpu))):
            raise ValueError(f"{gpu} must be auto, 0, a fraction below 1, or a whole number")
        return gpu


class TrackingConfig(FrozenModel):
    """Location of the MLflow runs, and registration of the best models."""

    uri: str | None = None
    """MLflow tracking URI; null means MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db` in the working folder."""
    experiment: str = "msae-sweep"
    """Name of the MLflow experiment. Use one experiment per study."""
    register_models: bool = True
    """Register each block's best model as `{model_name}-block{B}` with the alias `champion`."""
    model_name: str = Field(MODEL_NAME, pattern=NAME_PATTERN)
    """Prefix of the registered models' names. For built-in data, the default `msae` is replaced by `planted`, so that a
    toy model never becomes a new version of a real network's model."""


class SweepConfig(FrozenModel):
    """Content of a whole search-space file."""

    name: str = Field(pattern=NAME_PATTERN)
    """Name of the sweep and of its folder: letters, digits, `.`, `_`, `-`."""
    data: DataConfig
    """Location of the activations, and their split."""
    space: dict[str, Distribution] = Field(default_factory=dict)
    """Distribution over each training key that varies, by key."""
    training: TrainingConfig = TrainingConfig()
    """Settings that every trial shares unless `space` varies them."""
    search: SearchConfig = SearchConfig()
    """Number of trials, and the algorithm that proposes their settings."""
    asha: AshaConfig | None = AshaConfig()
    """Early stopping of poor trials by ASHA; null runs every trial to its end."""
    resources: ResourcesConfig = ResourcesConfig()
    """Resources that one trial holds."""
    tracking: TrackingConfig = TrackingConfig()
    """Settings of MLflow."""
    storage: str = "sweeps"
    """Folder (or URI) that holds the sweep folders and the prepared shards."""

    @model_validator(mode="before")
    @classmethod
    def _planted_models_have_their_own_name(cls, raw: object) -> object:
        if isinstance(raw, Mapping) and section(raw, "data").get("path") == PLANTED:
            tracking = section(raw, "tracking")
            if tracking.get("model_name", MODEL_NAME) == MODEL_NAME and raw.get("tracking") in (None, tracking):
                return {**raw, "tracking": {**tracking, "model_name": PLANTED}}
        return raw

    @field_validator("space", mode="before")
    @classmethod
    def _null_varies_nothing(cls, space: object) -> object:
        """Remove keys whose value is null, so that `--set space.KEY=null` removes a key from a file's space."""
        if not isinstance(space, Mapping):
            return {} if space is None else space
        return {key: distribution for key, distribution in space.items() if distribution is not None}

    @model_validator(mode="after")
    def _space_is_legal(self) -> Self:
        for key, distribution in self.space.items():
            if key not in TrainingConfig.model_fields:
                raise ValueError(f"space.{key}: no such training key; {suggest(key, TrainingConfig.model_fields)}")
            try:
                for value in distribution.corners():
                    TrainingConfig.model_validate({**self.training.model_dump(), key: value})
                distribution.check_fits(TrainingConfig.model_fields[key].annotation)
            except ValidationError as error:
                raise ValueError(f"space.{key}: {first_error_line(error)}") from None
            except ValueError as error:
                raise ValueError(f"space.{key}: {error}") from None
        if self.search.algorithm == "grid":
            for key, distribution in self.space.items():
                if distribution.kind not in ("grid", "choice"):
                    raise ValueError(f"space.{key}: grid search cannot use {distribution.kind}; use grid or choice")
            size = math.prod(len(d.values) for d in self.space.values())
            if self.search.trials_per_block not in (None, size):
                raise ValueError(
                    f"search.trials_per_block: {self.search.trials_per_block} but the grid has {size} combinations; "
                    f"write {size} or null"
                )
        epochs = min(int(e) for e in self.corners("epochs"))
        if self.asha is not None and self.asha.grace_epochs > epochs:
            raise ValueError(
                f"asha.grace_epochs: {self.asha.grace_epochs} exceeds training.epochs {epochs}; "
                "lower it or write asha: null"
            )
        return self

    def corners(self, key: str) -> tuple[Any, ...]:
        """Return the extreme values (or all options) that training key `key` can take in this sweep."""
        return self.space[key].corners() if key in self.space else (getattr(self.training, key),)

    def training_for(self, sampled: Mapping[str, Any]) -> TrainingConfig:
        """Return one trial's settings: the fixed ones, overridden by the sampled ones."""
        return TrainingConfig.model_validate({**self.training.model_dump(), **sampled})

    def n_trials_per_block(self) -> int:
        """Return the number of trials per block."""
        if self.search.algorithm == "grid":
            return math.prod(len(d.values) for d in self.space.values())
        return self.search.trials_per_block or 16

    def check_width(self, input_dim: int, block: int) -> None:
        """Check that every trial that the space can propose has at least k latents for rows of this width.

        Raises:
            ConfigError: the largest k exceeds the smallest hidden_dim.
        """
        smallest = min(float(e) for e in self.corners("expansion_factor"))
        largest_k = max(self.corners("k_levels"), key=lambda k: self.training_for({"k_levels": k}).levels[-1])
        try:
            self.training_for({"expansion_factor": smallest, "k_levels": largest_k}).hidden_dim(input_dim)
        except ConfigError as error:
            raise ConfigError(f"{error} (block {block})") from None

    def to_yaml(self) -> str:
        """Return the resolved configuration as YAML. `load` reads it back to an equal object."""
        raw = self.model_dump(mode="json")
        raw["space"] = {key: {d["kind"]: d["values"]} for key, d in raw["space"].items()}
        return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)

    def digest(self) -> str:
        """Return a hash of the configuration: twelve hex digits that change with any of its values."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def registered_name(model_name: str, block: int) -> str:
    """Return the name of a block's registered model; `model_name` is that of `TrackingConfig`."""
    return f"{model_name}-block{block}"
