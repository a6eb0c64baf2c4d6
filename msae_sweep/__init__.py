"""Sweeps of Matryoshka sparse autoencoders over a network's activations: Ray Data, Ray Tune with ASHA, MLflow.

import msae_sweep as ms

sae = ms.load("models:/msae-block20@champion")
codes = sae.encode(x, k=32)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msae_sweep.models.api import SAE, load

__version__ = "0.1.0"
__all__ = ["SAE", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Torch takes seconds to import; the command line answers without it.
    if name in ("SAE", "load"):
        from msae_sweep.models import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
