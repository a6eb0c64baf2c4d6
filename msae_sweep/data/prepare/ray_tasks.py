"""Ray Data pipelines with one task per row range, and the errors of their tasks without Ray's wrapper."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
import ray.data

from msae_sweep import errors
from msae_sweep.errors import MsaeSweepError

RANGES_PER_WORKER = 4
"""Number of row ranges that make it worthwhile to start one more worker. A worker imports for seconds, while a range of
32 MiB takes a tenth of a second, and trial workers that start at the same time wait for the same cores and disk."""


def over_ranges(numbers: Iterable[int], function: Callable[..., dict[str, Any]]) -> ray.data.Dataset:
    """Return a Ray Data pipeline that calls `function` for each number, in a separate task."""
    items = [{"i": i} for i in numbers]
    at_once = ray.data.TaskPoolStrategy(size=max(1, -(-len(items) // RANGES_PER_WORKER)))
    return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        function, batch_size=1, compute=at_once
    )


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Re-raise an error that a task raised on purpose with its own class, without Ray's wrapper around it.

    The error is restored from the text of Ray's error, because only some code paths of Ray Data keep the exception
    object itself.
    """
    try:
        yield
    except Exception as error:
        # A task's exception can be an instance of its own class and of RayTaskError at once; its text is then a
        # traceback.
        if isinstance(error, MsaeSweepError) and not isinstance(error, ray.exceptions.RayTaskError):
            raise
        ours = re.findall(r"^msae_sweep\.errors\.(\w+): (.+)$", str(error), re.MULTILINE)
        if not ours:
            raise
        name, message = ours[-1]
        raise getattr(errors, name)(message) from None
