"""Reconstruction on a CPU through MKL's sparse products, which never builds a dense code, forward or backward.

At batch 4096, 256 inputs, 4096 latents and 128 active ones the dense code is 97% zeros. `tests/bench/bench_step.py`
measures the sparse and the dense way.
"""

import itertools
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
    """Compute `reference.reconstruct`, with gradients for the parameters only and the same bits on every run."""
    x_hats, values, indices = _Reconstruct.apply(x, W_enc, W_dec, pre_bias, tuple(k_levels))  # type: ignore[no-untyped-call]
    return Reconstruction(x_hats, values, indices)


# torch warns once per process that CSR tensors are in beta state; tests/sae/test_kernels.py verifies our use of them.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

# Weight gradients are summed over slabs of consecutive levels. A product gathers rows of the slab's gradients: those of
# one level (4 MB at the shape above) stay in cache, those of all four do not (14 against 24 ms, one thread). Each slab
# also reads and writes the weight gradients once, so 128 slabs for 128 levels take 1.5 times as long as 8 slabs.
MAX_SLABS = 8


class _Reconstruct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, W_dec: Tensor, pre_bias: Tensor, k_levels: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        centred = x - pre_bias
        values, indices = encode(centred, W_enc, k_levels[-1])
        codes = _grouped_codes(values, indices, len(W_enc), k_levels)
        x_hats = x.new_empty(len(k_levels), *x.shape)
        _product_(x_hats.view(-1, x.shape[1]), codes, W_dec, beta=0)
        # The running sums and the bias are added in place, because cumsum would write another array of this size.
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
        (batch, input_dim), hidden_dim, n_levels = centred.shape, len(W_enc), len(grad_x_hats)
        # A latent of group j is part of the reconstruction of every level from j on.
        grad_groups = torch.empty_like(grad_x_hats, memory_format=torch.contiguous_format)
        grad_groups[-1] = grad_x_hats[-1]
        for level in range(n_levels - 2, -1, -1):
            torch.add(grad_x_hats[level], grad_groups[level + 1], out=grad_groups[level])
        flat = grad_groups.view(-1, input_dim)  # [levels · batch, input_dim]
        values, latents = codes.values(), codes.col_indices()
        grad_pre_acts = torch.sparse.sampled_addmm(codes, flat, W_dec.T, beta=0.0).values()
        grad_pre_acts.masked_fill_(values <= 0, 0)  # where the ReLU is inactive
        per_latent = W_enc.new_zeros(hidden_dim).scatter_add_(0, latents.long(), grad_pre_acts)
        # pre_bias is added after decoding, at every level, and subtracted before encoding.
        grad_pre_bias = grad_groups[0].sum(dim=0) - per_latent @ W_enc

        # Order the entries by slab and latent: row n of a slab lists where latent n is active.
        slab_size = batch * -(-n_levels // MAX_SLABS)
        group_rows = torch.repeat_interleave(codes.crow_indices().diff()).int()
        keys, order = (group_rows // slab_size * hidden_dim + latents.int()).sort(stable=True)
        group_rows, values, grad_pre_acts = (t.index_select(0, order) for t in (group_rows, values, grad_pre_acts))
        grad_W_enc, grad_W_dec = torch.empty_like(W_enc), torch.empty_like(W_dec)
        for slab, grad_slab in enumerate(torch.split(flat, slab_size)):
            bounds = torch.arange(slab * hidden_dim, (slab + 1) * hidden_dim + 1, dtype=torch.int32)
            starts = torch.searchsorted(keys, bounds, out_int32=True)
            first, last = int(starts[0]), int(starts[-1])
            starts, rows = starts - first, group_rows[first:last] - slab * slab_size
            by_group = _csr(starts, rows, values[first:last], (hidden_dim, len(grad_slab)))
            by_row = _csr(starts, rows % batch, grad_pre_acts[first:last], (hidden_dim, batch))
            _product_(grad_W_dec, by_group, grad_slab, beta=int(slab > 0))
            _product_(grad_W_enc, by_row, centred, beta=int(slab > 0))
        return None, grad_W_enc, grad_W_dec, grad_pre_bias, None


def _grouped_codes(values: Tensor, indices: Tensor, hidden_dim: int, k_levels: tuple[int, ...]) -> Tensor:
    """Return codes as a CSR matrix [levels · batch, hidden_dim]: row j · batch + b contains group j of row b.

    Indices are int32, the type that MKL takes.
    """
    assert values.numel() < 2**31
    groups = list(itertools.pairwise((0, *k_levels)))
    counts = torch.cat([torch.full((len(values),), high - low, dtype=torch.int32) for low, high in groups])
    return _csr(
        torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0)),
        torch.cat([indices[:, low:high].flatten() for low, high in groups]).int(),
        torch.cat([values[:, low:high].flatten() for low, high in groups]),
        (len(counts), hidden_dim),
    )


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    # With the argument alone, torch 2.11 still warns that the check was not chosen explicitly.
    with torch.sparse.check_sparse_tensor_invariants(False):  # type: ignore[no-untyped-call]
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


def _product_(out: Tensor, sparse: Tensor, dense: Tensor, *, beta: int) -> None:
    """Set `out` to beta · out + sparse @ dense; its old values do not matter if beta is 0.

    `sparse @ dense` takes twice as long if the result is large: it first writes zeros of that size, and then copies.
    """
    torch.addmm(out, sparse, dense, beta=beta, out=out)
