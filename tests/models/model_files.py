"""Model files that tests load, export and evaluate."""

from pathlib import Path

import numpy as np
import torch

from msae_sweep.sae import model_file
from msae_sweep.sae.model import MSAE
from msae_sweep.sae.model_file import ModelFile


def example_model_file(seed: int = 0, input_dim: int = 12, hidden_dim: int = 48, k_levels=(2, 4, 8)) -> ModelFile:
    """Return a file with untied encoder and decoder, bias, means and scales. Channel 3 was constant in training."""
    torch.manual_seed(seed)
    model = MSAE(input_dim, hidden_dim, k_levels, "reverse")
    model.W_enc.data += 0.1 * torch.randn_like(model.W_enc)
    model.pre_bias.data = 0.5 * torch.randn(input_dim)
    rng = np.random.default_rng(seed)
    mean, std = 3 * rng.normal(size=input_dim).astype("f4"), rng.uniform(0.2, 5, input_dim).astype("f4")
    std[3] = 1
    return ModelFile(model, mean, std, {"train_loss": [1.0, 0.5], "val_r2": {"r2_k2": [0.1, 0.2]}})


def raw_rows(file: ModelFile, n: int = 200, seed: int = 1) -> np.ndarray:
    z = np.random.default_rng(seed).normal(size=(n, file.model.input_dim))
    return (z * file.std + file.mean).astype(np.float32)


def sweep(folder: Path, blocks=(5, 20)) -> Path:
    """Write the models of a finished sweep into `folder`, and return it."""
    (folder / "models").mkdir(parents=True)
    for block in blocks:
        model_file.save(example_model_file(block), folder / "models" / f"msae_block{block}.pt")
        model_file.save_safetensors(example_model_file(block), folder / "models" / f"msae_block{block}.safetensors")
    return folder
