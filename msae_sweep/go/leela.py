"""Leela Zero network as a torch module for inference only, whose residual blocks can be tapped.

Batch normalisation is folded into the convolutions. Blocks are numbered from 0. A tap returns the output of a block
after the add and the ReLU. Without heads, nothing after the last tapped block is computed. Planes, points and the moves
of the policy are ordered row by row; the caller that makes the planes decides which rank is row 0.

The forward pass is not compiled, because `torch.compile` (17,900 positions/s on one H200, 40 × 256, bf16) is slower
than cuDNN's fused convolutions (20,100 positions/s). It would also compile before the first batch, and again for a last
batch of another size.
"""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from msae_sweep.errors import ConfigError, first_line
from msae_sweep.go.weights import BOARD, PLANES, Convolution, Weights

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class PrecisionChoice(NamedTuple):
    """Dtype and operations with which a tower computes, with a name and the reason for the choice."""

    dtype: torch.dtype
    conv_relu: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Operation (x, weight, bias) → ReLU(convolution of x)."""
    conv_add_relu: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """Operation (x, weight, bias, z) → ReLU(convolution of x, plus z)."""
    name: str
    reason: str


class Outputs(NamedTuple):
    """Outputs of a forward pass; policy and value are None if the heads were not computed."""

    activations: dict[int, Float[Tensor, "batch filters 19 19"]]
    """Activations by block number, in the tower's dtype and in channels-last memory format."""
    policy_logits: Float[Tensor, "batch 362"] | None
    """Logits of the moves in float32; index 361 is the pass."""
    value: Float[Tensor, " batch"] | None
    """Value for the side to move, float32 in −1 … 1."""


class Network(nn.Module):
    """Tower and both heads of a network on one device."""

    def __init__(
        self, weights: Weights, device: torch.device | str = "cpu", precision: Precision = "auto", fused: bool = True
    ) -> None:
        """Fold the batch normalisation into the weights and copy them to the device.

        `choice` then holds the dtype and the operations of the tower, with the reason. With `fused=False` the plain
        operations are used everywhere, for comparisons.

        Raises:
            ConfigError: the device cannot compute in `precision`.
        """
        super().__init__()
        self.device = torch.device(device)
        self.version, self.filters, self.n_blocks = weights.version, weights.filters, len(weights.blocks)
        self.choice = choose_precision(self.device, precision, self.filters, fused)

        def folded(convolution: Convolution) -> FoldedConvolution:
            return FoldedConvolution(convolution, self.device, self.choice.dtype)

        self.input = folded(weights.input)
        self.blocks = nn.ModuleList(
            Block(folded(first), folded(second), self.choice) for first, second in weights.blocks
        )
        self.policy, self.value = folded(weights.policy.convolution), folded(weights.value.convolution)
        self.policy_layer = FullyConnected(weights.policy.weight, weights.policy.bias, self.device)
        self.value_hidden = FullyConnected(weights.value.hidden_weight, weights.value.hidden_bias, self.device)
        self.value_layer = FullyConnected(weights.value.weight, weights.value.bias, self.device)

    def check_taps(self, taps: Collection[int]) -> None:
        """Raise ConfigError if one of `taps` is not a block of this network."""
        for block in taps:
            if not 0 <= block < self.n_blocks:
                raise ConfigError(f"block {block}: this network has blocks 0 to {self.n_blocks - 1}")

    @torch.inference_mode()
    def forward(
        self, planes: Shaped[Tensor, "batch 18 19 19"], taps: Collection[int] = (), heads: bool = True
    ) -> Outputs:
        """Return the activations after the blocks in `taps`, and policy and value if `heads` is true.

        `planes` may have any dtype (bytes are the cheapest to transfer) and be on any device. In fp16, values above
        65,504 become infinite, so callers that store activations should check that they are finite (the largest of a
        40-block network were below 30).

        Raises:
            ConfigError: a tap is not a block of this network.
        """
        assert planes.shape[1:] == (PLANES, BOARD, BOARD), f"planes {tuple(planes.shape)}"
        self.check_taps(taps)
        planes = planes.to(self.device, non_blocking=True)
        planes = planes.to(self.choice.dtype, memory_format=torch.channels_last)
        activations = {}
        with self._exact_products():
            # Plain, because 18 channels do not suit tensor cores: cuDNN's fused convolutions need a multiple of eight.
            x = conv_relu(planes, self.input.weight, self.input.bias)
            for number, block in enumerate(islice(self.blocks, self.n_blocks if heads else max(taps, default=-1) + 1)):
                x = block(x)
                if number in taps:
                    activations[number] = x
            if not heads:
                return Outputs(activations, None, None)
            policy_logits = self.policy_layer(conv_relu(x, self.policy.weight, self.policy.bias))
            hidden = self.value_hidden(conv_relu(x, self.value.weight, self.value.bias)).relu_()
            value = self.value_layer(hidden).squeeze(1).tanh_()
        if self.version == 2:  # the value is black's; plane 16 is 1 where black is to move
            value = torch.where(planes[:, 16, 0, 0] > 0, value, -value)
        return Outputs(activations, policy_logits, value)

    def _exact_products(self) -> AbstractContextManager[None]:
        """Return a context in which cuDNN does not use TF32 if the tower computes in fp32."""
        if self.device.type != "cuda" or self.choice.dtype != torch.float32:
            return nullcontext()
        cudnn = torch.backends.cudnn
        return cudnn.flags(enabled=True, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False)


