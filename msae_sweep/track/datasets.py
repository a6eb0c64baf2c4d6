"""A block's data manifest as an MLflow dataset, so that runs can be filtered by the data they saw."""

import json
from collections.abc import Mapping
from typing import Any


def dataset_input(block: str, manifest: Mapping[str, Any]) -> Any:
    """The `DatasetInput` of a block; its digest is the manifest's key, so equal preparation means equal dataset.

    The profile is the manifest without its list of shard files.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = manifest.get("source", {})
    where = source.get("where", "") if isinstance(source, Mapping) else source
    spec = {"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, manifest.get("input_dim", -1)]}}
    counts = [manifest[key] for key in ("n_train", "n_val") if key in manifest]
    profile = {"num_rows": sum(counts), **{key: value for key, value in manifest.items() if key != "shards"}}
    dataset = Dataset(
        name=f"block{block}",
        digest=str(manifest.get("key", ""))[:36],  # MLflow's limit
        source_type="local",
        source=json.dumps({"uri": str(where)}),
        schema=json.dumps({"mlflow_tensorspec": {"features": [spec], "targets": None}}),
        profile=json.dumps(profile, default=str),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])
