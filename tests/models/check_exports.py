"""Load every export with the package that it is for, in a fresh process, and compare the reconstructions.

    python tests/models/check_exports.py MODEL ACTIVATIONS [--block B] [--python PYTHON]

MODEL is anything that `msae-sweep export` takes; ACTIVATIONS is a `.npy` of raw rows. The packages are installed into a
temporary environment, unless PYTHON is an interpreter that has them:

    sae-lens 6.54.12, eai-sparsify 1.3.3

If a row's k-th and (k+1)-th latents differ by no more than float32 rounding, either of them may rightly be chosen. Such
rows are counted, and are compared only through the raw R² of all rows.
"""

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
import torch

from msae_sweep.models.export import export
from msae_sweep.models.find import find

# The bound of torch is this package's own. Without it, pip may download gigabytes of CUDA libraries.
PACKAGES = ["sae-lens==6.54.12", "eai-sparsify==1.3.3", "torch>=2.6,<2.14"]
N_ROWS = 4096
TIE = 1e-5
"""Largest difference of tied latents, relative to the largest latent of a row: 80 float32 roundings."""
TOLERANCE = 1e-5
"""Largest error, relative to the largest value of a channel: 80 float32 roundings, in sums of up to 128 products."""

LOAD = {
    "saelens": """
from importlib.metadata import version
from sae_lens import SAE
sae = SAE.load_from_disk(path)
assert type(sae).__name__ == "TopKSAE", type(sae)
codes = sae.encode(a)
out, name = sae.decode(codes), "sae-lens " + version("sae-lens")
""",
    "sparsify": """
import os
os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernel is for a GPU
from importlib.metadata import version
from sparsify import SparseCoder
sae = SparseCoder.load_from_disk(path)
encoded = sae.encode(a)
codes = torch.zeros(len(a), sae.num_latents).scatter(1, encoded.top_indices, encoded.top_acts)
out, name = sae(a).sae_out, "eai-sparsify " + version("eai-sparsify")
""",
    "notebook": """
import numpy as np
torch.serialization.add_safe_globals(
    [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.Float32DType]
)
saved = torch.load(path, weights_only=True)
w = saved["model_state_dict"]
mean, std = (torch.from_numpy(saved["normalization"][name]) for name in ("mean", "std"))
pre = torch.relu(((a - mean) / std - w["b_pre"]) @ w["W_enc"].T)
values, indices = pre.topk(saved["config"]["k_levels"][-1])
codes = torch.zeros_like(pre).scatter(1, indices, values)
out, name = (codes @ w["W_dec"].T + w["b_pre"]) * std + mean, "torch " + torch.__version__
""",
    "safetensors": """
import json
from safetensors.torch import load_file
w, config = load_file(path), json.load(open(path.replace(".safetensors", ".json")))["config"]
mean, std = w["normalization.mean"], w["normalization.std"]
pre = torch.relu(((a - mean) / std - w["pre_bias"]) @ w["W_enc"].T)
values, indices = pre.topk(config["k_levels"][-1])
codes = torch.zeros_like(pre).scatter(1, indices, values)
out, name = (codes @ w["W_dec"] + w["pre_bias"]) * std + mean, "safetensors"
""",
}
BEFORE = "import sys, numpy as np, torch\npath, rows, result = sys.argv[1:]\na = torch.from_numpy(np.load(rows))\n"
AFTER = """
assert "msae_sweep" not in sys.modules
np.savez(result, out=out.detach().numpy(), codes=codes.detach().numpy())
print(name, file=sys.stderr)
"""


def environment(folder: Path) -> str:
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def check(format: str, model: str, block: int | None, a: np.ndarray, python: str, folder: Path) -> bool:
    found = find(model, block)
    suffix = {"notebook": ".pt", "safetensors": ".safetensors"}.get(format, "")
    path = export(found, format, folder / f"{format}{suffix}")
    np.save(folder / "rows.npy", a)
    command = [python, "-c", BEFORE + LOAD[format] + AFTER, str(path), str(folder / "rows.npy"), str(folder / "r.npz")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        print(f"{format}: FAILED\n{done.stderr}")
        return False
    theirs = np.load(folder / "r.npz")
    sae = found.file.standardised().requires_grad_(False)
    x = torch.from_numpy(a)
    ours, codes = sae(x).numpy(), sae.encode(x).numpy()
    k = found.file.model.k_levels[-1]
    ranked = sae.encode(x, k + 1).topk(k + 1).values
    tied = (ranked[:, k - 1] - ranked[:, k] <= TIE * ranked[:, 0]).numpy() & (ranked[:, k] > 0).numpy()
    error = (np.abs(theirs["out"] - ours) / np.abs(ours).max(axis=0)).max(axis=1)
    same = ((theirs["codes"] > 0) == (codes > 0)).all(axis=1)
    variance = ((a - a.mean(axis=0)) ** 2).sum()
    r2 = [1 - ((a - out) ** 2).sum(dtype=np.float64) / variance for out in (ours, theirs["out"])]
    good = bool(same[~tied].all()) and error[~tied].max() <= TOLERANCE and abs(r2[0] - r2[1]) < 1e-6
    print(
        f"{format}: {'same' if good else 'DIFFERENT'} by {done.stderr.strip().splitlines()[-1]}: {len(a)} rows, "
        f"k {k}, largest error {error[~tied].max():.1e} of a channel's largest value, {tied.sum()} rows tied at the "
        f"k-th latent, {(~same).sum()} of them chosen otherwise; raw R² {r2[0]:.6f} and {r2[1]:.6f}"
    )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("activations", type=Path)
    parser.add_argument("--block", type=int)
    parser.add_argument("--python", help="interpreter that has the packages")
    arguments = parser.parse_args()
    a = np.load(arguments.activations)[:N_ROWS].astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = arguments.python or environment(folder / "environment")
        results = [check(format, arguments.model, arguments.block, a, python, folder) for format in LOAD]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
