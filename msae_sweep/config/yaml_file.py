"""Read search-space files and `--set` overrides into plain mappings, and turn pydantic's errors into one line.

A search space is a few kilobytes of YAML. Its size and nesting are checked before any values are built from it, because
a few lines of aliases can stand for more values than fit into memory. This module does not know which keys exist.
"""

import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from msae_sweep.config.frozen_model import short_repr
from msae_sweep.errors import ConfigError, first_line
from msae_sweep.paths import StoragePath

MAX_BYTES = 1 << 18
"""Maximum size of a file in bytes. Reading YAML of this size takes about two seconds."""
MAX_VALUES = 20_000
"""Maximum number of values in a file. Values that an alias repeats are counted each time."""
MAX_DEPTH = 20
"""Maximum number of nesting levels. A search space has five."""


def read_text(path: str | Path, source: str) -> str:
    """Return the text of a search-space file.

    Args:
        path: path or URI of the file.
        source: name of the file in error messages.

    Raises:
        ConfigError: the file does not exist, is larger than `MAX_BYTES`, or is not text.
    """
    place = StoragePath(path)
    try:
        if place.is_remote:
            size, content = int(place.info().size or 0), b""
            if size <= MAX_BYTES:
                content = place.read()
        else:
            with open(path, "rb") as file:
                content = file.read(MAX_BYTES + 1)
            size = len(content)
        if size > MAX_BYTES:
            raise ConfigError(f"{source}: larger than {MAX_BYTES >> 10} KiB; give a search-space file")
        return content.decode()
    except FileNotFoundError:
        raise ConfigError(f"{source}: no such search-space file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: cannot be read as text: {error}") from None


def read_yaml(text: str) -> Any:
    """Return the single document of a YAML text as mappings, lists and plain values; None if the text is empty.

    Raises:
        ConfigError: the text is not YAML, exceeds a limit, or has a key that occurs twice or is a list or mapping. The
            message does not name the file.
    """
    try:
        _check_size(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_keys(node, set())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}") from None
    except (ValueError, LookupError) as error:  # raised for a tag such as !!int before a text that is no int
        raise ConfigError(f"not YAML: {first_line(error)}") from None


def apply_override(raw: dict[str, Any], override: str) -> tuple[str, Any]:
    """Apply an override `a.b=c` to `raw`, creating missing sections. The right-hand side is YAML.

    Returns:
        The dotted key and its new value.

    Raises:
        ConfigError: the override is not of that form, or a part of the dotted key names a value, not a section.
    """
    dotted, separator, text = override.partition("=")
    named = f"--set {override if len(override) <= 100 else override[:100] + '…'}"
    *parents, last = dotted.split(".")
    if not separator or not all([*parents, last]) or len(parents) >= MAX_DEPTH:
        raise ConfigError(f"{named}: must be key=value, e.g. --set training.epochs=5")
    try:
        value = read_yaml(text)
    except ConfigError as error:
        reason = str(error).removeprefix("not YAML: ")
        raise ConfigError(f"{named}: the value is not YAML" if reason != str(error) else f"{named}: {error}") from None
    target = raw
    for parent in parents:
        below = target.get(parent)
        if below is None:
            below = target[parent] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"{named}: {parent} is {short_repr(below)}, not a section")
        target = below
    target[last] = value
    return dotted, value


def reject_overrides_of_varied_keys(overridden: Mapping[str, Any], varied: Collection[str]) -> None:
    """Reject a `--set` of a training key that the space varies, because no trial would use its value.

    Args:
        overridden: dotted keys and values, as `apply_override` returns them.
        varied: keys of the space.

    Raises:
        ConfigError: there is such a key. The message says what to write instead.
    """
    settings = {key: value for key, value in overridden.items() if key.startswith("training.")}
    settings |= {f"training.{key}": value for key, value in section(overridden, "training").items()}
    for dotted, value in settings.items():
        key = dotted.removeprefix("training.")
        if key in varied:
            fixed = f"space.{key}={yaml.safe_dump({'choice': [value]}, default_flow_style=True).strip()}"
            raise ConfigError(
                f"--set {dotted}: space varies {key}, so no trial would use {short_repr(value)}; write "
                f"--set {shlex.quote(fixed)}, or --set space.{key}=null to stop varying it"
            )


def first_error_line(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """Return the first error of a pydantic `ValidationError` as one line.

    Args:
        model: the validated model, used to name the key and to suggest similar ones; without it the key is left out.
    """
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if not str(part).startswith("["))
    message = " ".join(first["msg"].split()).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"no such key; {suggest(str(first['loc'][-1]), _fields_at(model, first['loc'][:-1]))}"
    elif first["type"] == "missing":
        message = "is missing"
    elif first["type"] == "tuple_type":
        message = f"{short_repr(first['input'])} must be a list in brackets, e.g. [5, 20]"
    elif first["type"] != "value_error":
        message = f"{message}, got {short_repr(first['input'])}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{place}: {message}{more}" if model and place else f"{message}{more}"


def suggest(key: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown key: the most similar known key, or all known keys if none is similar."""
    import difflib

    known = list(known)
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known keys are {', '.join(known)}"


class _Loader(yaml.SafeLoader):
    """Loader that reads `1e-4` as a number and 2026-11-27 as text, where YAML 1.1 has text and a date."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _check_size(text: str) -> None:
    """Check nesting and number of values on the parser's flat stream of events, before any value is built."""
    n_values, depth = 0, 0
    sizes: dict[str, int] = {}
    open_anchors: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in open_anchors):
                raise ConfigError(f"alias *{event.anchor} is used inside its own definition")
            n_values += sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_anchors.append((event.anchor, n_values))
            n_values, depth = n_values + 1, depth + 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_anchors.pop()
            depth -= 1
            if anchor is not None:
                sizes[anchor] = n_values - before
        elif isinstance(event, yaml.ScalarEvent):
            n_values += 1
        if depth > MAX_DEPTH:
            raise ConfigError(f"more than {MAX_DEPTH} levels of nesting; a search space has five")
        if n_values > MAX_VALUES:
            raise ConfigError(
                f"more than {MAX_VALUES:,} values with all aliases expanded; a search space has about a hundred"
            )


def _check_keys(node: yaml.Node, seen: set[int]) -> None:
    """Reject keys that are lists or mappings and keys that occur twice, before merge keys (`<<`) add more keys."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _check_keys(child, seen)
    elif isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: the key is a list or mapping; it must be a word")
            if key.value in keys:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: key {key.value!r} occurs twice")
            keys.add(key.value)
            _check_keys(value, seen)


def _fields_at(model: Any, location: tuple[int | str, ...]) -> Iterable[str]:
    for part in location:
        annotation = model.model_fields[part].annotation if model and part in model.model_fields else None
        options = getattr(annotation, "__args__", (annotation,))
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return tuple(model.model_fields) if model else ()


def section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return section `name` of `raw`; an empty mapping if it is missing or not a mapping."""
    found = raw.get(name)
    return found if isinstance(found, Mapping) else {}
