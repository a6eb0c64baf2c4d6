"""Trial models as MLflow logged models, which load in a fresh process without this package, and the model registry.

A model is saved as an exported graph (`pt2`). It contains no pickle, so loading it runs no code from it and imports
nothing of msae_sweep. At 256 × 4096 the file has 8 MB, and an export takes 0.09 s (the first one 2 s). Models of one
shape therefore share one export, and each fills it with its own tensors. Pickle would take 0.01 s, but it runs code
when it is loaded, and works only where this package is installed.
"""

import contextlib
import json
import re
import shutil
import tempfile
import threading
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from msae_sweep.errors import MsaeSweepError, TrackingError
from msae_sweep.patching import patched
from msae_sweep.sae import model_file
from msae_sweep.sae.model import MSAE
from msae_sweep.sae.model_file import ModelFile
from msae_sweep.track.connection import connect, has_error_code, one_line
from msae_sweep.track.uri import redact, resolve_uri

NAME = "model"
"""Name of a trial's logged model: `runs:/{run_id}/model`."""
GRAPH = "data/*.pt2"
"""Glob pattern of the exported graph in a model's folder, as MLflow writes it."""
MOST_BYTES_KEPT = 64 << 20
"""Size above which a model is exported anew each time. Exports of up to eight smaller shapes are kept."""
_EXPORTING = threading.Lock()
"""Lock for exports: torch can export only one model at a time, and a shape is exported once for all threads."""
CHAMPION = "champion"
"""Alias of the registered version that was best in the sweep that finished last."""


def find_model(client: Any, experiment_id: str, run_id: str) -> Any | None:
    """Return the logged model of a run, ready or not; None if there is none.

    If MLflow answered an earlier creation too late, the run has a second, empty logged model, which is deleted.
    """
    mine = f"source_run_id = '{run_id}' AND name = '{NAME}'"
    found = sorted(client.search_logged_models([experiment_id], filter_string=mine), key=is_ready, reverse=True)
    for twin in found[1:]:
        client.delete_logged_model(twin.model_id)
    return found[0] if found else None


def is_ready(model: Any) -> bool:
    """Return whether a logged model is complete."""
    return str(model.status) == "READY"


class RunOfModel(NamedTuple):
    """Properties of a run that `log_model` needs."""

    experiment_id: str
    run_id: str
    params: Mapping[str, str]
    model_ids: Sequence[str] = ()
    """IDs of the logged models that the run lists as its outputs."""
    may_have_model: bool = True
    """False if the run certainly has no logged model yet, so that MLflow need not be asked."""

    @classmethod
    def read(cls, client: Any, run_id: str) -> "RunOfModel":
        """Read the properties of a run from MLflow."""
        run = client.get_run(run_id)
        outputs = run.outputs.model_outputs if run.outputs else []
        return cls(run.info.experiment_id, run_id, dict(run.data.params), [output.model_id for output in outputs])


