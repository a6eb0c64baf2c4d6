"""Compile every kernel of the fused step for a GPU, on a machine without one, and print what each needs.

    python tests/sae/compile_kernels.py [--capability 90] [notebook odd narrow widest most]

The interpreter accepts more Python than the compiler does, so interpreting the kernels is not enough. Launches are
turned into compilations. The script prints name, warps and shared memory of each kernel, and ends with exit code 1 at
the first kernel that does not compile.
"""

import argparse
import os

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from msae_sweep.sae.kernels import fused_step

SHAPES = {
    "notebook": fused_step.Shape(256, 256, 4096, (16, 32, 64, 128), (16, 32, 64, 128), 512, True, False),
    # Sizes and levels are no powers of two, and gradients are clipped.
    "odd": fused_step.Shape(100, 361, 5000, (10, 30, 50), (10, 30, 50), 64, False, True),
    # There are fewer latents than a program of the auxiliary loss takes at a time, and their number is no power of two.
    "narrow": fused_step.Shape(16, 24, 192, (4, 8), (4, 8), 64, True, False),
    # These are the widest rows, and every k is a level of the loss.
    "widest": fused_step.Shape(16, 4096, 4096, (64, 128, 256, 512), tuple(range(1, 513)), 512, True, False),
    # This is the largest number of latents.
    "most": fused_step.Shape(16, 32, 131_072, (512,), (512,), 0, True, False),
}


class Driver:
    """Minimal driver, with only what compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead(run):
    def compiled(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        print(f"{self.__name__} warps {kernel.metadata.num_warps} shared {kernel.metadata.shared}", flush=True)
        # A thread block has at most 227 KB on Hopper, and 99 KB on the smallest supported GPUs (8.6, 8.9).
        assert kernel.metadata.shared <= 99 << 10, f"{self.__name__}: {kernel.metadata.shared} bytes of shared memory"
        assert kernel.asm["cubin"]

    return compiled


def main() -> None:
    """Compile a step and a validation of each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", help="all of them without")
    parser.add_argument("--capability", type=int, default=90)
    args = parser.parse_args()
    triton.runtime.driver.set_active(Driver(args.capability))
    JITFunction.run = compile_instead(JITFunction.run)
    fused_step._product = lambda a, b, out: None
    for name in args.shapes or SHAPES:
        step = fused_step.FusedStep(SHAPES[name], torch.device("cpu"))
        step.train(dead_possible=True)
        step.evaluate()


if __name__ == "__main__":
    main()
