"""A model in the format that the next tool reads.

`notebook` and `safetensors` keep everything: standardised weights, normalisation, all levels, history. SAELens and
EleutherAI's sparsify know one k and raw activations; there the normalisation is folded into the weights, exactly:

    x = (a − mean) / std,  pre_acts = (x − pre_bias) W_encᵀ,  x̂ = z W_dec + pre_bias,  â = x̂ · std + mean

is, with b_dec = pre_bias · std + mean, and columns scaled,

    pre_acts = (a − b_dec) (W_enc / std)ᵀ,  â = z (W_dec · std) + b_dec

which is what both compute: each subtracts b_dec from its input. Codes stay the same number for number, and there is no
encoder bias. Rows of the folded decoder have no unit norm, so both are told not to normalise them.

Checked with the packages themselves by `tests/models/check_exports.py`; versions stand there.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float32

import msae_sweep
from msae_sweep.errors import ConfigError, first_line
from msae_sweep.models.find import FoundModel
from msae_sweep.paths import check_folder
from msae_sweep.sae import model_file
from msae_sweep.sae.model_file import ModelFile

Format = Literal["notebook", "safetensors", "saelens", "sparsify"]

LOADERS: dict[Format, str] = {
    "notebook": (
        'msae_sweep.load("{path}"), or, without this package, import torch, numpy as np; '
        "torch.serialization.add_safe_globals([np._core.multiarray._reconstruct, np.ndarray, np.dtype, "
        'np.dtypes.Float32DType]); torch.load("{path}", weights_only=True)'
    ),
    "safetensors": 'safetensors.torch.load_file("{path}"), or msae_sweep.load("{path}")',
    "saelens": 'sae_lens.SAE.load_from_disk("{path}")',
    "sparsify": 'sparsify.SparseCoder.load_from_disk("{path}")',
}
"""How each format is read. The notebook's mean and std are numpy arrays, which torch reads without unpickling arbitrary
code only where their types are named."""


class Folded(NamedTuple):
    """An SAE on raw activations: pre_acts = (a − b_dec) W_encᵀ, â = TopK(ReLU(pre_acts)) W_dec + b_dec."""

    W_enc: Float32[np.ndarray, "hidden_dim input_dim"]
    W_dec: Float32[np.ndarray, "hidden_dim input_dim"]
    b_dec: Float32[np.ndarray, " input_dim"]


def fold(file: ModelFile) -> Folded:
    """A model with its normalisation in its weights; products are taken in float64 and rounded once."""
    W_enc, W_dec, pre_bias = (
        getattr(file.model, name).detach().cpu().double().numpy() for name in ("W_enc", "W_dec", "pre_bias")
    )
    mean, std = file.mean.astype(np.float64), file.std.astype(np.float64)
    folded = W_enc / std, W_dec * std, pre_bias * std + mean
    return Folded(*(np.ascontiguousarray(array, dtype=np.float32) for array in folded))


def export(found: FoundModel, format: str, out: str | Path, k: int | None = None) -> Path:
    """Write a model to `out`, which must not exist: a file for `notebook` and `safetensors`, a folder for the others.

    Args:
        k: the one k that SAELens and sparsify use, by default the model's largest level; the other formats have all.

    Returns:
        What was written: `out`, or the file in it where `out` is a folder that exists.

    Raises:
        ConfigError: no such format, a k that the format or the model cannot have, or something is there already.
    """
    file, out = found.file, Path(out).expanduser()
    if format not in get_args(Format):
        raise ConfigError(f"--format: {format} must be one of {', '.join(get_args(Format))}")
    if format in ("notebook", "safetensors"):
        if k is not None:
            raise ConfigError(f"--k: {format} keeps every k; leave it out")
        suffix = ".pt" if format == "notebook" else ".safetensors"
        if out.is_dir():
            out = out / f"msae{'' if found.block is None else f'_block{found.block}'}{suffix}"
        if out.suffix != suffix:
            raise ConfigError(f"--out: {out} must end in {suffix}, or be a folder that exists")
    elif k is not None and not 1 <= k <= file.model.hidden_dim:
        raise ConfigError(f"--k: {k} must be 1 to hidden_dim {file.model.hidden_dim}")
    if out.exists():
        raise ConfigError(f"--out: {out} exists; give another place")
    check_folder("--out", out.parent)
    k = file.model.k_levels[-1] if k is None else k
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        match format:
            case "notebook":
                model_file.save(file, out)
            case "safetensors":
                model_file.save_safetensors(file, out)
            case "saelens":
                _write_folder(out, lambda folder: _write_saelens(found, k, folder))
            case "sparsify":
                _write_folder(out, lambda folder: _write_sparsify(found, k, folder))
    except (OSError, RuntimeError) as error:  # of a full disk torch has an error of its own
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"--out: {out} cannot be written: {reason}") from None
    return out


def _write_saelens(found: FoundModel, k: int, folder: Path) -> None:
    """SAELens 6: architecture `topk`; W_enc is [d_in, d_sae] there."""
    from safetensors.numpy import save as serialise

    folded = fold(found.file)
    hidden_dim, input_dim = folded.W_enc.shape
    tensors = {
        "W_enc": np.ascontiguousarray(folded.W_enc.T),
        "b_enc": np.zeros(hidden_dim, dtype=np.float32),
        "W_dec": folded.W_dec,
        "b_dec": folded.b_dec,
    }
    (folder / "sae_weights.safetensors").write_bytes(serialise(tensors))
    config = {
        "architecture": "topk",
        "d_in": input_dim,
        "d_sae": hidden_dim,
        "k": k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        # Without a version from 6 on, it is read as a file of SAELens 5.
        "metadata": {"sae_lens_version": "6.0.0", **_origin(found)},
    }
    (folder / "cfg.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _write_sparsify(found: FoundModel, k: int, folder: Path) -> None:
    """EleutherAI's sparsify: an `encoder` that is a torch Linear, W_dec and b_dec."""
    from safetensors.numpy import save as serialise

    folded = fold(found.file)
    hidden_dim, input_dim = folded.W_enc.shape
    tensors = {
        "encoder.weight": folded.W_enc,
        "encoder.bias": np.zeros(hidden_dim, dtype=np.float32),
        "W_dec": folded.W_dec,
        "b_dec": folded.b_dec,
    }
    (folder / "sae.safetensors").write_bytes(serialise(tensors))
    config = {
        "activation": "topk",
        "d_in": input_dim,
        "num_latents": hidden_dim,
        # A whole number there, and not looked at where num_latents is given.
        "expansion_factor": max(1, round(hidden_dim / input_dim)),
        "k": k,
        "normalize_decoder": False,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
    }
    (folder / "cfg.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _origin(found: FoundModel) -> dict[str, Any]:
    model = found.file.model
    return {
        "exported_by": f"msae_sweep {msae_sweep.__version__}",
        "block": found.block,
        "k_levels": list(model.k_levels),
        "weighting": model.weighting,
    }


def _write_folder(out: Path, write: Callable[[Path], None]) -> None:
    """All of the folder or nothing."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as part:
        folder = Path(part) / out.name
        folder.mkdir()
        write(folder)
        folder.rename(out)
