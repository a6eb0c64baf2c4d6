"""Tests of `patched`, which temporarily monkeypatches a function of a third-party module."""

import math
from contextlib import suppress

import pytest

from msae_sweep.patching import patched


def test_it_is_another_while_this_is_open_and_itself_again_after_an_error():
    floor = math.floor
    with suppress(ValueError), patched("math", "floor", lambda x: 7):
        assert math.floor(1.5) == 7
        raise ValueError
    assert math.floor is floor


@pytest.mark.parametrize("module", ["math", "no_such_library.at_all"])
def test_a_library_that_has_no_such_function_is_left_as_it_is(module):
    with patched(module, "no_such_function", lambda: None):
        assert not hasattr(math, "no_such_function")
    assert not hasattr(math, "no_such_function")
