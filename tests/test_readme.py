"""Tests that the code blocks of README and USAGE work when they are typed in order.

Every command must parse, and what it names must exist by then. In the quick tests, the programs only record how they
are called. The slow test runs everything that can run here, on few games and in short sweeps.
"""

import ast
import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from msae_sweep import config
from msae_sweep.cli import app
from msae_sweep.errors import MsaeSweepError
from msae_sweep.go.weights import random_weights, write_weights

ROOT = Path(__file__).parents[1]
BASH = shutil.which("bash") or "bash"
REAL_DATA = Path(os.environ.get("MSAE_SWEEP_REAL_DATA", ROOT.parent / "shared" / "data"))

DOCUMENTS = ("README.md", ".github/USAGE.md")
"""Documents whose code blocks a reader types into one folder, one document after the other."""
GIVEN = ("leelaz-6x64.txt.gz", "leelaz-40x256.txt.gz", "games.tar.gz")
"""Files that the reader has before the first command."""
OUTPUTS = ("Best trial of each block", "sweeps/leela-zero/")
"""Beginnings of the blocks that show what a command prints or which files it leaves."""
NOT_RUN = {
    "pip": "installs the package that is being tested, and its dependencies",
    "pytest": "the suite that this test belongs to",
    "ray": "submits a job to a cluster that is not there; tests/cluster submits such jobs to its own",
}
"""Programs that are not run, with the reason for each."""
NOT_RUN_WITH = {"resources.gpu=": "needs a GPU"}
"""Parts of a command that keep it from running in a test, with the reason."""
PLACEHOLDER = re.compile(r"\b[A-Z]{4,}\b|\w+://(?!/)\w|/shared/")
"""Pattern of the placeholders that a reader replaces, such as HEAD or s3://bucket."""


class Block(NamedTuple):
    """Code block of a document."""

    where: str
    """Document and line number."""
    language: str
    text: str

    @property
    def commands(self) -> str:
        """Lines that are typed: in a block with prompts, only the lines after a prompt and their continuation lines."""
        if not self.text.startswith("$ "):
            return self.text
        typed, going_on = [], False
        for line in self.text.splitlines():
            if line.startswith("$ ") or going_on:
                typed.append(line.removeprefix("$ "))
                going_on = line.endswith("\\")
        return "\n".join(typed)


def blocks_of(text: str, document: str) -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    blocks = [
        Block(f"{document}, line {text.count(chr(10), 0, match.start()) + 1}", match[1], match[2]) for match in found
    ]
    return [block for block in blocks if not block.text.startswith(OUTPUTS)]


BLOCKS = [block for name in DOCUMENTS for block in blocks_of((ROOT / name).read_text(encoding="utf-8"), name)]
SCRIPTS, PYTHON = ([block for block in BLOCKS if block.language == language] for language in ("", "python"))

RECORDING = """#!/bin/sh
printf '%s\\037' "${{0##*/}}" "$@" >> {calls}
printf '\\036' >> {calls}
"""


def shims(folder: Path, programs: tuple[str, ...], text: str) -> Path:
    folder.mkdir(exist_ok=True)
    for program in programs:
        (folder / program).write_text(text)
        (folder / program).chmod(0o755)
    return folder


def typed(block: Block, folder: Path) -> list[list[str]]:
    """Return the calls of programs that result when a block is typed into a shell."""
    calls = folder / "calls"
    programs = ("msae-sweep", "python", *NOT_RUN)
    path = shims(folder / "bin", programs, RECORDING.format(calls=shlex.quote(str(calls))))
    calls.write_text("")
    done = subprocess.run([BASH, "-euc", block.commands], cwd=folder, env={"PATH": str(path)}, capture_output=True)
    assert done.returncode == 0, f"{block.where}: {done.stderr.decode()}"
    return [call.split("\037")[:-1] for call in calls.read_text().split("\036")[:-1]]


