"""Launching of kernels, and parallel compilation of all kernels of a step before the first launch."""

import hashlib
import importlib
import os
from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import torch

from msae_sweep.patching import patched

_collected: ContextVar[dict[Hashable, partial[Any]] | None] = ContextVar("collected", default=None)


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a kernel with named arguments and options; inside `compile_in_parallel`, only record it for compilation.

    A kernel is compiled once for all launches whose tensors have the same dtypes and whose other arguments are equal.
    """
    collected = _collected.get()
    if collected is None:
        kernel[grid](**arguments)
        return
    kinds = {name: value.dtype if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    collected.setdefault((kernel, *kinds.items()), partial(kernel.warmup, grid=grid, **arguments))


@contextmanager
def compile_in_parallel(device: torch.device) -> Iterator[None]:
    """Compile the kernels launched in this context, in as many threads as there are cores, instead of launching them.

    Triton compiles each kernel at its first launch, one after another. The 16 kernels of the notebook's shape took
    15.3 s on one core and 9.2 s on two, most of it outside of Python's global interpreter lock; no single kernel takes
    more than 4.3 s.
    """
    token = _collected.set({})
    try:
        yield
        collected = _collected.get()
    finally:
        _collected.reset(token)
    index = torch.cuda.current_device() if device.index is None else device.index
    with (
        _triton_identified(),
        ThreadPoolExecutor(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(index,)) as pool,
    ):
        for compiled in [pool.submit(job) for job in (collected or {}).values()]:
            compiled.result()


@contextmanager
def _triton_identified() -> Iterator[None]:
    """Temporarily replace Triton's hash of its own files, which is part of every compiled kernel's name.

    Triton reads its library of 500 MB for the hash, which takes 0.4 to 0.8 s before a worker's first step. The digests
    that its installer recorded identify the library as well. Where they are missing, Triton computes its hash once
    here, before many threads request it, because it does so without a lock.
    """
    key = _installed_triton()
    with ExitStack() as stack:
        for module in ("triton.runtime.cache", "triton.compiler.compiler"):  # which one depends on the version
            if key is not None:
                stack.enter_context(patched(module, "triton_key", lambda: key))
            elif hash_itself := getattr(importlib.import_module(module), "triton_key", None):
                hash_itself()
                break
        yield


def _installed_triton() -> str | None:
    """Return a hash of the digests of Triton's files that its installer recorded, or None if it recorded none."""
    folder = Path(importlib.import_module("triton").__file__ or "").parent
    for record in folder.parent.glob("*triton*.dist-info/RECORD"):
        digests = record.read_bytes()
        if f"{folder.name}/_C/libtriton.".encode() in digests:
            return hashlib.sha256(digests).hexdigest()
    return None
