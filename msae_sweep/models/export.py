"""Export a model to file formats that other tools read.

The formats `notebook` and `safetensors` keep everything: standardised weights, normalisation, all levels and history.
SAELens and EleutherAI's sparsify support a single k and expect raw activations, so the normalisation is folded into the
weights. This is exact. The model computes

    x = (a − mean) / std,  pre_acts = (x − pre_bias) W_encᵀ,  x̂ = z W_dec + pre_bias,  â = x̂ · std + mean

With b_dec = pre_bias · std + mean and scaled columns, this equals

    pre_acts = (a − b_dec) (W_enc / std)ᵀ,  â = z (W_dec · std) + b_dec

Both tools compute the latter, because each subtracts b_dec from its input. Every number of the code stays the same, and
there is no encoder bias. Rows of the folded decoder do not have unit norm, so both tools are configured not to
normalise them.

`tests/models/check_exports.py` checks the exports with the packages themselves and lists their versions.
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
"""Call that reads each format. The notebook's mean and std are numpy arrays. torch reads these without unpickling
arbitrary code (`weights_only`) only if their types are listed as safe."""


class Folded(NamedTuple):
    """SAE for raw activations: pre_acts = (a − b_dec) W_encᵀ, â = TopK(ReLU(pre_acts)) W_dec + b_dec."""

    W_enc: Float32[np.ndarray, "hidden_dim input_dim"]
    W_dec: Float32[np.ndarray, "hidden_dim input_dim"]
    b_dec: Float32[np.ndarray, " input_dim"]


def fold(file: ModelFile) -> Folded:
    """Return a model with its normalisation folded into its weights, computed in float64 and rounded once."""
    W_enc, W_dec, pre_bias = (
        getattr(file.model, name).detach().cpu().double().numpy() for name in ("W_enc", "W_dec", "pre_bias")
    )
    mean, std = file.mean.astype(np.float64), file.std.astype(np.float64)
    folded = W_enc / std, W_dec * std, pre_bias * std + mean
    return Folded(*(np.ascontiguousarray(array, dtype=np.float32) for array in folded))


def export(found: FoundModel, format: str, out: str | Path, k: int | None = None) -> Path:
    """Write a model to a new file (`notebook`, `safetensors`) or a new folder (the other formats).

    Args:
        out: path that must not exist yet. For `notebook` and `safetensors` it can also be an existing folder, in which
            a file is created.
        k: the single k that SAELens and sparsify use, by default the model's largest level. The other formats keep
            every k, so `k` must be None for them.

    Returns:
        Path that was written: `out`, or the file in it if `out` is an existing folder.

    Raises:
        ConfigError: the format does not exist, the format or the model does not allow `k`, or `out` exists already or
            cannot be written.
    """
    file, out = found.file, Path(out).expanduser()
    if format not in get_args(Format):
        raise ConfigError(f"--format: {format} must be one of {', '.join(get_args(Format))}")
    if format in ("notebook", "safetensors"):
        if k is not None:
            raise ConfigError(f"--k: {format} keeps every k; leave out --k")
        suffix = ".pt" if format == "notebook" else ".safetensors"
        if out.is_dir():
            out = out / f"msae{'' if found.block is None else f'_block{found.block}'}{suffix}"
        if out.suffix != suffix:
            raise ConfigError(f"--out: {out} must end in {suffix}, or be a folder that exists")
    elif k is not None and not 1 <= k <= file.model.hidden_dim:
        raise ConfigError(f"--k: {k} must be 1 to hidden_dim {file.model.hidden_dim}")
    if out.exists():
        raise ConfigError(f"--out: {out} exists; give another path")
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
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"--out: {out} cannot be written: {reason}") from None
    return out


def _write_saelens(found: FoundModel, k: int, folder: Path) -> None:
    """Write the format of SAELens 6: architecture `topk`, with W_enc of shape [d_in, d_sae]."""
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
        # Without a version of 6 or above, SAELens reads the file as one of SAELens 5.
        "metadata": {"sae_lens_version": "6.0.0", **_origin(found)},
    }
    (folder / "cfg.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _write_sparsify(found: FoundModel, k: int, folder: Path) -> None:
    """Write the format of EleutherAI's sparsify: `encoder`, which is a torch Linear, W_dec and b_dec."""
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
        # sparsify requires a whole number here, and ignores it because num_latents is given.
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
    """Create folder `out` atomically: it appears only after `write` has written all of its files."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as part:
        folder = Path(part) / out.name
        folder.mkdir()
        write(folder)
        folder.rename(out)