class World:
    """Files and folders in the reader's folder after the commands so far."""

    def __init__(self) -> None:
        self.files = {*GIVEN}
        self.activations: dict[str, tuple[int, ...]] = {}
        self.sweeps: dict[str, tuple[int, ...]] = {}
        self.champions: set[int] = set()

    def call(self, program: str, *arguments: str) -> None:
        """Check one call and record what it creates: its options must exist, and what it names must be there.

        Raises:
            AssertionError, click's exceptions, MsaeSweepError: the call would fail.
        """
        if program == "ray":  # the job's command uses a cluster's data, so only its options are checked
            _, inner = " ".join(arguments).split(" -- python -m msae_sweep ")
            parameters(inner.split())
        elif program == "python":
            for name in arguments:
                assert name.startswith("-") or name in ("json.tool", *self.files) or self._of_a_sweep(name), name
        elif program == "msae-sweep":
            command, options = parameters(list(arguments))
            getattr(self, f"_{command}")(options)

    def python(self, text: str) -> None:
        """Check that a block of Python names only what exists."""
        ast.parse(text)
        for sweep, block in re.findall(r'ms\.load\("(.*?)", block=(\d+)\)', text):
            assert int(block) in self.sweeps[sweep]
        for folder, block in re.findall(r'np\.load\("(.*?)/block(\d+)/chunk_0000\.npy"\)', text):
            assert int(block) in self.activations[folder]
        for block in re.findall(r'"models:/msae-block(\d+)@champion"', text):
            assert int(block) in self.champions

    def _of_a_sweep(self, name: str) -> bool:
        return any(name == f"{sweep}/results/reconstruction.json" for sweep in self.sweeps)

    def _extract(self, options: dict[str, Any]) -> None:
        assert {str(options["weights"]), str(options["games"])} <= self.files
        self.activations[str(options["out"])] = tuple(int(block) for block in options["blocks"].split(","))

    def _run(self, options: dict[str, Any]) -> None:
        named = {"data.path": options["data"], "name": options["name"]}
        overrides = [f"{key}={value}" for key, value in named.items() if value]
        space = config.load(str(ROOT / options["space"]), [*(options["overrides"] or []), *overrides])
        there = space.data.blocks if space.data.path == "planted" else self.activations[space.data.path]
        assert set(space.data.blocks or there) <= set(there), f"{space.data.path} has blocks {there}"
        folder = f"{space.storage}/{space.name}"
        assert folder not in self.sweeps, f"{folder} exists"
        self.sweeps[folder] = tuple(space.data.blocks or there)
        if space.tracking.register_models:
            self.champions |= set(self.sweeps[folder])

    def _inspect(self, options: dict[str, Any]) -> None:
        assert options["path"] in self.activations

    def _model(self, what: str, block: int | None) -> None:
        if what.startswith("champion:"):
            assert int(what.removeprefix("champion:")) in self.champions
        elif what not in self.files:
            blocks = self.sweeps[what]
            assert block in blocks if block is not None else len(blocks) == 1, f"{what} has blocks {blocks}"

    def _boards(self, options: dict[str, Any]) -> None:
        self._model(options["model"], options["block"])
        assert {str(options["weights"]), str(options["games"])} <= self.files

    def _report(self, options: dict[str, Any]) -> None:
        assert set(options["sweeps"]) <= set(self.sweeps), options["sweeps"]

    def _eval(self, options: dict[str, Any]) -> None:
        for what in (options["what"], *(options["against"] or [])):
            self._model(what, options["block"])
        assert options["data"] or options["what"] in self.sweeps

    def _encode(self, options: dict[str, Any]) -> None:
        self._model(options["what"], options["block"])
        assert options["data"] in self.activations or (options["data"] is None and options["what"] in self.sweeps)

    def _export(self, options: dict[str, Any]) -> None:
        if str(options["out"]).endswith(".zip"):
            assert options["what"] in self.sweeps, options["what"]
        else:
            self._model(options["what"], options["block"])
        self.files.add(str(options["out"]))

    def _import(self, options: dict[str, Any]) -> None:
        assert str(options["file"]) in self.files, f"no {options['file']}"
        block = int(re.findall(r"\d+", str(options["file"]))[0])
        there = self.activations[options["data"]] if options["data"] else self.sweeps[options["sweep"]]
        assert block in there


