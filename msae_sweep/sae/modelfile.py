"""Model files: the notebook's `msae_block{B}.pt`, and the same as safetensors with JSON beside it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32

from msae_sweep.errors import DataError
from msae_sweep.sae.model import MSAE, StandardisedMSAE


class ModelFile(NamedTuple):
    """A trained MSAE with what it needs to be used on raw activations."""

    model: MSAE
    mean: Float32[np.ndarray, " input_dim"]
    std: Float32[np.ndarray, " input_dim"]
    """Never 0: a channel that was constant in training data has 1, whoever wrote the file."""
    history: dict[str, Any]

    def standardised(self) -> StandardisedMSAE:
        """The model with its normalisation folded around it, for raw activations."""
        mean, std = (torch.from_numpy(np.array(v, dtype=np.float32)) for v in (self.mean, self.std))
        return StandardisedMSAE(self.model, mean, std)


def save(file: ModelFile, path: str | Path) -> None:
    """Write the notebook's format: model_state_dict, config, normalization (numpy), history."""
    torch.save(
        {
            "model_state_dict": {name: tensor.detach().cpu() for name, tensor in file.model.state_dict().items()},
            "config": file.model.config,
            "normalization": {"mean": np.asarray(file.mean), "std": np.asarray(file.std)},
            "history": file.history,
        },
        path,
    )


def load(path: str | Path) -> ModelFile:
    """Read the notebook's format without running any code from it (`weights_only`).

    Raises:
        DataError: not such a file, or it holds anything but tensors, arrays, numbers and text.
    """
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path}: no such model file") from None
    except Exception as error:
        # torch raises a different type for each way in which a file can be foreign.
        raise DataError(f"{path}: not a model file that can be read safely: {str(error).splitlines()[0]}") from None
    try:
        model = MSAE(**raw["config"])
        model.load_state_dict(raw["model_state_dict"])
        normalization = raw["normalization"]
        mean, std = (_statistics(normalization[name], model.input_dim) for name in ("mean", "std"))
        return ModelFile(model, mean, np.where(std == 0, np.float32(1), std), raw["history"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: not an MSAE model file: {str(error).splitlines()[0]}") from None


def save_safetensors(file: ModelFile, path: str | Path) -> None:
    """Write tensors with mean and std as safetensors, and config with history as `.json` beside it."""
    from safetensors.numpy import save_file

    path = Path(path)
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in file.model.state_dict().items()}
    tensors |= {"normalization.mean": np.asarray(file.mean), "normalization.std": np.asarray(file.std)}
    save_file(tensors, path)
    beside = {"config": file.model.config, "history": file.history}
    path.with_suffix(".json").write_text(json.dumps(beside, indent=2), encoding="utf-8")


def load_safetensors(path: str | Path) -> ModelFile:
    """Read what `save_safetensors` wrote.

    Raises:
        DataError: one of the two files is missing or not as written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(path)
    try:
        tensors = load_file(path)
        beside = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        model = MSAE(**beside["config"])
        mean, std = (_statistics(tensors.pop(f"normalization.{n}"), model.input_dim) for n in ("mean", "std"))
        model.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{path}: not a safetensors model with its .json: {str(error).splitlines()[0]}") from None
    return ModelFile(model, mean, np.where(std == 0, np.float32(1), std), beside["history"])


def _statistics(values: Any, input_dim: int) -> Float32[np.ndarray, " input_dim"]:
    array = np.asarray(values, dtype=np.float32)
    if array.shape != (input_dim,) or not np.isfinite(array).all():
        raise ValueError(f"normalization of shape {array.shape}; must be {input_dim} finite numbers")
    return array


def _numpy_globals() -> list[Any]:
    reconstruct = np.zeros(1).__reduce__()[0]
    # Files written under numpy 1 and numpy 2 name the same function by two paths.
    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
    dtypes = [type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64, np.int64)]
    return [*((reconstruct, name) for name in names), np.ndarray, np.dtype, *dtypes]
