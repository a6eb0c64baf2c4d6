"""Launching kernels; or, before the first launch, compiling all that a step needs side by side."""

import importlib
import os
import threading
from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

_collected: ContextVar[dict[Hashable, partial[Any]] | None] = ContextVar("collected", default=None)
_hashing = threading.Lock()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel; within `compiling`, only note that it is needed."""
    collected = _collected.get()
    if collected is None:
        kernel[grid](*args, **options)
        return
    kinds = tuple(arg.dtype if isinstance(arg, torch.Tensor) else arg for arg in args)
    collected.setdefault((kernel, kinds, *options.items()), partial(kernel.warmup, *args, grid=grid, **options))


@contextmanager
def compiling(device: torch.device) -> Iterator[None]:
    """Compile what is launched in here, in as many threads as there are cores, instead of launching it.

    Triton compiles a kernel when it is first launched, one after another: the 16 of the notebook's shape took 15.3 s on
    one core and 9.2 s on two, most of it outside of Python's lock; no single one takes more than 4.3 s.
    """
    token = _collected.set({})
    try:
        yield
        collected = _collected.get()
    finally:
        _collected.reset(token)
    hash_triton()
    index = torch.cuda.current_device() if device.index is None else device.index
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(index,)) as pool:
        for compiled in [pool.submit(job) for job in (collected or {}).values()]:
            compiled.result()


def hash_triton() -> None:
    """Let Triton hash itself, 500 MB of library, before several threads ask for that at once.

    It keeps the hash, which is a part of every compiled kernel's name, but has no lock around it: each of 16 threads
    would take its own 0.3 s or more of a core, in every worker of a sweep. Where it lies differs between versions, and
    where it is nowhere a first step only begins later.
    """
    with _hashing:
        for name in ("triton.runtime.cache", "triton.compiler.compiler"):
            triton_key = getattr(importlib.import_module(name), "triton_key", None)
            if triton_key is not None:
                triton_key()
                return
