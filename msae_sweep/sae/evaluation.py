"""Evaluation of an SAE on whole data: R² at every k, which latents fire, and how similar its decoder rows are.

An evaluation takes one pass over any number of rows in bounded memory. The sums over parts of the data add up to those
over the whole, so the parts may be summed in different processes.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from msae_sweep.sae.kernels import top_k_cpu
from msae_sweep.sae.metrics import sum_dtype
from msae_sweep.sae.model import MSAE

CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**27, "mps": 2**24}
"""Number of elements in the largest array of a step, by kind of device; bounds memory at any hidden_dim and max_k.

Measured on two cores with 16,384 latents: 2^19 takes twice as long as 2^21, and 2^23 is 15% faster."""


class Evaluation(NamedTuple):
    """Results of one SAE on one set of standardised rows."""

    n_rows: int
    r2: list[float]
    """R² at k = 1, 2, …, max_k (index k − 1), over all rows in float64, x̄ per dimension."""
    l0: list[float]
    """Mean number of active latents (value > 0) per row at each k, indexed like `r2`."""
    firing: Int[Tensor, " hidden_dim"]
    """Number of rows in which each latent is active at max_k; int64 on the CPU."""
    dead_ratio: float
    """Share of latents that are active in no row at max_k."""
    levels: tuple[int, ...]
    """The model's k_levels below max_k, followed by max_k."""
    level_firing: Int[Tensor, "levels hidden_dim"]
    """Number of rows in which each latent is active at each of `levels`; the last row equals `firing`."""