class FoldedConvolution(nn.Module):
    """Weight and bias of a convolution with its batch normalisation folded in, in channels-last memory format."""

    weight: Float[Tensor, "out in height width"]
    bias: Float[Tensor, " out"]

    def __init__(self, convolution: Convolution, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias = convolution.folded()
        placed = torch.from_numpy(weight).to(device, dtype, memory_format=torch.channels_last)
        self.register_buffer("weight", placed)
        self.register_buffer("bias", torch.from_numpy(bias).to(device, dtype))


class Block(nn.Module):
    """Residual block: ReLU(x + second(ReLU(first(x))))."""

    def __init__(self, first: FoldedConvolution, second: FoldedConvolution, choice: PrecisionChoice) -> None:
        super().__init__()
        self.first, self.second, self.choice = first, second, choice

    def forward(self, x: Float[Tensor, "batch filters 19 19"]) -> Float[Tensor, "batch filters 19 19"]:
        """Return the block's activations; `x` is not modified."""
        y = self.choice.conv_relu(x, self.first.weight, self.first.bias)
        return self.choice.conv_add_relu(y, self.second.weight, self.second.bias, x)


class FullyConnected(nn.Module):
    """Fully connected layer of a head, in float32 because its cost is small compared with the tower's."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"]

    def __init__(self, weight: np.ndarray, bias: np.ndarray, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight, device=device))
        self.register_buffer("bias", torch.tensor(bias, device=device))

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch out"]:
        """Flatten all dimensions of `x` but the first, channel by channel, and apply the layer."""
        return F.linear(x.flatten(1).float(), self.weight, self.bias)


def gather_points(
    activations: Float[Tensor, "batch filters 19 19"], points: Int[Tensor, "batch n"]
) -> Float[Tensor, "batch n filters"]:
    """Return the activations at the given points (0 – 360, row by row) of every position; copy only these."""
    points = points.to(activations.device, torch.int64)
    position = torch.arange(len(points), device=points.device)[:, None]
    return activations.permute(0, 2, 3, 1)[position, points // BOARD, points % BOARD]


def spatial_mean(activations: Float[Tensor, "batch filters 19 19"]) -> Float[Tensor, "batch filters"]:
    """Return the mean over the board, summed in float32."""
    return activations.mean(dim=(2, 3), dtype=torch.float32)


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the ReLU of a convolution, in plain PyTorch; the padding keeps height and width."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2).relu_()


def conv_add_relu(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor) -> Tensor:
    """Return the ReLU of a convolution plus `z`, the end of a residual block, in plain PyTorch."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2).add_(z).relu_()


def cudnn_conv_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `conv_relu` in one cuDNN kernel, which sums in float32 and rounds once."""
    padding = weight.shape[-1] // 2
    return torch.cudnn_convolution_relu(
        x, weight, bias, stride=(1, 1), padding=(padding, padding), dilation=(1, 1), groups=1
    )


def cudnn_conv_add_relu(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor) -> Tensor:
    """Compute `conv_add_relu` in one cuDNN kernel, which sums in float32 and rounds once."""
    padding = weight.shape[-1] // 2
    return torch.cudnn_convolution_add_relu(
        x, weight, z, alpha=1.0, bias=bias, stride=(1, 1), padding=(padding, padding), dilation=(1, 1), groups=1
    )


def choose_precision(device: torch.device, precision: Precision, filters: int, fused: bool = True) -> PrecisionChoice:
    """Return the fastest correct dtype and operations on `device`, with the reason, which is shown at start-up.

    On a GPU with tensor cores `auto` is fp16. Tensor cores compute it at the rate of bf16, it is eight times as exact,
    and rows are stored in it. The relative error after block 35 of a 40 × 256 network is 0.10% against 0.79%, measured
    by rounding every weight and the output of every convolution as a GPU would. Elsewhere `auto` is fp32.

    With `fused=False` the plain operations are returned.

    Raises:
        ConfigError: the device cannot compute in `precision`.
    """
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    on_cuda = device.type == "cuda"
    precision = resolve_precision(device, precision)
    capability = torch.cuda.get_device_capability(device) if on_cuda else (0, 0)
    if on_cuda and precision == "bf16" and capability < (8, 0):
        shown = ".".join(map(str, capability))
        raise ConfigError(f"precision: bf16 needs compute capability 8.0 and this GPU has {shown}; use fp16 or fp32")
    dtype = types[precision]
    if not fused:
        hindrance: str | None = "plain operations were requested"
    elif not on_cuda:
        hindrance = f"{precision} on {device.type}; fused convolutions need cuDNN"
    elif precision == "fp32":
        hindrance = "fp32 is for comparisons: fused convolutions exist only in half precision"
    else:
        hindrance = fused_hindrance(device, dtype, filters)
    if hindrance is not None:
        return PrecisionChoice(dtype, conv_relu, conv_add_relu, "plain", hindrance)
    reason = f"cuDNN's convolution + add + ReLU in one kernel, {precision}, float32 sums"
    return PrecisionChoice(dtype, cudnn_conv_relu, cudnn_conv_add_relu, "fused", reason)


def resolve_precision(device: torch.device, precision: Precision) -> Precision:
    """Return the precision that `auto` stands for on `device`; return any other precision unchanged."""
    if precision != "auto":
        return precision
    has_tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    return "fp16" if has_tensor_cores else "fp32"


def fused_hindrance(device: torch.device, dtype: torch.dtype, filters: int) -> str | None:
    """Return the reason why cuDNN's fused convolutions cannot be used, or None if they can.

    They are run on two boards and compared with the plain operations. Their availability depends on the cuDNN version,
    the GPU, the dtype and the number of filters, and cuDNN reports it only when it is asked to run one.
    """
    if torch.version.hip is not None:
        return "the fused convolutions are not written for ROCm"
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator).to(device, dtype)
        return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x

    x, z, bias = normal(2, filters, BOARD, BOARD), normal(2, filters, BOARD, BOARD), normal(filters)
    weight = normal(filters, filters, 3, 3) / (3 * filters**0.5)
    try:
        pairs = [
            (cudnn_conv_relu(x, weight, bias), conv_relu(x, weight, bias)),
            (cudnn_conv_add_relu(x, weight, bias, z), conv_add_relu(x, weight, bias, z)),
        ]
    except RuntimeError as error:
        return f"cuDNN refuses {filters} filters in {dtype}: {first_line(error)}"
    for got, expected in pairs:
        difference = float((got.float() - expected.float()).norm() / expected.float().norm())
        if not difference < 0.02:  # the rounding error of bf16 is 0.004
            return f"cuDNN's fused convolutions differ from plain ones by {difference:.1%} here"
    return None
