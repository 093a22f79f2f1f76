"""`benchmarks/gpu.py` on a machine that has torch and Triton and nothing else of saeray's."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
ABSENT = (
    "ray", "transformer_lens", "transformers", "datasets", "wandb", "yaml", "pyarrow", "rich",
    "numba",
)  # fmt: skip


def test_it_runs_with_torch_and_triton_alone(tmp_path):
    pytest.importorskip("triton")
    code = (
        "import runpy, sys\n"
        f"sys.modules |= dict.fromkeys({ABSENT!r})  # importing one raises ImportError\n"
        f"sys.argv = [{str(SCRIPT)!r}, '--quick']\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in done.stdout.splitlines()
        if line.startswith("|")
    ]
    rows = {line[0]: line for line in cells}
    # W_enc, W_dec, b_enc and b_dec, relative to a dense float32 step.
    assert all(float(wrong) < 1e-5 for wrong in rows["float32"][1:5])
    assert all(float(wrong) < 2e-2 for wrong in rows["bfloat16"][1:5])
    assert rows["float32"][-1] == rows["bfloat16"][-1] == "same bits"
    steps = {(line[0], line[3]) for line in cells if len(line) == 7}
    for n_saes in ("1", "2"):
        for name in ("sparse, bfloat16", "autograd, bfloat16 autocast", "dense, float32"):
            assert (name, n_saes) in steps
