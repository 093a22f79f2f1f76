"""Imports go down only: the lower floors bring in neither Ray nor a language model."""

import subprocess
import sys

import pytest

HEAVY = ("ray", "transformer_lens", "transformers", "wandb", "datasets")


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("saeray", (*HEAVY, "torch")),
        ("saeray.spec.config", (*HEAVY, "torch")),
        ("saeray.spec.grid", (*HEAVY, "torch")),
        ("saeray.spec.plan", (*HEAVY, "torch")),
        ("saeray.spec.order", (*HEAVY, "torch")),
        ("saeray.client.cli", (*HEAVY, "torch")),
        ("saeray.lm.tokens", ("ray", "torch", "wandb")),
        ("saeray.files.tracking", ("ray", "torch")),
        ("saeray.files.results", ("ray", "torch")),
        ("saeray.sae", HEAVY),
        ("saeray.sae.trainer", HEAVY),
        ("saeray.lm.model", ("ray", "wandb")),
        ("saeray.lm.evaluate", ("ray", "wandb")),
        ("saeray.files.checkpoint", ("ray", "wandb", "transformers")),
        ("saeray.cluster.trial", ("torch", "transformer_lens", "wandb")),
        ("saeray.cluster.roster", ("torch", "transformer_lens", "wandb")),
        ("saeray.stream.buffer", ("torch", "transformer_lens", "wandb")),
    ],
)
def test_importing_a_module_leaves_the_heavy_ones_out(module, absent):
    code = f"import sys, {module}; print(*[m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
