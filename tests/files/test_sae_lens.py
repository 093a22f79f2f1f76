"""What sae_lens makes of a sweep's folder, in an environment of its own (it needs another
transformer_lens). Slow: the environment is made at the first run."""

import json
import subprocess
import sys

import pytest
import torch
from support.bundled import ROOT

import saeray

sys.path.insert(0, str(ROOT / "benchmarks"))

SCRIPT = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE
sae = SAE.load_from_disk(sys.argv[1])
x = load_file(sys.argv[2])["x"]
y = {"x_hat": sae(x), "f": sae.encode(x)}
save_file({k: v.detach().contiguous() for k, v in y.items()}, sys.argv[3])
print("RESULT", json.dumps({"hook": sae.cfg.metadata.hook_name, "d_sae": sae.cfg.d_sae}))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_final_loads_in_sae_lens_with_the_same_reconstruction(tiny, tmp_path):
    from peers import environment
    from safetensors.torch import load_file, save_file

    try:
        python = environment("sae_lens")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no environment for sae_lens could be made: {error}")
    result = saeray.sweep(tiny, name="s", storage_path=tmp_path, live=False)
    (row,) = result.rows
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 3
    save_file({"x": x}, tmp_path / "x.safetensors")
    done = subprocess.run(
        [python, "-c", SCRIPT, row["path"], tmp_path / "x.safetensors", tmp_path / "y.safetensors"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.split("RESULT ")[1])
    assert told == {"hook": "blocks.2.hook_resid_pre", "d_sae": 256}
    theirs, ours = load_file(tmp_path / "y.safetensors"), result.load(row["trial"])
    torch.testing.assert_close(theirs["f"], ours.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs["x_hat"], ours(x), rtol=1e-5, atol=1e-5)
