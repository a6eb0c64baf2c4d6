"""An evaluation over the cluster: Ray Data, a task a row range, sums merged on the driver as they come."""

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
from msae_sweep.models.evaluate import EvaluationPlan
from msae_sweep.sae.evaluation import EvaluationSums
from msae_sweep.sae.model import MSAE


def sums_on_cluster(plan: EvaluationPlan, model: MSAE, max_k: int) -> Iterator[tuple[EvaluationSums, int]]:
    """Sums and dropped rows of each part, in the parts' order; a task takes a GPU where the cluster has one.

    Ray is connected. What travels to a task is a reference to the model; what comes back are its sums, a few hundred
    kilobytes, so the driver holds no rows.

    Raises:
        MsaeSweepError: as a task raised it.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Float sums depend on their order.
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    on_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    # In a list, the reference travels instead of megabytes.
    arguments = ([ray.put((model.config, weights))], plan, max_k, on_gpu)
    resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1} if on_gpu else {"num_cpus": 1}
    items = [{"i": i} for i in range(plan.n_ranges)]
    parts = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _sums, fn_args=arguments, batch_size=1, **resources
    )
    for row in parts.iter_rows():
        if row["error"]:
            raise getattr(errors, row["error"])(row["message"])
        yield pickle.loads(row["sums"]), int(row["n_dropped"])


def _sums(
    batch: dict[str, np.ndarray], model: list[Any], plan: EvaluationPlan, max_k: int, on_gpu: bool
) -> dict[str, list[Any]]:
    """One part's sums; what was raised on purpose comes back as text, because Ray Data may lose the exception."""
    try:
        part = plan.read(int(batch["i"][0]))
    except MsaeSweepError as error:
        return {"sums": [b""], "n_dropped": [0], "error": [type(error).__name__], "message": [str(error)]}
    config, weights = ray.get(model[0])
    device = torch.device("cuda" if on_gpu else "cpu")
    parameters = {name: torch.from_numpy(np.array(array)).to(device) for name, array in weights.items()}
    here = MSAE(**config, parameters=parameters)
    sums = EvaluationSums(here, max_k, device)
    sums.update(here, torch.from_numpy(part.x).to(device))
    return {"sums": [pickle.dumps(sums.cpu())], "n_dropped": [part.n_dropped], "error": [""], "message": [""]}
