"""Tests that the reference in search_spaces/README.md lists every key of a search space once, as the schema has it."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo

from msae_sweep.config import SweepConfig, load, parse
from msae_sweep.config.distribution import DistributionKind
from msae_sweep.config.frozen_model import FrozenModel
from msae_sweep.config.yaml_file import read_yaml

FOLDER = Path(__file__).parents[1] / "search_spaces"
REFERENCE = (FOLDER / "README.md").read_text(encoding="utf-8")


def section_of(annotation: Any) -> type[FrozenModel] | None:
    """Return the model of a key that is a section, even one that may be null, and None for any other key."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((part for part in parts if isinstance(part, type) and issubclass(part, FrozenModel)), None)


def keys_of(model: type[FrozenModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every key of a model and of the sections below it, in dotted form."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if below := section_of(field.annotation):
            yield from keys_of(below, f"{prefix}{name}.")


def options_of(annotation: Any) -> set[str]:
    """Return the words that a key accepts: the values of its `Literal`s, and null."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return {"null"} if annotation is NoneType else set().union(*map(options_of, get_args(annotation)))


def default_of(field: FieldInfo) -> Any:
    """Return the default as YAML shows it, `required`, or `see below` for a section whose keys have defaults."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if below := section_of(field.annotation):
        assert default == below(), "a section whose default is not that of its keys"
        return "see below"
    return list(default) if isinstance(default, tuple) else default


def differences(text: str) -> list[str]:
    """Return the differences between the reference and the schema as sorted lines `key: what is wrong`."""
    rows = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    rows = [row for row in rows if len(row) == 4 and row[0].startswith("`")]
    written: dict[str, list[list[str]]] = {}
    for key, *cells in rows:
        written.setdefault(key.strip("`"), []).append(cells)
    schema, found = dict(keys_of(SweepConfig)), []
    for key, field in schema.items():
        if len(written.get(key, [])) != 1:
            found.append(f"{key}: stands there {len(written.get(key, []))} times")
            continue
        ((values, default, meaning),) = written[key]
        shown = re.match("`(.*?)`", default)
        value = read_yaml(shown[1]) if shown else default
        if value != default_of(field) or isinstance(value, bool) != isinstance(default_of(field), bool):
            found.append(f"{key}: default {default} instead of {default_of(field)}")
        words, options = set(re.findall("`(.*?)`", values)), options_of(field.annotation)
        if not options <= words or (options - {"null"} and words != options):
            found.append(f"{key}: values {sorted(words)} instead of {sorted(options)}")
        if not meaning.endswith("."):
            found.append(f"{key}: no sentence says what it means")
    return sorted([*found, *(f"{key}: no such key" for key in written.keys() - schema.keys())])


def test_the_reference_has_every_key_of_the_schema_once_with_its_default_and_options():
    assert len(dict(keys_of(SweepConfig))) > 50
    assert differences(REFERENCE) == []


AUX_K = next(line for line in REFERENCE.splitlines() if line.startswith("| `training.aux_k`"))
WRONG = {
    "a key is missing": (AUX_K, "", ["training.aux_k: stands there 0 times"]),
    "a key stands there twice": (AUX_K, f"{AUX_K}\n{AUX_K}", ["training.aux_k: stands there 2 times"]),
    "a key that does not exist": (
        AUX_K,
        f"{AUX_K}\n{AUX_K.replace('aux_k', 'aux_q')}",
        ["training.aux_q: no such key"],
    ),
    "a number that is another": ("| `512` |", "| `511` |", ["training.aux_k: default `511` instead of 512"]),
    "a list that is another": ("`[16, 32, 64, 128]`", "`[16]`", [r"training.k_levels: default .* instead of \[16,"]),
    "1 in place of true": (
        "`true`, `false` | `true` | Keep",
        "`true`, `false` | `1` | Keep",
        ["training.normalize_decoder: default `1` instead of True"],
    ),
    "a default of what is required": (
        "`planted` | required |",
        "`planted` | `planted` |",
        ["data.path: default `planted` instead of required"],
    ),
    "an option is missing": ("`auto`, `row`, `game_id`", "`auto`, `row`", ["data.split_by: values .*row.* instead of"]),
    "an option too many": ("`uniform`, `reverse`", "`uniform`, `linear`, `reverse`", ["training.weighting: values .*"]),
    "null is not named": ("above 0, or `null`", "above 0", [r"training.gradient_clip: values \[\] instead of .*null"]),
    "no meaning": ("Adam's step size.", "", ["training.learning_rate: no sentence"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_reference_that_differs_from_the_schema_is_found(case):
    right, wrong, says = WRONG[case]
    assert right in REFERENCE
    found = differences(REFERENCE.replace(right, wrong, 1))
    assert len(found) == len(says)
    assert all(re.match(pattern, line) for pattern, line in zip(says, found, strict=True)), found


def test_the_reference_names_every_distribution():
    assert re.findall(r"^\| `(\w+): \[", REFERENCE, re.MULTILINE) == list(get_args(DistributionKind))


def test_the_references_file_and_overrides_are_valid():
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", REFERENCE, re.DOTALL | re.MULTILINE)
    assert parse(example).data.blocks == (5, 20)
    spans = re.findall(r"`(--set [^`]+)`", REFERENCE)
    assert len(spans) >= 5
    for span in spans:
        load(FOLDER / "leela_zero.yaml", shlex.split(span)[1::2])


def test_the_reference_names_every_search_space():
    for path in FOLDER.glob("*.yaml"):
        assert f"`{path.name}`" in REFERENCE
