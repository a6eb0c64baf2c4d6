"""Tests that CONTRIBUTING lists every private part of a library that the package uses, each with its test."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"_replace", "_asdict", "_fields", "_exit", "_"}
"""Public names that begin with an underscore to avoid collisions, such as `NamedTuple._replace`, and `os._exit`."""
IN_TEXT = {"_block", "_k", "_reconstruct"}
"""String constants of the package that look like private names: parts of our own keys, and of numpy's pickles."""


class Row(NamedTuple):
    """Row of the list in CONTRIBUTING."""

    parts: list[str]
    file: str
    test: str


def listed() -> list[Row]:
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("\n## Private parts of libraries\n")[1].split("\n## ")[0]
    cells = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return [Row(re.findall(r"`(\S+)`", c[0]), c[1].strip(" `"), c[3].strip(" `")) for c in cells]


def is_private(dotted: str) -> bool:
    return any(re.match(r"_[a-zA-Z]", part) or part == "generated" for part in dotted.split("."))


def private_parts(source: str) -> set[str]:
    """Return the names in a module's source that are private to a library, or whose function is patched."""
    nodes = list(ast.walk(ast.parse(source)))
    own = OURS | IN_TEXT | {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) in ("self", "cls")}
    found = set()
    for node in nodes:
        match node:
            case ast.Import():
                found |= {alias.name for alias in node.names if is_private(alias.name)}
            case ast.ImportFrom(module=str(module)) if not module.startswith("msae_sweep"):
                names = {f"{module}.{alias.name}" for alias in node.names}
                found |= {name for name in names if is_private(name)}
            case ast.Call(func=ast.Name(id="patched"), args=[module, name, *_]):
                words = [argument.value for argument in (module, name) if isinstance(argument, ast.Constant)]
                found.add(".".join(map(str, words)))
            case ast.Attribute(attr=name) | ast.Constant(value=str(name)) | ast.keyword(arg=str(name)):
                if name.isidentifier() and is_private(name) and name not in own:
                    found.add(name)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "msae_sweep").rglob("*.py")), ids=lambda path: path.stem)
def test_a_module_uses_the_private_parts_that_are_listed_for_it_and_no_others(path):
    file = path.relative_to(ROOT / "msae_sweep").as_posix()
    expected = {part for row in listed() if row.file == file for part in row.parts}
    assert private_parts(path.read_text(encoding="utf-8")) == expected


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("import ray._private.worker", "ray._private.worker"),
        ("from ray.core.generated import a_pb2", "ray.core.generated.a_pb2"),
        ("patched('mlflow.utils', 'slow', fast)", "mlflow.utils.slow"),
        ("def f(trial):\n    return trial._runner", "_runner"),
        ("ray.init(_memory=1)", "_memory"),
        ("options = {'_temp_dir': folder}", "_temp_dir"),
    ],
)
def test_a_private_part_is_found(source, part):
    assert private_parts(source) == {part}


def test_what_is_our_own_is_no_private_part_of_a_library():
    assert private_parts("class A:\n    def _f(self, other):\n        return self._g, other._f, other._g") == set()


@pytest.mark.parametrize("row", listed(), ids=lambda row: row.parts[0])
def test_a_private_part_still_exists_and_its_test_too(row):
    tests = [file for file in (ROOT / "tests").rglob("test_*.py") if f"def {row.test}(" in file.read_text("utf-8")]
    assert len(tests) == 1, row.test
    for part in row.parts:
        assert exists(part), part


def exists(part: str) -> bool:
    """Return True if a module, a name in it, an option of `ray.init` or an attribute of Tune's controller exists."""
    if part == "triton_key":  # its module depends on Triton's version, and newer versions name it differently
        return True
    if "." not in part:
        import ray
        from ray.tune.execution import tune_controller

        sources = inspect.getsource(ray.init), inspect.getsource(tune_controller)
        return any(re.search(rf"\b{part}\b", source) for source in sources)
    try:
        importlib.import_module(part)
    except ImportError:
        module, _, name = part.rpartition(".")
        return hasattr(importlib.import_module(module), name)
    return True
