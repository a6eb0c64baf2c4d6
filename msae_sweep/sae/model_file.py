"""Model files: the notebook's `msae_block{B}.pt`, and the same content as safetensors with a JSON file beside it.

A file in the notebook's format has the notebook's own state dict: `b_pre` [input_dim], `W_enc` [hidden_dim, input_dim],
`W_dec` [input_dim, hidden_dim], `activation_counts` [hidden_dim] and `total_samples`, all float32. It loads strictly
into the notebook's module. Files of earlier versions, with `pre_bias` and a transposed `W_dec`, are read as well.
"""

import io
import json
import re
import threading
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32

from msae_sweep.errors import DataError, first_line
from msae_sweep.sae.model import MSAE, StandardisedMSAE, parameter_shapes

_ALLOWING = threading.Lock()
"""Lock around torch's list of allowed globals. There is one list for the whole process, and a thread that finishes
reading would remove the entries that another thread still needs."""


class ModelFile(NamedTuple):
    """Trained MSAE with the normalisation that it needs to be used on raw activations, and its training history."""

    model: MSAE
    mean: Float32[np.ndarray, " input_dim"]
    std: Float32[np.ndarray, " input_dim"]
    """Standard deviation per channel, never 0: a channel that was constant in the training data has 1, whichever
    program wrote the file."""
    history: dict[str, Any]
    activation_counts: Float32[np.ndarray, " hidden_dim"] | None = None
    """Number of rows in which each latent was active at the largest k; None if nobody counted. A sweep counts over the
    validation rows, with the weights of the best epoch. The notebook counts over its training, at every k."""
    total_samples: int = 0
    """Number of rows over which `activation_counts` counts."""

    def standardised(self) -> StandardisedMSAE:
        """Return the model with its normalisation folded around it, for raw activations."""
        mean, std = (torch.from_numpy(np.array(v, dtype=np.float32)) for v in (self.mean, self.std))
        return StandardisedMSAE(self.model, mean, std)


def to_bytes(file: ModelFile) -> bytes:
    """Return the file as bytes in the notebook's format: model_state_dict, config, normalization (numpy), history."""
    buffer = io.BytesIO()
    torch.save(
        {
            "model_state_dict": _notebooks_tensors(file),
            "config": file.model.config,
            "normalization": {"mean": np.asarray(file.mean), "std": np.asarray(file.std)},
            "history": file.history,
        },
        buffer,
    )
    return buffer.getvalue()


def save(file: ModelFile, path: str | Path) -> None:
    """Write `file` to `path` in the notebook's format.

    Raises:
        OSError: the file cannot be written.
    """
    # torch reports a full disk as "unexpected pos 3520 vs 3414" when it writes to the path itself.
    Path(path).write_bytes(to_bytes(file))


