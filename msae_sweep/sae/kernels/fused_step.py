"""A whole training step, and a whole validation step, as a fixed sequence of kernels over fixed memory.

The training step consists of `reference.reconstruct`, its backward pass, the auxiliary loss, Adam, and the unit norm of
decoder rows. Matrix products are bfloat16 with float32 sums. The reconstructions' gradients have eight bits, with one
scale per row and level. Weights, moments and sums are float32, and totals over an epoch or a split are float64. On CUDA
each sequence is captured as a graph once per shape: values that differ between trials (weights, learning rate, level
weights, the rows' address) are in memory that the kernels read. Rows and latents are padded with zeros that no kernel
ever makes non-zero.

Every sum is computed in a fixed order, so a step gives the same bits on every run.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from msae_sweep.sae.kernels import adam, aux_loss, bias_gradient, decode, gather, latent_gradients, packing, topk
from msae_sweep.sae.kernels.launch import compile_in_parallel

# From version 3.10 on, Triton fuses multiply-adds only on request; without, steps are slower and have other bits.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

SCHEDULE_STEPS = 4096
"""Number of steps whose hyperparameters are on the device at a time; a longer epoch copies several schedules."""


class Shape(NamedTuple):
    """Sizes and options for which a step is captured; trials with equal shapes share one step."""

    batch: int
    input_dim: int
    hidden_dim: int
    k_levels: tuple[int, ...]
    """Levels at which validation computes R²."""
    loss_levels: tuple[int, ...]
    """Levels of the loss; the largest equals the largest of `k_levels`."""
    aux_k: int
    normalize_decoder: bool
    clips: bool
    """True if gradients are clipped."""


class FusedStep:
    """Weights, moments and work memory of one shape, and the kernels that use them."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        batch, k, n_levels = shape.batch, shape.loss_levels[-1], len(shape.loss_levels)
        half = max(16, triton.next_power_of_2(triton.cdiv(shape.input_dim, 2)))
        width, hidden, batch_stride = 2 * half, _up(shape.hidden_dim, aux_loss.TILE), _up(batch, 8)
        self.many = n_levels > decode.FEW_LEVELS
        self.part = latent_gradients.part_size(batch, k, hidden)
        n_parts = max(1, latent_gradients.n_parts(batch, k, self.part))

        def zeros(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        int32, bfloat16 = torch.int32, torch.bfloat16
        self.W_enc = adam.AdamParameter(zeros(hidden, width), zeros(hidden, width), zeros(hidden, width))
        self.W_dec = adam.AdamParameter(zeros(hidden, width), zeros(hidden, width), zeros(hidden, width))
        self.pre_bias = adam.AdamParameter(zeros(width), zeros(width), zeros(width))
        self.encoder_copy = zeros(hidden, width, dtype=bfloat16)
        self.decoder_copy = zeros(hidden, half, dtype=int32)
        self.samples_since_fired = zeros(hidden, dtype=torch.int64)
        self.fired = zeros(hidden, dtype=int32)

        # After the window come its batch counters for validation and for training, then the schedule's counter. So one
        # copy in set_window sets the window and resets both batch counters, but not the schedule's counter.
        self._place = zeros(5, dtype=torch.int64)
        self.window, counters = self._place[:3], self._place[3:].view(int32)
        self.eval_counter = counters[:1]
        self.level_scales, self.rank_scales = zeros(n_levels), zeros(k)
        level_of_rank = [sum(rank >= level for level in shape.loss_levels[:-1]) for rank in range(k)]
        self.level_of_rank = torch.tensor(level_of_rank, dtype=int32, device=device)
        self.hyper = adam.DeviceHyperparameters(
            zeros(SCHEDULE_STEPS, 2), zeros(4), counters[1:3], zeros(3), zeros(2, dtype=torch.float64)
        )
        self.aux = aux_loss.AuxHyper(zeros(1, dtype=torch.int64), zeros(1))

        self.centred = zeros(batch_stride, width, dtype=bfloat16)
        self.start = zeros(batch, width)
        # The pre_acts are needed until decoding starts and their gradient from then on, so they share memory.
        shared = zeros(hidden * batch_stride, dtype=bfloat16)
        self.pre_acts = shared[: batch * hidden].view(batch, hidden)
        self.grad_pre = shared.view(hidden, batch_stride)
        self.codes = zeros(batch, topk.padded_k(k), dtype=int32)
        self.candidates = zeros(batch, topk.n_candidates(k), dtype=int32)
        self.ranks = zeros(hidden, batch, dtype=torch.uint8 if k <= 256 else torch.int16)
        self.holders = zeros(hidden, triton.cdiv(batch, 32), dtype=int32)
        self.entries = latent_gradients.Entries(
            packed=zeros(batch * k, dtype=torch.int64),
            start=zeros(hidden, dtype=int32),
            counts=zeros(hidden, dtype=int32),
            more_parts=zeros(hidden, dtype=int32),
            parts=zeros(n_parts, dtype=int32),
            part_numbers=zeros(n_parts, dtype=int32),
            cursors=zeros(2, dtype=int32),
        )
        self.G = packing.QuadWords(zeros(batch, n_levels, half // 2, dtype=int32), zeros(batch, n_levels))
        self.row_loss, self.last_squared_error = zeros(batch), zeros(batch)
        self.gradients = latent_gradients.Gradients(
            zeros(hidden, width), zeros(n_parts, width), zeros(hidden), zeros(n_parts)
        )
        self.grad_W_enc = zeros(hidden, width)
        self.bias_sums = zeros(bias_gradient.N_SUMS, width)
        self.norms = zeros(hidden // adam.rows_per_program(hidden, width)) if shape.clips else None
        self.dead: aux_loss.DeadLatents | None = None
        if shape.aux_k:
            row_tiles = triton.cdiv(batch, aux_loss.TILE)
            self.dead = aux_loss.DeadLatents(
                latents=zeros(hidden, dtype=int32),
                n_dead=zeros(1, dtype=int32),
                acts=zeros(batch, hidden, dtype=bfloat16),
                G=zeros(batch, half, dtype=int32),
                losses=zeros(row_tiles * (half // min(64, half))),
                pre_sums=zeros(row_tiles, hidden),
            )
        self.errors = zeros(batch, len(shape.k_levels))
        self.active = zeros(batch, len(shape.k_levels), dtype=int32)
        self.error_sums = zeros(len(shape.k_levels), dtype=torch.float64)
        self.active_sums = zeros(len(shape.k_levels), dtype=torch.int64)
        self.activation_counts = zeros(hidden, dtype=int32)

        self._held: tuple[Tensor, Tensor | None] | None = None
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}

    def set_window(self, x: Tensor, order: Tensor | None) -> None:
        """Read the next batches from `x` [n, input_dim], in `order`, or in the order of `x` if `order` is None."""
        assert x.is_contiguous()
        assert x.dtype == torch.float32
        self._held = (x, order)
        place = [x.data_ptr(), 0, len(x), 0] if order is None else [x.data_ptr(), order.data_ptr(), len(order), 0]
        # Pinned, so that the copy need not wait for queued work; torch keeps the memory until it has been copied.
        on_gpu = self.device.type == "cuda"
        self._place[:4].copy_(torch.tensor(place, pin_memory=on_gpu), non_blocking=True)

    def forget_window(self) -> None:
        """Release the window's rows, because another trial may need their memory."""
        self._held = None

    def set_schedule(self, schedule: Tensor) -> None:
        """Use the rows of `schedule` [at most SCHEDULE_STEPS, 2] for the next steps, beginning with the first row."""
        self.hyper.schedule[: len(schedule)].copy_(schedule)
        self.hyper.counters[1].zero_()

    def copy_weights(self) -> None:
        """Write the bfloat16 copies of the weights that the products read; Adam keeps them up to date afterwards."""
        half = self.decoder_copy.shape[1]
        bits = self.W_dec.value.bfloat16().view(torch.int16).int()
        torch.bitwise_or(bits[:, :half] & 0xFFFF, bits[:, half:] << 16, out=self.decoder_copy)
        self.encoder_copy.copy_(self.W_enc.value)

    def train(self, *, dead_possible: bool) -> None:
        """Run one step on the window's next batch; with `dead_possible` False, no latent may be dead."""
        if dead_possible and self.dead is not None:
            self._run("train with dead latents", lambda: self._train(self.dead))
        else:
            self._run("train", lambda: self._train(None))

    def evaluate(self) -> None:
        """Add the window's next batch to `error_sums`, `active_sums` and `activation_counts`."""
        self._run("evaluate", self._evaluate)

    def capture(self) -> None:
        """Compile and capture everything now, on a row of zeros; this overwrites the weights. CUDA only."""
        if self.device.type != "cuda":
            return
        with compile_in_parallel(self.device):
            self._train(None)
            self._train(self.dead)
            self._evaluate()
        row = torch.zeros(1, self.shape.input_dim, device=self.device)
        for run in (lambda: self.train(dead_possible=False), lambda: self.train(dead_possible=True), self.evaluate):
            self.set_window(row, None)
            self.hyper.counters.zero_()
            run()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self.device)

    def n_bytes(self) -> int:
        """Return the number of bytes of device memory that this step's tensors occupy."""
        found: list[Tensor] = []

        def look(value: object) -> None:
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, tuple):
                for part in value:
                    look(part)

        for value in vars(self).values():
            look(value)
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())

    def _run(self, name: str, launch: Callable[[], None]) -> None:
        if self.device.type != "cuda":
            launch()
            return
        if name not in self._graphs:
            # Compiling and cuBLAS's first call must not happen inside a capture.
            aside = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(aside):
                launch()
            torch.cuda.current_stream(self.device).wait_stream(aside)
            self.hyper.counters.zero_()
            torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                launch()
            self._graphs[name] = graph
        self._graphs[name].replay()

    def _train(self, aux: aux_loss.DeadLatents | None) -> None:
        shape = self.shape
        if aux is not None:
            aux_loss.find_dead(self.samples_since_fired, self.aux, aux, shape.hidden_dim)
        self._encode(collect=True)
        if aux is not None:
            aux_loss.select_codes(self.pre_acts, aux, shape.aux_k)
        latent_gradients.build_entries(
            codes=self.codes, ranks=self.ranks, holders=self.holders, level_of_rank=self.level_of_rank,
            entries=self.entries, samples_since_fired=self.samples_since_fired, fired=self.fired,
            n_levels=len(shape.loss_levels), part=self.part,
        )  # fmt: skip
        if self.many:
            decode.decode_many(
                start=self.start, codes=self.codes, rank_scales=self.rank_scales, level_of_rank=self.level_of_rank,
                row_loss=self.row_loss, last_squared_error=self.last_squared_error, grad_pre=self.grad_pre,
                W_dec=self.decoder_copy, G=self.G,
            )  # fmt: skip
        else:
            decode.decode_few(
                start=self.start, codes=self.codes, W_dec=self.decoder_copy, level_scales=self.level_scales, G=self.G,
                row_loss=self.row_loss, last_squared_error=self.last_squared_error, grad_pre=self.grad_pre,
                k_levels=shape.loss_levels,
            )  # fmt: skip
        with self._beside():
            bias_gradient.sum_decoding_gradient(self.G, self.bias_sums, self.hyper)
        latent_gradients.backward(self.G, self.decoder_copy, self.entries, self.gradients, self.grad_pre, self.part)
        if aux is not None:
            aux_loss.residual_gradient(
                self.G, self.level_scales, self.last_squared_error, self.decoder_copy, self.aux, aux
            )
            aux_loss.add_gradients(self.decoder_copy, aux, self.grad_pre, self.gradients)
        with self._beside():
            bias_gradient.sum_encoding_gradient(
                self.W_enc.value, self.entries, self.gradients, self.bias_sums, self.part
            )
        self._encoder_gradient()
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        if self.norms is not None:
            adam.clip_gradients(
                grad_W_enc=self.grad_W_enc, W_dec=self.W_dec.value, entries=self.entries, gradients=self.gradients,
                sums=self.bias_sums, norms=self.norms, hyper=self.hyper, part=self.part,
                normalize=shape.normalize_decoder,
            )  # fmt: skip
        adam.update_weights(
            W_enc=self.W_enc, W_dec=self.W_dec, pre_bias=self.pre_bias, grad_W_enc=self.grad_W_enc,
            entries=self.entries, gradients=self.gradients, sums=self.bias_sums, row_loss=self.row_loss,
            aux_losses=None if aux is None else aux.losses, hyper=self.hyper, encoder_copy=self.encoder_copy,
            decoder_copy=self.decoder_copy, part=self.part,
            normalize=shape.normalize_decoder,
        )  # fmt: skip

    def _encode(self, *, collect: bool) -> None:
        shape = self.shape
        counter = self.hyper.counters[:1] if collect else self.eval_counter
        gather.fetch_rows(
            window=self.window, counter=counter, pre_bias=self.pre_bias.value, centred=self.centred, start=self.start,
            cursors=self.entries.cursors, batch=shape.batch, input_dim=shape.input_dim,
        )  # fmt: skip
        used = self._used_columns()
        _product(self.centred[: shape.batch, :used], self.encoder_copy[:, :used].T, self.pre_acts)
        topk.top_codes(
            self.pre_acts, self.codes, self.ranks, self.holders, self.candidates, shape.loss_levels[-1],
            collect=collect,
        )  # fmt: skip

    def _encoder_gradient(self) -> None:
        used = self._used_columns()
        _product(self.grad_pre, self.centred[:, :used], self.grad_W_enc[:, :used])

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Launch on a side stream, after all work launched so far and concurrently with later work.

        This is for small kernels whose results are needed late.
        """
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            yield

    def _evaluate(self) -> None:
        self._encode(collect=False)
        decode.decode_errors(self.start, self.codes, self.decoder_copy, self.errors, self.active, self.shape.k_levels)
        gather.count_active(self.window, self.eval_counter, self.codes, self.activation_counts)
        gather.add_errors(self.window, self.eval_counter, self.errors, self.active, self.error_sums, self.active_sums)

    def _used_columns(self) -> int:
        """Return the number of columns in the products: input_dim padded to a multiple of 8, not to a power of two."""
        return _up(self.shape.input_dim, 8)


def rank_scales(level_scales: Sequence[float], levels: Sequence[int]) -> list[float]:
    """Return a scale for each rank: c_l at the last rank of level l, and 0 elsewhere."""
    scales = [0.0] * levels[-1]
    for level, scale in zip(levels, level_scales, strict=True):
        scales[level - 1] = scale
    return scales


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a @ b to `out`, with bfloat16 operands, float32 sums, and the type that `out` has."""
    if a.device.type != "cuda":
        out.copy_(a.float() @ b.float())
    elif out.dtype == torch.bfloat16:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _up(number: int, multiple: int) -> int:
    return triton.cdiv(number, multiple) * multiple
