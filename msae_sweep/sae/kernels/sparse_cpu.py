"""The same on a CPU through MKL's sparse products: no dense code is ever made, forward or backward.

At batch 4096, 4096 latents and 128 active ones the dense code is 97% zeros. `tests/bench/bench_step.py` measures both.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from msae_sweep.sae.kernels.reference import Reconstruction
from msae_sweep.sae.kernels.top_k_cpu import encode


def reconstruct(
    x: Float[Tensor, "batch input_dim"],
    W_enc: Float[Tensor, "hidden_dim input_dim"],
    W_dec: Float[Tensor, "hidden_dim input_dim"],
    pre_bias: Float[Tensor, " input_dim"],
    k_levels: Sequence[int],
) -> Reconstruction:
    """`reference.reconstruct`, with gradients for the three parameters (not for `x`), the same bits on every run."""
    x_hats, values, indices = _Reconstruct.apply(x, W_enc, W_dec, pre_bias, tuple(k_levels))  # type: ignore[no-untyped-call]
    return Reconstruction(x_hats, values, indices)


# Said by torch once in a process, of every CSR tensor; the proofs in tests/sae/test_kernels.py stand for it.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


class _Reconstruct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, W_dec: Tensor, pre_bias: Tensor, k_levels: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        centred = x - pre_bias
        values, indices = encode(centred, W_enc, k_levels[-1])
        codes = _grouped_codes(values, indices, len(W_enc), k_levels)
        x_hats = (codes @ W_dec).view(len(k_levels), *x.shape)
        # Running sums and the bias in place: cumsum would write another array of this size.
        x_hats[0] += pre_bias
        for level in range(1, len(k_levels)):
            x_hats[level] += x_hats[level - 1]
        ctx.save_for_backward(centred, W_enc, W_dec, codes)
        ctx.mark_non_differentiable(values, indices)
        return x_hats, values, indices

    @staticmethod
    def backward(ctx: Any, grad_x_hats: Tensor, *_: Any) -> tuple[None, Tensor, Tensor, Tensor, None]:
        assert not ctx.needs_input_grad[0], "x takes no gradient here; use the reference"
        centred, W_enc, W_dec, codes = ctx.saved_tensors
        (batch, input_dim), hidden_dim = centred.shape, len(W_enc)
        # A latent of group j stands in the reconstruction of every level from j on.
        grad_groups = grad_x_hats.clone()
        for level in range(len(grad_groups) - 2, -1, -1):
            grad_groups[level] += grad_groups[level + 1]
        grad_groups = grad_groups.view(-1, input_dim)  # [levels · batch, input_dim]
        values, latents = codes.values(), codes.col_indices()
        grad_values = torch.sparse.sampled_addmm(codes, grad_groups, W_dec.T, beta=0.0).values()
        grad_pre_acts = torch.where(values > 0, grad_values, 0)  # zero wherever the ReLU cut

        # The same entries ordered by latent: row n lists the (level, row) pairs in which latent n is active.
        by_latent = latents.to(torch.int32).argsort(stable=True)
        starts = torch.nn.functional.pad(torch.bincount(latents, minlength=hidden_dim).cumsum(0), (1, 0))
        group_rows = torch.repeat_interleave(codes.crow_indices().diff())[by_latent]
        by_group = _csr(starts, group_rows, values[by_latent], (hidden_dim, codes.shape[0]))
        by_row = _csr(starts, group_rows % batch, grad_pre_acts[by_latent], (hidden_dim, batch))
        # pre_bias is added after decoding, at every level, and subtracted before encoding.
        per_latent = torch.zeros(hidden_dim, dtype=values.dtype).scatter_add_(0, latents, grad_pre_acts)
        grad_pre_bias = grad_x_hats.sum(dim=(0, 1)) - per_latent @ W_enc
        return None, by_row @ centred, by_group @ grad_groups, grad_pre_bias, None


def _grouped_codes(values: Tensor, indices: Tensor, hidden_dim: int, k_levels: tuple[int, ...]) -> Tensor:
    """Codes as a CSR matrix [levels · batch, hidden_dim]: row j · batch + b holds row b's group j."""
    groups = list(zip((0, *k_levels), k_levels, strict=False))
    counts = torch.cat([torch.full((len(values),), high - low) for low, high in groups])
    return _csr(
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        torch.cat([indices[:, low:high].flatten() for low, high in groups]),
        torch.cat([values[:, low:high].flatten() for low, high in groups]),
        (len(counts), hidden_dim),
    )


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
