"""The Matryoshka sparse autoencoder: one dictionary that is used at several sparsity levels."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from msae_sweep.sae.kernels import reference


def parameter_shapes(input_dim: int, hidden_dim: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of an MSAE's parameters."""
    return {"W_enc": (hidden_dim, input_dim), "W_dec": (hidden_dim, input_dim), "pre_bias": (input_dim,)}


class MSAE(nn.Module):
    """Autoencoder whose code at each level k is the top k of one sorted code.

    With standardised x:  pre_acts = (x − pre_bias) W_encᵀ,  z_k = TopK_k(ReLU(pre_acts)),  x̂_k = z_k W_dec + pre_bias.
    There is no encoder bias: 2 · input_dim · hidden_dim + input_dim parameters (2,097,408 at 256 × 16).

    Source: Zaigrajew et al. 2025 (arXiv 2502.20578); Gao et al. 2024 (arXiv 2406.04093).
    """

    W_enc: Float[Tensor, "hidden_dim input_dim"]
    W_dec: Float[Tensor, "hidden_dim input_dim"]
    pre_bias: Float[Tensor, " input_dim"]

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        k_levels: Sequence[int],
        weighting: str = "uniform",
        parameters: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Create an MSAE from the given `parameters`, or initialise it at random.

        Random initialisation draws the decoder's rows uniformly from the unit sphere, sets the encoder equal to the
        decoder, and sets pre_bias to 0. The numbers come from torch's global CPU generator, so that one seed gives one
        model on every device. Given parameters are not copied.

        Raises:
            ValueError: `k_levels` is empty, not ascending, below 1 or above `hidden_dim`; or `parameters` have other
                names or shapes than `parameter_shapes`.
        """
        super().__init__()
        levels = tuple(int(k) for k in k_levels)
        if not levels or levels[0] < 1 or any(a >= b for a, b in itertools.pairwise(levels)):
            raise ValueError(f"k_levels: {list(levels)} must ascend from at least 1 without repeats")
        if levels[-1] > hidden_dim:
            raise ValueError(f"k_levels: {levels[-1]} exceeds hidden_dim {hidden_dim}")
        self.input_dim, self.hidden_dim, self.k_levels, self.weighting = input_dim, hidden_dim, levels, weighting
        if parameters is None:
            directions = nn.functional.normalize(torch.randn(hidden_dim, input_dim), dim=1)
            parameters = {"W_enc": directions.clone(), "W_dec": directions, "pre_bias": torch.zeros(input_dim)}
        shapes = parameter_shapes(input_dim, hidden_dim)
        if (given := {name: tuple(tensor.shape) for name, tensor in parameters.items()}) != shapes:
            raise ValueError(f"parameters: {given} must be {shapes}")
        for name in shapes:
            self.register_parameter(name, nn.Parameter(parameters[name]))

    def on(self, device: torch.device | str) -> "MSAE":
        """Return this model on `device`; this one stays where it is, and parameters already on `device` are shared."""
        return MSAE(**self.config, parameters={name: p.to(device) for name, p in self.state_dict().items()})  # type: ignore[arg-type]

    @property
    def config(self) -> dict[str, object]:
        """Constructor arguments, called `config` in the notebook's model file; `MSAE(**config)` has the same shape."""
        return {
            "input_dim": self.input_dim,
            "hidden_dim": self.hidden_dim,
            "k_levels": list(self.k_levels),
            "weighting": self.weighting,
        }

    def reconstruct(self, x: Float[Tensor, "batch input_dim"]) -> reference.Reconstruction:
        """Return the reconstructions of `x` at every level from one shared sorted code, by the plain reference."""
        return reference.reconstruct(x, self.W_enc, self.W_dec, self.pre_bias, self.k_levels)

    def encode(self, x: Float[Tensor, "batch input_dim"], k: int | None = None) -> Float[Tensor, "batch hidden_dim"]:
        """Return the latents of `x`, with all but the `k` largest set to 0; `k` defaults to the largest level."""
        values, indices = self.encode_sparse(x, k)
        return values.new_zeros(x.shape[0], self.hidden_dim).scatter(1, indices, values)

    def encode_sparse(
        self, x: Float[Tensor, "batch input_dim"], k: int | None = None
    ) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
        """Return the `k` largest latents of `x`, descending, 0 where fewer are active, and their indices."""
        pre_acts = torch.relu((x - self.pre_bias) @ self.W_enc.T)
        values, indices = pre_acts.topk(k or self.k_levels[-1], dim=1)
        return values, indices

    def decode(self, latents: Float[Tensor, "batch hidden_dim"]) -> Float[Tensor, "batch input_dim"]:
        """Return the reconstruction from latents: z W_dec + pre_bias."""
        return latents @ self.W_dec + self.pre_bias

    def forward(self, x: Float[Tensor, "batch input_dim"], k: int | None = None) -> Float[Tensor, "batch input_dim"]:
        """Return the reconstruction of `x` from its `k` largest latents; `k` defaults to the largest level."""
        return self.decode(self.encode(x, k))

    @torch.no_grad()
    def project_decoder_gradient_(self) -> None:
        """Remove the component along each row from W_dec's gradient; the renormalisation would undo it anyway.

        Source: Bricken et al. 2023, "Towards Monosemanticity"; Gao et al. 2024, A.
        """
        gradient = self.W_dec.grad
        assert gradient is not None, "project after backward"
        gradient -= (gradient * self.W_dec).sum(dim=1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scale each row of W_dec to unit norm."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny)


class StandardisedMSAE(nn.Module):
    """MSAE with its normalisation folded around it: it takes raw activations and returns raw reconstructions.

    A channel that was constant in the training data has std 1 here, so it standardises to 0 on that data.
    """

    mean: Float[Tensor, " input_dim"]
    std: Float[Tensor, " input_dim"]

    def __init__(self, sae: MSAE, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.sae = sae
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def encode(
        self, activations: Float[Tensor, "batch input_dim"], k: int | None = None
    ) -> Float[Tensor, "batch hidden_dim"]:
        """Return the latents of raw activations, with all but the `k` largest set to 0."""
        return self.sae.encode((activations - self.mean) / self.std, k)

    def encode_sparse(
        self, activations: Float[Tensor, "batch input_dim"], k: int | None = None
    ) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
        """Return the `k` largest latents of raw activations, descending, and their indices."""
        return self.sae.encode_sparse((activations - self.mean) / self.std, k)

    def forward(self, activations: Float[Tensor, "batch input_dim"]) -> Float[Tensor, "batch input_dim"]:
        """Return the reconstruction of raw activations at the largest level, in their own units."""
        x_hat: Tensor = self.sae((activations - self.mean) / self.std)
        return x_hat * self.std + self.mean

    def decode(self, latents: Float[Tensor, "batch hidden_dim"]) -> Float[Tensor, "batch input_dim"]:
        """Return the reconstruction of raw activations from latents, in their own units."""
        return self.sae.decode(latents) * self.std + self.mean


@torch.no_grad()
def geometric_median(
    x: Float[Tensor, "batch input_dim"], *, iterations: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, " input_dim"]:
    """Return the point with the least summed distance to the rows, by Weiszfeld's iteration.

    Source: Bricken et al. 2023, "Towards Monosemanticity", for its use as the initial value of `pre_bias`.
    """
    rows = x.double()
    median = rows.mean(dim=0)
    for _ in range(iterations):
        weights = 1 / (rows - median).norm(dim=1, keepdim=True).clamp_min(1e-12)
        moved = (weights * rows).sum(dim=0) / weights.sum()
        converged = bool((moved - median).norm() <= tolerance * moved.norm().clamp_min(1))
        median = moved
        if converged:
            break
    return median.to(x.dtype)
