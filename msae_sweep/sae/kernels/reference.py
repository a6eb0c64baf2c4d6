"""Plain reference: autograd through one sorted top-k and one dense decode for each disjoint group of ranks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Reconstruction(NamedTuple):
    """Output of one pass through the SAE, at every level."""

    x_hats: Float[Tensor, "levels batch input_dim"]
    """Reconstruction at each k, pre_bias included."""
    values: Float[Tensor, "batch k"]
    """Largest pre_acts after the ReLU, descending."""
    indices: Int[Tensor, "batch k"]
    """Numbers of the latents to which `values` belong."""


def reconstruct(
    x: Float[Tensor, "batch input_dim"],
    W_enc: Float[Tensor, "hidden_dim input_dim"],
    W_dec: Float[Tensor, "hidden_dim input_dim"],
    pre_bias: Float[Tensor, " input_dim"],
    k_levels: Sequence[int],
) -> Reconstruction:
    """Reconstruct `x` at every level: z_k = TopK_k(ReLU((x − pre_bias) W_encᵀ)), x̂_k = z_k W_dec + pre_bias.

    One sorted top-k of the largest level contains the codes of all levels. The x̂ of a level is that of the previous
    level plus the contribution of the level's own group of ranks.
    """
    pre_acts = (x - pre_bias) @ W_enc.T  # [batch, hidden_dim]
    values, indices = torch.relu(pre_acts).topk(k_levels[-1], dim=1, sorted=True)
    x_hat = pre_bias.expand_as(x)
    x_hats = []
    for low, high in zip((0, *k_levels), k_levels, strict=False):
        group = torch.zeros_like(pre_acts).scatter(1, indices[:, low:high], values[:, low:high])
        x_hat = x_hat + group @ W_dec
        x_hats.append(x_hat)
    return Reconstruction(torch.stack(x_hats), values, indices)