def load(path: str | Path, content: bytes | None = None) -> ModelFile:
    """Read a file in the notebook's format without running any code from it (`weights_only`).

    Args:
        content: the file's bytes, if they have been read already; `path` is then used in error messages only.

    Tensors in the file may have other names and orientations than ours: they are recognised by their shapes, and the
    encoder and the decoder are distinguished by `enc` or `dec` in their names.

    Raises:
        DataError: the file is missing, has another format, or holds anything but tensors, arrays, numbers and text.
    """
    try:
        with _ALLOWING, warnings.catch_warnings(), torch.serialization.safe_globals(_numpy_globals()):
            warnings.simplefilter("ignore")  # about a foreign pickle's version; the error below gives the reason
            source = path if content is None else io.BytesIO(content)
            raw = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path}: no such model file") from None
    except Exception as error:
        # torch raises a different exception type for each way in which a file can be foreign. The first line of its
        # message advises to switch the safety off, so the reason is taken from the rest where that gives one.
        unknown, told = re.search(r"GLOBAL (\S+)", str(error)), re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        reason = f"it contains {unknown[1]}" if unknown else (told[1] if told else first_line(error))
        raise DataError(f"{path}: not a model file that can be read safely: {reason}") from None
    if isinstance(raw, dict) and "model_state_dict" in raw and "normalization" not in raw:
        raise DataError(f"{path}: has no normalization, like the notebook's msae_best.pt; give msae_block….pt")
    try:
        config = raw["config"]
        shapes = parameter_shapes(config["input_dim"], config["hidden_dim"])
        tensors = raw["model_state_dict"]
        model = MSAE(**config, parameters=_our_tensors(tensors, shapes))
        normalization = raw["normalization"]
        mean, std = (_statistics(normalization[name], model.input_dim) for name in ("mean", "std"))
        return ModelFile(
            model=model,
            mean=mean,
            std=np.where(std == 0, np.float32(1), std),
            history=_plain(raw["history"]),
            **_counts(tensors.get("activation_counts"), tensors.get("total_samples")),
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: not an MSAE model file: {first_line(error)}") from None


def verify_checksums(content: bytes) -> None:
    """Verify the checksums that torch saved in a model file; `torch.load` does not check them.

    Raises:
        ValueError: the bytes are not those that were saved.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise ValueError(f"it is truncated or not a torch file: {first_line(error)}") from None
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong")


def to_safetensors(file: ModelFile) -> tuple[bytes, bytes]:
    """Return tensors, mean and std in safetensors format, and config and history as the JSON file beside them."""
    from safetensors.numpy import save as serialise

    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in file.model.state_dict().items()}
    tensors |= {"normalization.mean": np.asarray(file.mean), "normalization.std": np.asarray(file.std)}
    beside: dict[str, Any] = {"config": file.model.config, "history": file.history}
    if file.activation_counts is not None:
        tensors["activation_counts"] = np.asarray(file.activation_counts, dtype=np.float32)
        beside["total_samples"] = file.total_samples
    return serialise(tensors), json.dumps(beside, indent=2).encode()


def save_safetensors(file: ModelFile, path: str | Path) -> None:
    """Write the tensors of `to_safetensors` to `path`, and its JSON to the same path with the suffix `.json`.

    Raises:
        OSError: a file cannot be written.
    """
    tensors, beside = to_safetensors(file)
    Path(path).write_bytes(tensors)
    Path(path).with_suffix(".json").write_bytes(beside)


def load_safetensors(path: str | Path) -> ModelFile:
    """Read the two files that `save_safetensors` wrote.

    Raises:
        DataError: one of the two files is missing or is not as written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(path)
    try:
        tensors = load_file(path)
        beside = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        normalization = [tensors.pop(f"normalization.{name}") for name in ("mean", "std")]
        counts = _counts(tensors.pop("activation_counts", None), beside.get("total_samples"))
        model = MSAE(**beside["config"], parameters={name: _float32(array) for name, array in tensors.items()})
        mean, std = (_statistics(values, model.input_dim) for values in normalization)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{path}: not a safetensors model with its .json: {first_line(error)}") from None
    std = np.where(std == 0, np.float32(1), std)
    return ModelFile(model=model, mean=mean, std=std, history=beside["history"], **counts)


def _notebooks_tensors(file: ModelFile) -> dict[str, torch.Tensor]:
    """Return the model's state dict under the notebook's names and in its orientation and order."""
    parameters = {name: tensor.detach().cpu() for name, tensor in file.model.state_dict().items()}
    counts = file.activation_counts
    return {
        "b_pre": parameters["pre_bias"],
        "W_enc": parameters["W_enc"],
        "W_dec": parameters["W_dec"].T.contiguous(),
        "activation_counts": torch.zeros(file.model.hidden_dim) if counts is None else _float32(counts),
        "total_samples": torch.tensor(float(file.total_samples)),
    }


def _counts(activation_counts: Any, total_samples: Any) -> dict[str, Any]:
    """Return the two fields of `ModelFile` that count; a file without counts, or with counts over no rows, has none."""
    if activation_counts is None or total_samples is None or not float(total_samples):
        return {}
    counts = np.asarray(activation_counts, dtype=np.float32)
    return {"activation_counts": counts, "total_samples": int(float(total_samples))}


def _statistics(values: Any, input_dim: int) -> Float32[np.ndarray, " input_dim"]:
    array = np.asarray(values, dtype=np.float32).reshape(-1)
    if array.shape != (input_dim,) or not np.isfinite(array).all():
        raise ValueError(f"normalization of shape {array.shape}; must be {input_dim} finite numbers")
    return array


def _our_tensors(tensors: Any, own: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return the model's parameters, found among the tensors of another class with the same arithmetic.

    Raises:
        ValueError: there is not exactly one encoder, one decoder and one bias of input_dim; or there is a bias on
            latents that is not 0.
    """
    if set(tensors) == set(own):
        return {name: _float32(tensor) for name, tensor in tensors.items()}
    if {"b_pre", "W_enc", "W_dec"} <= set(tensors) and tuple(tensors["W_dec"].shape) == own["W_dec"][::-1]:
        # Both matrices of a model with as many latents as inputs are square, so their shapes tell no orientation.
        named = {"pre_bias": tensors["b_pre"], "W_enc": tensors["W_enc"], "W_dec": tensors["W_dec"].T}
        return {name: _float32(tensor) for name, tensor in named.items()}
    hidden_dim, input_dim = own["W_enc"]
    found: dict[str, list[torch.Tensor]] = {name: [] for name in own}
    for name, tensor in tensors.items():
        shape, word = tuple(tensor.shape), name.lower()
        if sorted(shape) == sorted((hidden_dim, input_dim)) and hidden_dim != input_dim:
            part = "W_dec" if "dec" in word else "W_enc" if "enc" in word else name
            found.setdefault(part, []).append(tensor if shape == (hidden_dim, input_dim) else tensor.T.contiguous())
        elif shape == (input_dim,):
            found["pre_bias"].append(tensor)
        elif shape == (hidden_dim,) and ("bias" in word or word.startswith("b_")) and tensor.any():
            raise ValueError(f"{name} is a bias on latents, which an MSAE does not have")
        # Any other tensor is a counter or cache of training, and is ignored.
    if set(found) != set(own) or any(len(candidates) != 1 for candidates in found.values()):
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"cannot identify encoder, decoder and pre_bias among {shapes}")
    return {name: _float32(candidates[0]) for name, candidates in found.items()}


def _float32(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float32).contiguous()


def _plain(value: Any) -> Any:
    """Return `value` with NumPy and torch values replaced by Python numbers, lists and dicts, which JSON accepts."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.tolist() if isinstance(value, np.generic | np.ndarray | torch.Tensor) else value


def _numpy_globals() -> list[Any]:
    reconstruct, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    # Files written under numpy 1 and numpy 2 name the same function by two different paths.
    paths = ("numpy.core.multiarray", "numpy._core.multiarray")
    functions = [
        (f, f"{path}.{name}") for f, name in ((reconstruct, "_reconstruct"), (scalar, "scalar")) for path in paths
    ]
    dtypes = [type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64, np.int64)]
    # A history that was collected in a defaultdict(list) is read as a dict, the only mapping that torch fills.
    collected = [(_empty_dict, "collections.defaultdict"), (list, "builtins.list")]
    return [*functions, np.ndarray, np.dtype, *dtypes, *collected]


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}
