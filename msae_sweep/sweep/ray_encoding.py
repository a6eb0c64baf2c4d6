"""Encodes rows on the cluster: Ray Data runs one task per row range, which writes its codes itself."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
import ray.data
import torch

from msae_sweep import errors
from msae_sweep.errors import DataError, MsaeSweepError
from msae_sweep.models.encode import CodesFolder, EncodingPlan, RangeCodes, encode_rows, read_range
from msae_sweep.sae.model import MSAE


def encode_on_cluster(plan: EncodingPlan, parts: Sequence[int], *, model: MSAE, folder: CodesFolder) -> Iterator[int]:
    """Encode parts on the cluster; yield each one's number of rows when it is written.

    Ray must be connected, and every node must see the folder and the data. A task takes a GPU if the cluster has one.
    No rows and no codes pass through the driver.

    Raises:
        MsaeSweepError: a task raised it.
    """
    if not parts:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    on_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    # Inside a list, the reference itself is sent to a task, instead of megabytes of weights.
    arguments = ([ray.put((model.config, weights))], plan, folder, on_gpu)
    resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1} if on_gpu else {"num_cpus": 1}
    items = [{"i": i} for i in parts]
    written = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _encode_part, fn_args=arguments, batch_size=1, **resources
    )
    for row in written.iter_rows():
        if row["error"]:
            raise getattr(errors, row["error"])(row["message"])
        yield int(row["rows"])


def _encode_part(
    batch: dict[str, np.ndarray], model: list[Any], plan: EncodingPlan, folder: CodesFolder, on_gpu: bool
) -> dict[str, list[Any]]:
    """Encode and write one part; an error is returned as text, because Ray Data may lose the exception."""
    i = int(batch["i"][0])
    config, weights = ray.get(model[0])
    device = torch.device("cuda" if on_gpu else "cpu")
    parameters = {name: torch.from_numpy(np.array(array)).to(device) for name, array in weights.items()}
    try:
        x, index = read_range(plan, i)
        folder.write(i, RangeCodes(*encode_rows(MSAE(**config, parameters=parameters), x, plan.k), index))
    except MsaeSweepError as error:
        return {"rows": [0], "error": [type(error).__name__], "message": [str(error)]}
    except OSError as error:
        reason = f"{folder.place}: {error.strerror or error}; finished parts are kept; run the same command to continue"
        return {"rows": [0], "error": [DataError.__name__], "message": [reason]}
    return {"rows": [len(x)], "error": [""], "message": [""]}
