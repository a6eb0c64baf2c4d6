"""What sweeps in the tests' own process do differently."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def sender_in_a_thread() -> Iterator[None]:
    """Spares every sweep the imports of a sender's process, 2.8 s; those that tests start as commands have one."""
    from msae_sweep.track.sender_process import SenderThread

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("msae_sweep.track.tracker.SenderProcess", SenderThread)
        yield