class EvaluationSums:
    """Sums over rows from which `compute` derives an `Evaluation`; picklable after `cpu`.

    Dividing the rows differently into batches, or the batches into parts, changes only rounding.
    """

    def __init__(self, model: MSAE, max_k: int | None = None, device: torch.device | str = "cpu") -> None:
        """Create sums over no rows.

        Args:
            max_k: the largest k; the default is the model's largest level.

        Raises:
            ValueError: `max_k` is below 1 or above the model's hidden_dim.
        """
        self.max_k = model.k_levels[-1] if max_k is None else max_k
        if not 1 <= self.max_k <= model.hidden_dim:
            raise ValueError(f"max_k: {self.max_k} must be 1 to hidden_dim {model.hidden_dim}")
        self.levels = (*(k for k in model.k_levels if k < self.max_k), self.max_k)
        dtype = sum_dtype(torch.device(device))
        self.n_rows = 0
        self._mean = torch.zeros(model.input_dim, dtype=dtype, device=device)
        self._deviation = torch.zeros_like(self._mean)
        self._squared_error = torch.zeros(self.max_k, dtype=dtype, device=device)
        self._active = torch.zeros(self.max_k, dtype=torch.int64, device=device)
        # Row i counts the firings at the ranks after level i − 1 up to level i.
        self._firing = torch.zeros(len(self.levels), model.hidden_dim, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, model: MSAE, x: Float[Tensor, "batch input_dim"]) -> None:
        """Add standardised rows; `model` and `x` must be on the device of the sums."""
        elements = CHUNK_ELEMENTS.get(x.device.type, CHUNK_ELEMENTS["cpu"])
        for rows in torch.split(x, max(1, elements // max(model.hidden_dim, model.input_dim))):
            self._add_moments(len(rows), *_moments(rows, self._mean.dtype))
            self._add_errors_by_k(model, rows)

    def merge(self, other: "EvaluationSums") -> None:
        """Add the sums of `other`, which must have the same model and max_k; `other` is not changed."""
        assert self.levels == other.levels, "sums of different levels do not add up"
        device = self._mean.device
        self._add_moments(other.n_rows, other._mean.to(device), other._deviation.to(device))
        self._squared_error += other._squared_error.to(device)
        self._active += other._active.to(device)
        self._firing += other._firing.to(device)

    def cpu(self) -> "EvaluationSums":
        """Move the sums to the CPU, so that they can be sent to another process, and return self."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.cpu())
        return self

    def compute(self) -> Evaluation:
        """Return the evaluation of the rows so far; R² is NaN if the rows do not vary."""
        total = self._deviation.sum().item()
        r2 = [1 - error / total if total > 0 else float("nan") for error in self._squared_error.tolist()]
        l0 = (self._active.cpu().cumsum(0).double() / max(self.n_rows, 1)).tolist()
        level_firing = self._firing.cpu().cumsum(0)
        firing = level_firing[-1]
        dead_ratio = (firing == 0).double().mean().item()
        return Evaluation(
            n_rows=self.n_rows,
            r2=r2,
            l0=l0,
            firing=firing,
            dead_ratio=dead_ratio,
            levels=self.levels,
            level_firing=level_firing,
        )

    def _add_moments(self, n_rows: int, mean: Tensor, deviation: Tensor) -> None:
        # Merging by the formula of Chan, Golub and LeVeque 1979 loses no digits to a large mean.
        if not n_rows:
            return
        share, delta = n_rows / (self.n_rows + n_rows), mean - self._mean
        self._deviation += deviation + delta.square() * (self.n_rows * share)
        self._mean += delta * share
        self.n_rows += n_rows

    def _add_errors_by_k(self, model: MSAE, x: Tensor) -> None:
        """Add the error at every k: x minus the contributions of its r largest latents is the error at k = r."""
        residual = x - model.pre_bias
        values, indices = _encode(residual, model.W_enc, self.max_k)
        active = values > 0
        self._active += active.sum(dim=0)
        low = 0
        for level, high in enumerate(self.levels):
            self._firing[level].scatter_add_(0, indices[:, low:high].flatten(), active[:, low:high].flatten().long())
            low = high
        values, indices = values.T.contiguous(), indices.T.contiguous()  # [max_k, batch]
        for rank in range(self.max_k):
            residual.addcmul_(values[rank, :, None], model.W_dec[indices[rank]], value=-1)
            self._squared_error[rank] += residual.square().sum(dtype=self._squared_error.dtype)


def evaluate(
    model: MSAE,
    batches: Iterable[Float[Tensor, "batch input_dim"]],
    device: torch.device | str | None = None,
    max_k: int | None = None,
) -> Evaluation:
    """Evaluate a model on standardised rows, given in batches of any size.

    Args:
        device: the device to compute on, by default the model's own. Batches are moved there; `model` itself stays.
        max_k: the largest k; the default is the model's largest level.

    Raises:
        ValueError: `max_k` is below 1 or above the model's hidden_dim.
    """
    device = model.W_enc.device if device is None else torch.device(device)
    model = model.on(device)
    sums = EvaluationSums(model, max_k, device)
    for x in batches:
        sums.update(model, x.to(device, model.W_enc.dtype))
    return sums.compute()


@torch.no_grad()
def activation_counts(model: MSAE, batches: Iterable[Float[Tensor, "batch input_dim"]]) -> Int[Tensor, " hidden_dim"]:
    """Return in how many of the standardised rows each latent is active at the model's largest level.

    The rows must be on the model's device. The result is int64 on the CPU, and equals `Evaluation.firing`.
    """
    counts = torch.zeros(model.hidden_dim, dtype=torch.int64, device=model.W_enc.device)
    elements = CHUNK_ELEMENTS.get(counts.device.type, CHUNK_ELEMENTS["cpu"])
    for batch in batches:
        for rows in torch.split(batch, max(1, elements // max(model.hidden_dim, model.input_dim))):
            values, indices = _encode(rows - model.pre_bias, model.W_enc, model.k_levels[-1])
            counts.scatter_add_(0, indices.flatten(), (values > 0).flatten().long())
    return counts.cpu()


class Coherence(NamedTuple):
    """Absolute cosines between different decoder rows: 0 for orthogonal rows, 1 for parallel or opposite ones."""

    max: float
    """Absolute cosine of the closest two rows."""
    mean: float
    """Mean over all pairs of different rows."""
    mean_max: float
    """Mean over rows of each row's largest absolute cosine."""


@torch.no_grad()
def decoder_coherence(W_dec: Float[Tensor, "hidden_dim input_dim"]) -> Coherence:
    """Return how similar the rows of a dictionary are to each other; all values are 0 for a single row.

    Source of `max`: Donoho and Huo 2001, "mutual coherence".
    """
    rows = nn.functional.normalize(W_dec.detach(), dim=1)
    n = len(rows)
    if n < 2:
        return Coherence(0.0, 0.0, 0.0)
    largest, total = [], 0.0
    for start, chunk in _chunks(rows):
        cosines = (chunk @ rows.T).abs_()  # [chunk, hidden_dim]
        here = torch.arange(len(chunk), device=rows.device)
        cosines[here, start + here] = 0
        total += cosines.sum(dtype=sum_dtype(rows.device)).item()
        largest.append(cosines.amax(dim=1))
    nearest = torch.cat(largest).clamp_(max=1)  # rounding may exceed 1
    return Coherence(nearest.max().item(), total / (n * (n - 1)), nearest.mean().item())


@torch.no_grad()
def matched_cosine(
    W_dec: Float[Tensor, "hidden_dim input_dim"], other: Float[Tensor, "other_dim input_dim"]
) -> Float[Tensor, " hidden_dim"]:
    """Return each decoder row's cosine with the closest row of another decoder.

    Each row is matched with its best partner, so two latents may share a match. A one-to-one assignment would leave
    latents unmatched where dictionaries differ in size, and would need 2 GB of memory at 16,384 latents. Cosines keep
    their sign, because codes are positive.

    Source: Sharkey et al. 2022, "Taking features out of superposition with sparse autoencoders" (mean max cosine). For
    comparisons between seeds: Paulo and Belrose 2025 (arXiv 2501.16615), who use a one-to-one assignment.

    Raises:
        ValueError: the rows of the two decoders differ in length.
    """
    if W_dec.shape[1] != other.shape[1]:
        raise ValueError(f"input_dim: {W_dec.shape[1]} and {other.shape[1]}; must be the same")
    rows, candidates = (nn.functional.normalize(w.detach(), dim=1) for w in (W_dec, other.to(W_dec)))
    best = [(chunk @ candidates.T).amax(dim=1) for _, chunk in _chunks(rows, len(candidates))]
    return torch.cat(best).clamp_(max=1)


def level_stability(
    level_firing: Int[Tensor, "levels hidden_dim"], matched: Float[Tensor, " hidden_dim"]
) -> list[float]:
    """Return the mean matched cosine at every level, each latent weighted by the number of rows that activate it there.

    Dead latents therefore have no weight, and at a small k the latents that rank first have the most. The value is NaN
    at a level where no latent fired.
    """
    weights = level_firing.double()
    return (weights @ matched.double().cpu() / weights.sum(dim=1)).tolist()


def _moments(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the mean and the summed squared deviation of each channel."""
    x = x.to(dtype)
    mean = x.mean(dim=0)
    return mean, (x - mean).square_().sum(dim=0)


def _encode(centred: Tensor, W_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the sorted values and latents of TopK_k(ReLU(centred W_encᵀ))."""
    if centred.device.type == "cpu":
        return top_k_cpu.encode(centred, W_enc, k)
    values, indices = torch.relu(centred @ W_enc.T).topk(k, dim=1, sorted=True)
    return values, indices


def _chunks(rows: Tensor, width: int | None = None) -> Iterable[tuple[int, Tensor]]:
    """Return parts of `rows`, each with its first row's number; a part's product with `width` rows has bounded size."""
    size = max(1, 2**24 // (width or len(rows)))
    return zip(range(0, len(rows), size), torch.split(rows, size), strict=True)
