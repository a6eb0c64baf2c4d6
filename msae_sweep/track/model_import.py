"""Import of a model from elsewhere, e.g. the notebook, into MLflow.

The model gets a run like a trial's, and a version of the registered model that also holds the versions of sweeps.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from msae_sweep.config import MODEL_NAME, registered_name
from msae_sweep.errors import MsaeSweepError, TrackingError
from msae_sweep.sae import model_file
from msae_sweep.sae.model_file import ModelFile
from msae_sweep.track import logged_models
from msae_sweep.track.connection import RejectedByMlflow, connect, one_line
from msae_sweep.track.runs import SWEEP_TAG, TRIAL_TAG, NewRun, Runs
from msae_sweep.track.uri import artifact_root, redact, resolve_uri

IMPORT_TAG = "msae_sweep.imported_sha256"
"""Tag with the digest of the weights that a run was created for. A repeated import finds its run by this tag."""


class ModelImport(NamedTuple):
    """A model to be imported, with the metrics and tags of its run."""

    file: ModelFile
    block: int
    name: str
    """Name of the run."""
    metrics: Mapping[str, float]
    """Metrics by the names that a trial's metrics have: `r2_k16`, `dead_ratio`, …"""
    tags: Mapping[str, str]
    """Tags that say where the model comes from and on which rows it was measured."""


class ImportedModel(NamedTuple):
    """The registered model version and the run of an imported model."""

    model: str
    """Name of the registered model."""
    version: str
    run_id: str


def register_import(
    what: ModelImport,
    *,
    tracking_uri: str | None,
    experiment: str,
    model_name: str = MODEL_NAME,
    sweep_id: str | None = None,
    champion: bool = False,
) -> ImportedModel:
    """Log a model with its metrics and register it as a version of `{model_name}-block{B}`. Repeating it adds nothing.

    Args:
        tracking_uri: as in `resolve_uri`.
        sweep_id: sweep in whose run the new run is nested, so that MLflow compares the model with the sweep's trials.
        champion: move the alias `champion` to this version. Otherwise the alias stays where it is.

    Raises:
        TrackingError: MLflow does not answer, rejects the model, or has no run of that sweep.
        ConfigError: MLflow cannot use the tracking URI.
    """
    uri = resolve_uri(tracking_uri)
    try:
        client = connect(uri)
        runs = Runs(client, experiment, artifact_root(uri))
        run_id = _run(client, runs, what, _parent(client, runs, sweep_id) if sweep_id else None)
        model = logged_models.find_model(client, runs.experiment_id, run_id)
        name = registered_name(model_name, what.block)
        version = logged_models.register(client, model, name, {**what.tags, **_texts(what.metrics)})
        if champion:
            client.set_registered_model_alias(name, logged_models.CHAMPION, version)
        return ImportedModel(name, version, run_id)
    except MsaeSweepError:
        raise
    except (Exception, RejectedByMlflow) as error:
        raise TrackingError(f"{redact(uri)}: the model was not registered: {one_line(error)}") from None


def _run(client: Any, runs: Runs, what: ModelImport, parent: str | None) -> str:
    from mlflow.entities import Metric

    digest, time_ms = _digest(what.file), int(time.time() * 1000)
    model = what.file.model
    params = {
        "block": what.block,
        **model.config,
        "expansion_factor": f"{model.hidden_dim / model.input_dim:g}",
    }
    tags = {IMPORT_TAG: digest, "block": str(what.block), "status": "completed", **what.tags}
    if parent is not None:
        tags["mlflow.parentRunId"] = parent
    mine = f"tags.`{IMPORT_TAG}` = '{digest}' and tags.block = '{what.block}'"
    known = client.search_runs([runs.experiment_id], mine)
    run = NewRun(what.name, time_ms, tags, {key: str(value) for key, value in params.items()})
    run_id = known[0].info.run_id if known else runs.begin("", run, _refuse)
    # Trials have metrics under two names: the plain names for every epoch, and `best_…` for the epoch of their model.
    # An imported model gets both, so that it can be compared with them.
    metrics = [Metric(key, value, time_ms, 0) for key, value in what.metrics.items()]
    both = metrics + [Metric(f"best_{m.key}", m.value, time_ms, 0) for m in metrics]
    before = known[0].data.metrics if known else {}
    runs.log(run_id, _refuse, metrics=[metric for metric in both if before.get(metric.key) != metric.value])
    with tempfile.TemporaryDirectory() as folder:
        notebook_file, history = Path(folder) / f"msae_block{what.block}.pt", Path(folder) / "history.json"
        model_file.save(what.file, notebook_file)
        history.write_text(json.dumps(what.file.history, indent=1, default=float), encoding="utf-8")
        client.log_artifacts(run_id, folder)
    logged_models.log_model(client, logged_models.RunOfModel.read(client, run_id), what.file, metrics, 0)
    runs.end(run_id, "FINISHED", time_ms, tags, _refuse)
    return run_id


def _parent(client: Any, runs: Runs, sweep_id: str) -> str:
    found = client.search_runs([runs.experiment_id], f"tags.`{SWEEP_TAG}` = '{sweep_id}'")
    for run in found:
        if TRIAL_TAG not in run.data.tags:
            return str(run.info.run_id)
    raise TrackingError("MLflow has no run of that sweep; send it with msae-sweep track-sync, or leave out --sweep")


def _digest(file: ModelFile) -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(file.model.state_dict().items()):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for array in (file.mean, file.std):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _texts(metrics: Mapping[str, float]) -> dict[str, str]:
    return {key: f"{value:.6g}" for key, value in metrics.items()}


def _refuse(part: str, reason: str) -> None:
    raise TrackingError(f"{part}: {reason}")
