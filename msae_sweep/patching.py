"""Temporarily monkeypatch a function of a third-party module.

This is used where a library does something slow or unwanted and has no setting to turn it off.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def patched(module: str, name: str, by: Callable[..., Any]) -> Iterator[None]:
    """Replace function `name` of `module` by `by` while the context is open. Do nothing if it does not exist."""
    owner: Any = None
    with suppress(ImportError):
        owner = importlib.import_module(module)
    function = getattr(owner, name, None)
    if function is None:
        yield
        return
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, function)
