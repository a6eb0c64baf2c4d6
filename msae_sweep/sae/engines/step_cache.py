"""Cache of captured steps, which consecutive trials of a process share."""

import contextlib
import gc
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # triton is not installed everywhere
    from msae_sweep.sae.kernels.fused_step import FusedStep, Shape

SHARE_OF_DEVICE = 1 / 8
"""Share of the device's memory that all captured steps may hold; a step of the notebook's shape takes 149 MiB."""


class StepCache:
    """Least-recently-used cache of the captured steps of one process.

    Compiling and capturing a shape takes seconds, and training it perhaps one. A step holds weights and work memory on
    the device. The cache keeps the steps of the most recently used shapes, as long as all of them fit into
    `SHARE_OF_DEVICE`; it always keeps the last one. Without a GPU it stays empty, unless the kernels are interpreted.
    """

    def __init__(self) -> None:
        self._steps: dict[tuple[Shape, torch.device], FusedStep] = {}

    def get(self, shape: "Shape", device: torch.device) -> "FusedStep":
        """Return the step of a shape; its memory still contains the values that the last trial left.

        Raises:
            torch.OutOfMemoryError: the step does not fit, even alone.
        """
        step = self._steps.pop((shape, device), None)
        if step is None:
            # The retry comes after this block: inside, the error's traceback still holds the failed attempt's memory.
            with contextlib.suppress(torch.OutOfMemoryError):
                step = _captured(shape, device)
        if step is None:
            self.clear()
            step = _captured(shape, device)
        self._steps[shape, device] = step  # the most recently used step comes last
        if device.type == "cuda":
            allowed = torch.cuda.get_device_properties(device).total_memory * SHARE_OF_DEVICE
            while len(self._steps) > 1 and sum(s.n_bytes() for s in self._steps.values()) > allowed:
                self._steps.pop(next(iter(self._steps)))
        return step

    def __len__(self) -> int:
        return len(self._steps)

    def clear(self) -> None:
        """Remove all steps and release their device memory."""
        self._steps.clear()
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()


def _captured(shape: "Shape", device: torch.device) -> "FusedStep":
    """Return a new captured step. Capturing also takes device memory for compiled kernels, graphs and cuBLAS."""
    from msae_sweep.sae.kernels.fused_step import FusedStep

    step = FusedStep(shape, device)
    step.capture()
    return step
