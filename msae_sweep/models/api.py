"""Python interface to trained models (`msae_sweep.load`): load a model, encode and decode raw activations."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from msae_sweep.errors import ConfigError, DataError
from msae_sweep.models.find import find
from msae_sweep.sae.evaluation import Evaluation, evaluate
from msae_sweep.sae.model_file import ModelFile

Array = TypeVar("Array", np.ndarray, Tensor)

CHUNK_ELEMENTS = 2**24
"""Maximum number of elements in the codes that `reconstruct` holds at a time."""


def load(
    what: str | Path,
    *,
    block: int | None = None,
    device: str | torch.device = "cpu",
    tracking_uri: str | None = None,
) -> "SAE":
    """Return the model that `what` names, ready for raw activations.

    Args:
        what: `models:/msae-block20@champion`, `models:/NAME/VERSION`, `runs:/RUN_ID`, `champion:20` or
            `champion:quickstart:20` (of another `tracking.model_name` than msae); a model file, `.pt` or
            `.safetensors`; or a sweep folder, e.g. `sweeps/quickstart`.
        block: block of the model to take, if `what` is a sweep folder.
        device: device that holds the weights.
        tracking_uri: MLflow tracking URI; by default MLFLOW_TRACKING_URI, else `mlflow.db` in the working folder.

    Raises:
        MsaeSweepError: the model does not exist or cannot be read.
    """
    found = find(what, block, tracking_uri)
    return SAE(found.file, block=found.block, where=found.where).to(device)


class SAE:
    """Trained MSAE for raw activations of shape [..., input_dim].

    `encode`, `decode` and `reconstruct` return an array for an array, and for a tensor a tensor on the same device. The
    weights are moved to the device of a tensor that is passed in. All results are float32 and without gradients.
    """

    def __init__(self, file: ModelFile, *, block: int | None = None, where: str = "") -> None:
        self.file = file
        """Content of the model file: `model`, `mean`, `std`, `history`."""
        self.block = block
        """Block on which the model was trained; None if its name does not contain it."""
        self.where = where
        """File or URI from which the model was loaded."""
        self._module = file.standardised().eval().requires_grad_(False)

    def __repr__(self) -> str:
        return (
            f"SAE(input_dim={self.input_dim}, hidden_dim={self.hidden_dim}, k_levels={list(self.k_levels)}, "
            f"block={self.block}, where={self.where!r})"
        )

    @property
    def input_dim(self) -> int:
        """Width of an activation."""
        return self.file.model.input_dim

    @property
    def hidden_dim(self) -> int:
        """Number of latents."""
        return self.file.model.hidden_dim

    @property
    def k_levels(self) -> tuple[int, ...]:
        """Levels (numbers of active latents) at which the model was trained. Methods accept any other k, too."""
        return self.file.model.k_levels

    @property
    def weighting(self) -> str:
        """Weighting of the levels in training: `uniform` or `reverse`."""
        return self.file.model.weighting

    @property
    def mean(self) -> Float[Tensor, " input_dim"]:
        """Mean of the training rows, in raw units."""
        return self._module.mean

    @property
    def std(self) -> Float[Tensor, " input_dim"]:
        """Standard deviation of the training rows, in raw units; 1 for constant channels."""
        return self._module.std

    @property
    def W_enc(self) -> Float[Tensor, "hidden_dim input_dim"]:
        """Encoder weights, for standardised rows."""
        return self._module.sae.W_enc

    @property
    def W_dec(self) -> Float[Tensor, "hidden_dim input_dim"]:
        """Dictionary: one unit-norm direction per latent, in standardised space. Multiply by `std` for raw units."""
        return self._module.sae.W_dec

    @property
    def pre_bias(self) -> Float[Tensor, " input_dim"]:
        """Vector that is subtracted before encoding and added after decoding, in standardised space."""
        return self._module.sae.pre_bias

    @property
    def history(self) -> dict[str, Any]:
        """Losses, R² and share of dead latents per epoch, in the notebook's format."""
        return self.file.history

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.W_enc.device

    def to(self, device: str | torch.device) -> "SAE":
        """Move the weights to `device` and return this object."""
        self._module.to(device)
        return self

    def encode(self, x: Array, k: int | None = None) -> Array:
        """Return codes [..., hidden_dim] of raw activations, with all but the `k` largest latents set to zero.

        By default `k` is the largest level.

        Raises:
            DataError: the last dimension of `x` is not input_dim.
            ConfigError: `k` is below 1 or above hidden_dim.
        """
        k = self._checked(k)
        return self._each(x, self.input_dim, lambda rows: self._module.encode(rows, k))

    def decode(self, codes: Array) -> Array:
        """Return raw activations [..., input_dim] from codes.

        Raises:
            DataError: the last dimension of `codes` is not hidden_dim.
        """
        return self._each(codes, self.hidden_dim, self._module.decode)

    def reconstruct(self, x: Array, k: int | None = None) -> Array:
        """Return `decode(encode(x, k))` without holding the codes of all rows in memory.

        Raises:
            DataError, ConfigError: as in `encode`.
        """
        k = self._checked(k)
        size = max(1, CHUNK_ELEMENTS // self.hidden_dim)

        def in_chunks(rows: Tensor) -> Tensor:
            parts = [self._module.decode(self._module.encode(part, k)) for part in torch.split(rows, size)]
            return torch.cat(parts)

        return self._each(x, self.input_dim, in_chunks)

    def evaluate(self, x: np.ndarray | Tensor, max_k: int | None = None) -> Evaluation:
        """Evaluate the model on raw rows: R² and L0 at every k up to `max_k`, and how often each latent fires.

        By default `max_k` is the largest level.

        Raises:
            DataError, ConfigError: as in `encode`.
        """
        max_k = self._checked(max_k)
        rows = self._rows(x, self.input_dim)

        def standardised() -> Iterator[Tensor]:
            for part in torch.split(rows, 8192):
                yield (part - self.mean) / self.std

        return evaluate(self._module.sae, standardised(), max_k=max_k)

    def _checked(self, k: int | None) -> int:
        k = self.k_levels[-1] if k is None else k
        if not 1 <= k <= self.hidden_dim:
            raise ConfigError(f"k: {k} must be 1 to hidden_dim {self.hidden_dim}")
        return k

    def _rows(self, x: np.ndarray | Tensor, width: int) -> Tensor:
        """Return `x` as float32 rows [n, width] on the weights' device, which follows the device of a tensor."""
        if isinstance(x, Tensor):
            self.to(x.device)
        if x.ndim == 0 or x.shape[-1] != width:
            raise DataError(f"array of shape {tuple(x.shape)}; must end in {width}")
        tensor = x if isinstance(x, Tensor) else torch.from_numpy(np.array(x, dtype=np.float32))
        return tensor.detach().to(self.device, torch.float32).reshape(-1, width)

    @torch.no_grad()
    def _each(self, x: Array, width: int, function: Callable[[Tensor], Tensor]) -> Array:
        """Apply `function` to the rows of `x`. The result has the type and the leading dimensions of `x`."""
        result = function(self._rows(x, width))
        result = result.reshape(*x.shape[:-1], result.shape[-1])
        return result if isinstance(x, Tensor) else result.cpu().numpy()
