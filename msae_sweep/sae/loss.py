"""The training loss as pure functions: the weighted loss of all levels, and the auxiliary loss for dead latents."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from msae_sweep.config import Weighting


def level_weights(n_levels: int, weighting: Weighting) -> Float[Tensor, " levels"]:
    """Return the weights α of the levels, in ascending order of k; they sum to 1.

    `uniform`: 1/L each. `reverse`: α ∝ L, L−1, …, 1 (0.4, 0.3, 0.2, 0.1 for four), heavier on *small* k.
    Source: Zaigrajew et al. 2025 (arXiv 2502.20578) and its released code, whose comment says the opposite.
    """
    if weighting == "uniform":
        return torch.full((n_levels,), 1 / n_levels)
    descending = torch.arange(n_levels, 0, -1, dtype=torch.float32)
    return descending / descending.sum()


def reconstruction_loss(
    x: Float[Tensor, "batch input_dim"],
    x_hats: Float[Tensor, "levels batch input_dim"],
    weights: Float[Tensor, " levels"],
) -> Float[Tensor, ""]:
    """Return Σ_l α_l · mean((x̂_l − x)²)."""
    return weights @ (x_hats - x).square().mean(dim=(1, 2))


def aux_loss(
    x: Float[Tensor, "batch input_dim"],
    x_hat: Float[Tensor, "batch input_dim"],
    dead: Bool[Tensor, " hidden_dim"],
    W_enc: Float[Tensor, "hidden_dim input_dim"],
    W_dec: Float[Tensor, "hidden_dim input_dim"],
    pre_bias: Float[Tensor, " input_dim"],
    aux_k: int,
) -> Float[Tensor, ""]:
    """Return the relative error of reconstructing the SAE's residual from dead latents: ‖ê − e‖² / ‖e‖² of the batch.

    e = x − x̂ at the largest level, detached; ê = TopK_aux_k(ReLU(pre_acts of dead latents)) W_dec, without a bias.
    The gradient reaches W_dec *and* W_enc (and pre_bias through the encoder). The loss is 0 if no latent is dead or e
    is 0. It is one ratio for the batch, not a mean of the rows' ratios, so that rows that are already reconstructed
    well do not dominate.

    Source: Gao et al. 2024 (arXiv 2406.04093), A.2.
    """
    residual = (x - x_hat).detach()
    scale = residual.square().sum()
    (latents,) = dead.nonzero(as_tuple=True)
    if len(latents) == 0 or aux_k == 0:
        return x.new_zeros(())
    pre_acts = (x - pre_bias) @ W_enc[latents].T  # [batch, n_dead]: dead latents only, so no −∞ mask is needed
    values, indices = torch.relu(pre_acts).topk(min(aux_k, len(latents)), dim=1)
    codes = torch.zeros_like(pre_acts).scatter(1, indices, values)
    error = (codes @ W_dec[latents] - residual).square().sum()
    return torch.where(scale > 0, error / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0)
