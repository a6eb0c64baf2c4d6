"""Run sweeps of Matryoshka sparse autoencoders over a network's activations, with Ray Data, Ray Tune (ASHA) and MLflow.

A trained model is loaded and used from Python like this:

    import msae_sweep as ms

    sae = ms.load("models:/msae-block20@champion")
    codes = sae.encode(x, k=32)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msae_sweep.models.api import SAE, load
    from msae_sweep.models.codes import Codes, open_codes

__version__ = "0.1.0"
__all__ = ["SAE", "Codes", "__version__", "load", "open_codes"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds, and `--help` must not wait for it: it is imported when SAE or load is first used.
    if name in ("SAE", "load"):
        from msae_sweep.models import api

        return getattr(api, name)
    if name in ("Codes", "open_codes"):
        from msae_sweep.models import codes

        return getattr(codes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
