"""Makes Triton's interpreter faster for this room's tests, without changing what it computes."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="session")
def language_patched_once() -> Iterator[None]:
    """Keep the interpreter from looking through its language again wherever one function of a kernel calls another.

    It replaces the language's built-ins when a kernel is launched, which is needed, and again at every call within,
    which finds nothing left to replace and takes half of the time.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        yield
        return
    language, patch_language = interpreter.tl, getattr(interpreter, "_patch_lang", None)
    if patch_language is None:  # a version that does it in another way
        yield
        return
    patched: set[str] = set()

    def patch(function: Any) -> Any:
        used = {module.__name__ for module in (language, language.core) if module in function.__globals__.values()}
        new = used - patched
        if used and not new:
            return None  # a call within a kernel, where nothing is asked back
        scope = patch_language(function)
        if scope is None:  # a version that takes nothing back, and has to be left alone
            return None
        patched.update(new)
        restore = scope.restore

        def restore_and_forget() -> None:
            restore()
            patched.difference_update(new)

        scope.restore = restore_and_forget
        return scope

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch)
        yield
