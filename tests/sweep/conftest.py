"""Fixture for sweeps that run in the tests' own process."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def sender_in_a_thread() -> Iterator[None]:
    """Run the sender in a thread, which saves every sweep the 2.8 s that the imports of a sender's process take.

    Sweeps that tests start as commands still have a sender's process.
    """
    from sender_thread import SenderThread

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("msae_sweep.track.tracker.SenderProcess", SenderThread)
        yield
