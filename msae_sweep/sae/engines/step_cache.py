"""Captured steps, kept from trial to trial."""

import contextlib
import gc
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # triton is not everywhere
    from msae_sweep.sae.kernels.fused_step import FusedStep, Shape

SHARE_OF_DEVICE = 1 / 8
"""Of the device's memory that captured steps may hold together; a step of the notebook's shape takes 149 MiB."""


class StepCache:
    """The captured steps of one process: compiling and capturing a shape takes seconds, training it perhaps one.

    A step holds weights and work memory on the device. Kept are those of the shapes that were used last, as long as all
    of them fit into `SHARE_OF_DEVICE`. Without a GPU nothing is ever put here, unless the kernels are interpreted.
    """

    def __init__(self) -> None:
        self._steps: dict[tuple[Shape, torch.device], FusedStep] = {}

    def get(self, shape: "Shape", device: torch.device) -> "FusedStep":
        """The step of a shape; what its memory holds is whatever the last trial left.

        Raises:
            torch.OutOfMemoryError: it does not fit, even alone.
        """
        step = self._steps.pop((shape, device), None)
        if step is None:
            # After the `except` block: within it the error's traceback still holds the memory of the failed attempt.
            with contextlib.suppress(torch.OutOfMemoryError):
                step = _captured(shape, device)
        if step is None:
            self.clear()
            step = _captured(shape, device)
        self._steps[shape, device] = step  # the one used last stands last
        if device.type == "cuda":
            allowed = torch.cuda.get_device_properties(device).total_memory * SHARE_OF_DEVICE
            while len(self._steps) > 1 and sum(s.n_bytes() for s in self._steps.values()) > allowed:
                self._steps.pop(next(iter(self._steps)))
        return step

    def __len__(self) -> int:
        return len(self._steps)

    def clear(self) -> None:
        """Give the memory back."""
        self._steps.clear()
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()


def _captured(shape: "Shape", device: torch.device) -> "FusedStep":
    """A new step of a shape. Capturing takes device memory, too: for compiled kernels, graphs and cuBLAS."""
    from msae_sweep.sae.kernels.fused_step import FusedStep

    step = FusedStep(shape, device)
    step.capture()
    return step
