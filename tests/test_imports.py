"""Imports go down only: the lower floors bring in neither Ray nor a language model."""

import subprocess
import sys

import pytest

HEAVY = ("ray", "transformer_lens", "transformers", "wandb", "datasets")


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("saeray", (*HEAVY, "torch")),
        ("saeray.config", (*HEAVY, "torch")),
        ("saeray.grid", (*HEAVY, "torch")),
        ("saeray.plan", (*HEAVY, "torch")),
        ("saeray.shuffle", (*HEAVY, "torch")),
        ("saeray.cli", (*HEAVY, "torch")),
        ("saeray.tokens", ("ray", "torch", "wandb")),
        ("saeray.tracking", ("ray", "torch")),
        ("saeray.results", ("ray", "torch")),
        ("saeray.sae", HEAVY),
        ("saeray.sae.trainer", HEAVY),
        ("saeray.lm", ("ray", "wandb")),
        ("saeray.evaluate", ("ray", "wandb")),
        ("saeray.checkpoint", ("ray", "wandb", "transformers")),
        ("saeray.cluster.trial", ("torch", "transformer_lens", "wandb")),
        ("saeray.cluster.roster", ("torch", "transformer_lens", "wandb")),
        ("saeray.cluster.buffer", ("torch", "transformer_lens", "wandb")),
    ],
)
def test_importing_a_module_leaves_the_heavy_ones_out(module, absent):
    code = f"import sys, {module}; print(*[m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
