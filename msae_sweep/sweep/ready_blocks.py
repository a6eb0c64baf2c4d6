"""Actor from which trials get references to the prepared blocks.

The actor's process imports this module and nothing heavier. If it handled the prepared blocks themselves, it would
import torch and Ray Tune, which takes 4 s of a core while the trials' workers start; so it hands out references.
"""

import asyncio
from collections import defaultdict

import ray

from msae_sweep.errors import SweepError


class ReadyBlocks:
    """Actor that holds references to the blocks that are ready; a caller who requests another block waits."""

    def __init__(self) -> None:
        self._references: dict[int, list[ray.ObjectRef]] = {}
        self._settled: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)
        self._gave_up = False

    async def put(self, block: int, reference: list[ray.ObjectRef]) -> None:
        """Record that a block is ready. The list keeps Ray from replacing the reference by the block itself."""
        self._references[block] = reference
        self._settled[block].set()

    async def give_up(self) -> None:
        """End the waiting: no further block will be ready."""
        self._gave_up = True
        for settled in self._settled.values():
            settled.set()

    async def has(self, block: int) -> bool:
        """Return whether a block is ready."""
        return block in self._references

    async def get(self, block: int) -> list[ray.ObjectRef]:
        """Return the reference to a block, in a list, as soon as the block is ready.

        Raises:
            SweepError: the block could not be prepared.
        """
        if not self._gave_up:
            await self._settled[block].wait()
        if block not in self._references:
            raise SweepError(f"block {block} could not be prepared")
        return self._references[block]
