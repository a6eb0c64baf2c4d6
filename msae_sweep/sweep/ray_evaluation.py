"""Evaluates a model on the cluster: Ray Data runs one task per row range, and the driver merges the tasks' sums."""

import logging
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import ray.data
import torch

from msae_sweep import errors
from msae_sweep.errors import MsaeSweepError
from msae_sweep.models.evaluate import EvaluationPlan, PartSums, part_sums
from msae_sweep.sae.model import MSAE


def sums_on_cluster(plan: EvaluationPlan, model: MSAE, max_k: int) -> Iterator[PartSums]:
    """Yield the sums of each part, in the parts' order.

    Ray must be connected. A task takes a GPU if the cluster has one. It gets a reference to the model and returns its
    sums, a megabyte for rows of 256 channels, so the driver holds no rows.

    Raises:
        MsaeSweepError: a task raised it.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Sums of floats depend on the order in which they are merged.
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    on_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    # Inside a list, the reference itself is sent to a task, instead of megabytes of weights.
    arguments = ([ray.put((model.config, weights))], plan, max_k, on_gpu)
    resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1} if on_gpu else {"num_cpus": 1}
    items = [{"i": i} for i in range(plan.n_ranges)]
    parts = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _sums, fn_args=arguments, batch_size=1, **resources
    )
    for row in parts.iter_rows():
        if row["error"]:
            raise getattr(errors, row["error"])(row["message"])
        yield pickle.loads(row["sums"])


def _sums(
    batch: dict[str, np.ndarray], model: list[Any], plan: EvaluationPlan, max_k: int, on_gpu: bool
) -> dict[str, list[Any]]:
    """Return one part's sums; a `MsaeSweepError` is returned as text, because Ray Data may lose the exception."""
    try:
        part = plan.read(int(batch["i"][0]))
    except MsaeSweepError as error:
        return {"sums": [b""], "error": [type(error).__name__], "message": [str(error)]}
    config, weights = ray.get(model[0])
    device = torch.device("cuda" if on_gpu else "cpu")
    parameters = {name: torch.from_numpy(np.array(array)).to(device) for name, array in weights.items()}
    here = MSAE(**config, parameters=parameters)
    sums = part_sums(part, here, max_k, device)
    sums.model.cpu()
    return {"sums": [pickle.dumps(sums)], "error": [""], "message": [""]}
