"""Conversion of a block's data manifest to an MLflow dataset, so that runs can be filtered by the data they used."""

import json
from collections.abc import Mapping
from typing import Any


def dataset_input(block: str, manifest: Mapping[str, Any]) -> Any:
    """Return the `DatasetInput` of a block.

    The dataset's digest is the manifest's key, so equal preparation gives an equal dataset. The dataset's profile is
    the manifest without its list of shard files, with the number of rows added.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = manifest.get("source", {})
    where = source.get("where", "") if isinstance(source, Mapping) else source
    spec = {"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, manifest.get("input_dim", -1)]}}
    counts = [manifest[key] for key in ("n_train", "n_val") if key in manifest]
    profile = {"num_rows": sum(counts), **{key: value for key, value in manifest.items() if key != "shards"}}
    dataset = Dataset(
        name=f"block{block}",
        digest=str(manifest.get("key", ""))[:36],  # MLflow allows at most 36 characters
        source_type="local",
        source=json.dumps({"uri": str(where)}),
        schema=json.dumps({"mlflow_tensorspec": {"features": [spec], "targets": None}}),
        profile=json.dumps(profile, default=str),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])
