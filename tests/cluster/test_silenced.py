"""What is said of an L1 coefficient that leaves an SAE nothing to train."""

import torch
from support.configs import config

from saeray.cluster.silenced import Silenced


def test_it_is_said_once_by_the_first_steps_l0():
    said = []
    silenced = Silenced(said.append)
    x = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    for step, l0 in ((10, 40.0), (20, 0.25), (30, 0.0)):
        silenced.look(config(l1_coefficient=5.0), step, l0, x)
        silenced.look(config(l1_coefficient=5.0, seed=2), step, l0, x)
        silenced.look(config(target_l0=1.0), step, l0, x)
    assert len(said) == 1
    # rows of norm 10 about: 5 / (100 * 10)
    assert "l1_coefficient = 5: L0 is 0.25 at step 20: nothing" in said[0]
    assert "its usual 5 is ≈ 0.005 here" in said[0]