def log_model(client: Any, run: RunOfModel, file: ModelFile, metrics: Sequence[Any], step: int) -> None:
    """Log `file`, the model after epoch `step`, as the logged model of `run`. A second call changes nothing.

    Args:
        metrics: the `Metric`s of that epoch. If the run already has a metric with the same step and time, MLflow adds
            it to the model only.
    """
    from mlflow.entities import LoggedModelOutput, Metric

    experiment_id, run_id = run.experiment_id, run.run_id
    model = find_model(client, experiment_id, run_id) if run.may_have_model else None
    if model is not None and is_ready(model):
        return
    if model is None:
        model = client.create_logged_model(
            experiment_id, name=NAME, source_run_id=run_id, params=dict(run.params), model_type="msae"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_model(file, path, model_id=model.model_id, run_id=run_id)
        client.log_model_artifacts(model.model_id, str(path))
    of_model = [Metric(m.key, m.value, m.timestamp, m.step, model_id=model.model_id, run_id=run_id) for m in metrics]
    client.log_batch(run_id, metrics=of_model, synchronous=True)
    if model.model_id not in run.model_ids:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    client.finalize_logged_model(model.model_id, "READY")


def save_model(file: ModelFile, path: Path, *, model_id: str | None = None, run_id: str | None = None) -> None:
    """Write an MLflow model folder.

    The model's input is raw activations [batch, input_dim]; its output is their raw reconstruction at the largest k.
    """
    from mlflow.models import Model

    shape = _Shape(file.model.input_dim, file.model.hidden_dim, file.model.k_levels, file.model.weighting)
    with _EXPORTING:
        large = 8 * shape.input_dim * shape.hidden_dim > MOST_BYTES_KEPT
        kept = None if large else _kept_export(shape)
        if kept is None:
            _export(file, path)
    if kept is not None:
        _fill(kept, file, path)
    description = Model.load(str(path / "MLmodel"))
    description.model_id, description.run_id, description.model_uuid = model_id, run_id, uuid.uuid4().hex
    description.utc_time_created = str(datetime.now(UTC).replace(tzinfo=None))
    description.save(str(path / "MLmodel"))


class _Shape(NamedTuple):
    """Settings that determine an exported graph. Everything else about a model is in its tensors."""

    input_dim: int
    hidden_dim: int
    k_levels: tuple[int, ...]
    weighting: str


class _Export(NamedTuple):
    """Exported model folder with placeholder tensors."""

    folder: tempfile.TemporaryDirectory[str]
    tensors: dict[str, str]
    """Maps each part of the graph's archive that holds only a tensor's numbers to the tensor's name."""


@lru_cache(maxsize=8)
def _kept_export(shape: _Shape) -> _Export | None:
    """Export one model of a shape, and keep it for all models of that shape.

    Filling a kept export takes a sixth of the time of an export. If the graph's archive cannot be filled, return None.
    """
    model = MSAE(shape.input_dim, shape.hidden_dim, list(shape.k_levels), shape.weighting)
    folder = tempfile.TemporaryDirectory(prefix="msae-export-")
    path = Path(folder.name) / "model"
    zeros, ones = (number(shape.input_dim, np.float32) for number in (np.zeros, np.ones))
    file = ModelFile(model, zeros, ones, {})
    _export(file, path)
    tensors = _tensors_in(next(path.glob(GRAPH)), _tensors(file))
    return _Export(folder, tensors) if tensors else None


@cache
def export_ahead() -> None:
    """Export a small model while there is nothing else to do. Only the first call in a process does this.

    The first export takes 3 s and more, most of it for imports. An error here is ignored, because it comes again, and
    is then reported, when the first model is logged.
    """
    with _EXPORTING, contextlib.suppress(Exception):
        _kept_export(_Shape(2, 4, (1,), "uniform"))


def _tensors_in(graph: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Map each part of an exported graph's archive that holds a tensor to the tensor's name.

    The result is empty unless every tensor has a part of the tensor's size.
    """
    with zipfile.ZipFile(graph) as archive:
        sizes = {part.filename: part.file_size for part in archive.infolist()}
        described = next((name for name in sizes if name.endswith("/data/weights/model_weights_config.json")), None)
        if described is None:
            return {}
        weights = json.loads(archive.read(described)).get("config", {})
    folder = described.rpartition("/")[0]
    found = {f"{folder}/{weight.get('path_name')}": name for name, weight in weights.items()}
    fits = found.keys() <= sizes.keys() and sorted(found.values()) == sorted(tensors)
    return found if fits and all(sizes[part] == tensors[name].nbytes for part, name in found.items()) else {}


def _tensors(file: ModelFile) -> dict[str, np.ndarray]:
    """Return the tensors of a model as it is exported, by their names in the export."""
    tensors = file.standardised().state_dict()
    return {name: np.ascontiguousarray(tensor.numpy(), np.float32) for name, tensor in tensors.items()}


def _fill(export: _Export, file: ModelFile, path: Path) -> None:
    """Copy the exported folder to `path`, with the model's tensors in its graph.

    This takes 0.02 s. torch's own `export.save` takes 0.14 s, because it copies and serialises the graph each time.
    """
    source = Path(export.folder.name) / "model"
    shutil.copytree(source, path, ignore=shutil.ignore_patterns("*.pt2"))
    tensors = _tensors(file)
    (graph,) = source.glob(GRAPH)
    with zipfile.ZipFile(graph) as empty, zipfile.ZipFile(path / graph.relative_to(source), "w") as filled:
        for part in empty.infolist():
            name = export.tensors.get(part.filename)
            filled.writestr(part, tensors[name].tobytes() if name else empty.read(part))


def _export(file: ModelFile, path: Path) -> None:
    import mlflow.pytorch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    rows = Schema([TensorSpec(np.dtype(np.float32), (-1, file.model.input_dim))])
    description = Model()
    with _unchecked_requirements():
        mlflow.pytorch.save_model(
            file.standardised().eval(),
            path,
            mlflow_model=description,
            signature=ModelSignature(inputs=rows, outputs=rows),
            # Two rows, because torch's export treats a dimension of size 1 as a constant.
            input_example=np.zeros((2, file.model.input_dim), np.float32),
            # Without the local part of the version (+cpu, +cu128), because package indexes have no such version.
            pip_requirements=[f"{package}=={version(package).partition('+')[0]}" for package in ("torch", "numpy")],
            serialization_format="pt2",
        )
    # An exported graph stays on the device of its export, but pyfunc would use a GPU on every machine that has one.
    description.flavors["python_function"]["config"] = {"device": "cpu"}
    description.save(str(path / "MLmodel"))


def _unchecked_requirements() -> AbstractContextManager[None]:
    """Keep MLflow from checking the requirements against the installed packages.

    The check is needless, because the versions were just read from the installed packages. MLflow would look at every
    file of every installed package, which takes 2 s and more before the first model.
    """
    return patched("mlflow.utils.environment", "warn_dependency_requirement_mismatches", lambda requirements: None)


def register(client: Any, model: Any, name: str, tags: Mapping[str, str]) -> str:
    """Register `model` as a version of the registered model `name`, and return the version's number.

    A run gets only one version: if it has one already, return that version's number.
    """
    try:
        client.create_registered_model(name)
    except Exception as error:
        if not has_error_code(error, "RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
            raise
    run_id = model.source_run_id
    versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    if versions:
        return str(versions[0].version)
    number = client.create_model_version(
        name,
        # Not `models:/…`, because MLflow would look that up at its global tracking URI, which we must not set.
        model.artifact_location,
        run_id,
        tags=dict(tags),
        await_creation_for=0,
        model_id=model.model_id,
    ).version
    # MLflow's page of the logged model reads this tag to show where the model is registered.
    client.set_logged_model_tags(
        model.model_id, {"mlflow.modelVersions": json.dumps([{"name": name, "version": number}])}
    )
    return str(number)


def register_champion(client: Any, model: Any, name: str, tags: Mapping[str, str]) -> None:
    """Register `model` as `register` does, and move the alias `champion` to its version.

    The alias belongs to the sweep that finished last and not to the best of all sweeps, because R² values of different
    data, splits or levels cannot be compared. Older winners stay as versions, with their sweep and R² as tags.
    """
    number = register(client, model, name, tags)
    client.set_registered_model_alias(name, CHAMPION, number)


class FetchedModel(NamedTuple):
    """A model that was read from MLflow."""

    file: ModelFile
    block: int
    run_id: str


def fetch(model_uri: str, tracking_uri: str | None = None) -> FetchedModel:
    """Return the model that a `models:/…` or `runs:/…` URI names, with its normalisation and history.

    The model is read from the file in the notebook's format, which is an artifact of the run that made it. The exported
    graph is not used, because a graph from elsewhere may hold pickles, and torch runs their code when it loads it.

    Args:
        tracking_uri: as in `resolve_uri`.

    Raises:
        TrackingError: the store does not exist or does not answer, or it has no such model.
        ConfigError: MLflow cannot use the tracking URI.
        DataError: the file does not hold an MSAE.
    """
    uri = resolve_uri(tracking_uri)
    require_store(uri)
    try:
        client = connect(uri)
        run_id = _source_run(client, model_uri)
        files = {int(m[1]): f.path for f in client.list_artifacts(run_id) if (m := _MODEL_FILE.fullmatch(f.path))}
        if not files:
            raise TrackingError(f"{model_uri}: run {run_id} has no msae_block….pt; give the run of a finished trial")
        block, name = files.popitem()
        with tempfile.TemporaryDirectory() as folder:
            return FetchedModel(model_file.load(client.download_artifacts(run_id, name, folder)), block, run_id)
    except MsaeSweepError:
        raise
    except Exception as error:
        # Each kind of store raises its own errors for a missing model and for a server that does not answer.
        raise TrackingError(f"{model_uri}: cannot be loaded from {redact(uri)}: {one_line(error)}") from None


_MODEL_FILE = re.compile(r"msae_block(\d+)\.pt")


def require_store(uri: str) -> None:
    """Check that a resolved tracking URI names no missing SQLite file, because connecting would create an empty one.

    Raises:
        TrackingError: the URI names a SQLite file that does not exist.
    """
    database = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    if uri.startswith("sqlite:///") and not database.is_file():
        raise TrackingError(f"{database}: no such MLflow database; give --tracking-uri or MLFLOW_TRACKING_URI")


def _source_run(client: Any, model_uri: str) -> str:
    """Return the ID of the run that made a model."""
    if match := re.fullmatch(r"runs:/([^/]+)(/.*)?", model_uri):
        return str(client.get_run(match[1]).info.run_id)
    if match := re.fullmatch(r"models:/(m-[^/@]+)", model_uri):
        return str(client.get_logged_model(match[1]).source_run_id)
    if match := re.fullmatch(r"models:/([^/@]+)@([^/@]+)", model_uri):
        return str(client.get_model_version_by_alias(match[1], match[2]).run_id)
    if match := re.fullmatch(r"models:/([^/@]+)/(\d+)", model_uri):
        return str(client.get_model_version(match[1], match[2]).run_id)
    raise TrackingError(
        f"{model_uri}: must be models:/NAME@ALIAS, models:/NAME/VERSION, models:/m-MODEL_ID or runs:/RUN_ID"
    )