def parameters(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """Return a command and its options, as the command line parses them."""
    name, *rest = arguments
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    try:
        return name, commands[name].make_context(name, rest).params
    except Exception as error:  # newer versions of typer have their own copy of click
        raise AssertionError(f"msae-sweep {shlex.join(arguments)}: {error}") from None


def check(blocks: list[Block], folder: Path, world: World) -> None:
    """Check every block in order."""
    for block in blocks:
        assert block.language in ("", "python"), f"{block.where}: {block.language}: how is it run?"
        if block.language == "python":
            world.python(block.text)
            continue
        calls = typed(block, folder)
        assert calls, f"{block.where}: no command; is it an output?"
        for call in calls:
            world.call(*call)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """Reader's folder at the end of the documents, after every command has been checked."""
    found = World()
    check(BLOCKS, tmp_path_factory.mktemp("reader"), found)
    return found


def test_every_command_of_readme_and_usage_parses_and_names_what_is_there_by_then(world):
    assert {block.where.partition(",")[0] for block in BLOCKS} == set(DOCUMENTS)
    assert {"sweeps/quickstart", "sweeps/leela-zero", "sweeps/leela-zero-baselines"} <= set(world.sweeps)
    assert set(world.activations) == {"activations", "activations-40x256"}


WRONG = {
    "an option that is none": ("msae-sweep inspect --all activations", "No such option: --all"),
    "a value that is none": ("msae-sweep run search_spaces/baselines.yaml --set training.epoch=1", "no such key"),
    "a program that is none": ("msae-swep inspect activations", "msae-swep: command not found"),
    "a command that is none": ("msae-sweep inspekt activations", "inspekt"),
    "blocks that are not there": (
        "msae-sweep run search_spaces/baselines.yaml --name b --data activations",
        r"activations has blocks \(2, 4, 5\)",
    ),
    "a sweep that exists": ("msae-sweep run search_spaces/quickstart.yaml", "sweeps/quickstart exists"),
    "a sweep that is not there": ("msae-sweep report sweeps/leela", "sweeps/leela"),
    "a model of several": ("msae-sweep eval sweeps/leela-zero", r"sweeps/leela-zero has blocks \(2, 4, 5\)"),
    "a file that is not there": ("msae-sweep import msae_block5.pt --data activations", r"msae_block5\.pt"),
    "an output": ("block 5: 3 trials", "block: command not found"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_block_that_would_not_work_is_found(tmp_path, world, case):
    block, says = WRONG[case]
    with pytest.raises((AssertionError, LookupError, MsaeSweepError), match=says):
        check(blocks_of(f"```\n{block}\n```\n", "a document"), tmp_path, copy.deepcopy(world))


def test_placeholders_stand_in_commands_only_that_are_not_run():
    for block in SCRIPTS:
        if PLACEHOLDER.search(block.commands):
            assert block.commands.split()[0] in NOT_RUN, block.where
    assert PLACEHOLDER.search("ray job submit --address http://HEAD:8265")
    assert PLACEHOLDER.search("msae-sweep inspect s3://bucket/activations")


SMALLER = """#!/bin/sh
# Commands as the documents have them, but for the length of sweeps. One size: of so little training the best may have
# any, and latent 560 of a model is asked for.
case "$1 $2" in
    *baselines.yaml) set -- "$@" --set training.epochs=3 ;;
    run*) set -- "$@" --set training.epochs=3 --set search.trials_per_block=2 \\
        --set "space.expansion_factor={{choice: [16]}}" ;;
esac
exec {python} -m msae_sweep "$@"
"""


@pytest.fixture
def reader(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """Folder with the files that a reader has at the start, and the environment of the reader's shell."""
    weights, games = REAL_DATA / "weights" / "lz-6x64.txt.gz", REAL_DATA / "games.tar.gz"
    if not weights.is_file() or not games.is_file():
        pytest.skip(f"no {weights} and {games}; set MSAE_SWEEP_REAL_DATA to a folder that holds them")
    (tmp_path / "leelaz-6x64.txt.gz").symlink_to(weights)
    # The blocks of the large network are kept, but with few filters.
    write_weights(random_weights(40, 16, seed=0), tmp_path / "leelaz-40x256.txt.gz")
    with tarfile.open(games) as archive, tarfile.open(tmp_path / "games.tar.gz", "w:gz") as few:
        for member in [member for member in archive.getmembers() if member.isfile()][:80]:
            few.addfile(member, archive.extractfile(member))
    for name in ("search_spaces", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = shims(tmp_path / "bin", tuple(NOT_RUN), "#!/bin/sh\n")
    shims(path, ("python",), f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    shims(path, ("msae-sweep",), SMALLER.format(python=sys.executable))
    environment = {
        **os.environ,
        "PATH": f"{path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_ADDRESS": "local",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    return tmp_path, environment


@pytest.mark.slow
def test_readme_and_usage_work_as_they_are_written_from_top_to_bottom(reader):
    folder, environment = reader
    python = ""
    for block in BLOCKS:
        if reason := next((reason for text, reason in NOT_RUN_WITH.items() if text in block.text), None):
            print(f"{block.where}: not run: {reason}")
            continue
        if block.language == "python":
            python += block.text
        command = [sys.executable, "-c", python] if block.language == "python" else [BASH, "-euc", block.commands]
        started = time.monotonic()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        print(f"{block.where}: {time.monotonic() - started:.0f} s")
        assert done.returncode == 0, f"{block.where}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
