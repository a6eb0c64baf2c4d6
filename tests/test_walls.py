"""Tests that imports between subpackages go in one direction only, and that each heavy library stays in its place."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "msae_sweep"

# A subpackage or module may import itself and those in later rows, but not its neighbours in the same row.
ORDER = [
    ["cli"],
    ["sweep", "go"],
    ["report"],
    ["models"],
    ["track"],
    ["sae", "data", "sweep_folder"],
    ["config"],
    ["format_version", "paths", "patching", "signals", "stderr_filter"],
    ["errors"],
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}

HOMES = {
    "ray": (
        "data/prepare/shards.py", "data/prepare/ray_tasks.py", "go/extract.py", "go/extraction_actor.py",
        "go/pipeline.py", "go/game_reading.py", "go/random_games.py", "go/top_activation", "sweep/",
    ),
    "mlflow": ("track/",),
    "triton": ("sae/kernels/",),
    "optuna": ("sweep/",),
    "matplotlib": ("models/", "report/"),
    "jinja2": ("report/", "go/diagrams.py"),
    "sgfmill": ("go/sgf.py",),
}  # fmt: skip


def imports_of(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def faults(relative: str, source: str) -> list[str]:
    """Return one message for each import of a module that breaks these rules."""
    room = relative.split("/")[0].removesuffix(".py")
    found = []
    for name in imports_of(source):
        top, *below = name.split(".")
        if top == "msae_sweep" and below and below[0] in RANK and room in RANK:
            own, other = RANK[room], RANK[below[0]]
            if other < own or (other == own and below[0] != room):
                found.append(f"{relative} imports {name}, which stands above or beside it")
        if top in HOMES and not relative.startswith(HOMES[top]):
            found.append(f"{relative} imports {top}, whose home is {', '.join(HOMES[top])}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_module_imports_across_a_wall(path):
    assert faults(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("sae/train.py", "import ray"),
        ("sae/train.py", "def f():\n    from msae_sweep.data.batches import loader"),
        ("data/batches/loader.py", "from msae_sweep.track.tracker import Tracker"),
        ("data/sources/base.py", "import ray.data"),
        ("sweep/run.py", "import mlflow"),
        ("sae/model.py", "import triton.language as tl"),
        ("go/planes.py", "from sgfmill import boards"),
        ("data/sources/base.py", "from msae_sweep.go.sgf import Game"),
        ("errors.py", "from msae_sweep import config"),
        ("sweep_folder/summary.py", "from msae_sweep.sweep.run import run"),
        ("models/find.py", "from msae_sweep.report.build import build"),
    ],
)
def test_the_walls_can_fail(relative, source):
    assert faults(relative, source)


@pytest.mark.parametrize("module", ["msae_sweep", "msae_sweep.cli", "msae_sweep.config", "msae_sweep.track"])
def test_the_front_door_imports_nothing_heavy(module):
    heavy = "{'torch', 'ray', 'mlflow', 'numpy', 'pyarrow', 'matplotlib'} & set(sys.modules)"
    code = f"import sys, {module}; print(sorted({heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "module", ["msae_sweep.go.pipeline", "msae_sweep.go.game_reading", "msae_sweep.data.prepare.passes"]
)
def test_what_runs_in_a_process_a_core_imports_no_torch(module):
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_package_is_in_the_order():
    rooms = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.name not in ("__pycache__", "__init__.py")}
    assert rooms - {"__main__"} <= set(RANK)
