"""Fixture that makes Triton's interpreter faster for the tests in this folder, without changing what it computes."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="session")
def language_patched_once() -> Iterator[None]:
    """Keep the interpreter from patching its language again at every call from one function of a kernel to another.

    It replaces the built-ins of the language when a kernel is launched, which is needed. It does so again at every call
    within the kernel, where nothing is left to replace, and this takes half of the time.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        yield
        return
    language, patch_language = interpreter.tl, getattr(interpreter, "_patch_lang", None)
    if patch_language is None:  # a version of Triton that does it in another way
        yield
        return
    patched: set[str] = set()

    def patch(function: Any) -> Any:
        used = {module.__name__ for module in (language, language.core) if module in function.__globals__.values()}
        new = used - patched
        if used and not new:
            return None  # at a call within a kernel, the return value is not used
        scope = patch_language(function)
        if scope is None:  # a version of Triton that restores nothing, which has to be left alone
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
