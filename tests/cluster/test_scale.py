"""The control plane with many more parts than there are cores: `benchmarks/scale.py`, shortened."""

import sys
from dataclasses import replace

import pytest
from support.bundled import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.mark.slow
@pytest.mark.parametrize("size", ["processes", "large"])
def test_every_sae_is_done_and_no_wait_times_out(size, capsys):
    import scale

    blocks = 6 * scale.SIZES[size].group_blocks
    figures = scale.measured(replace(scale.SIZES[size], blocks=blocks))
    with capsys.disabled():
        print("\n" + scale.table({size: figures}))
    assert figures["SAEs done"] == str(scale.SIZES[size].saes)
    assert figures["waits that timed out"] == "0"
