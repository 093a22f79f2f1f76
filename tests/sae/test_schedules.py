"""Learning-rate schedules, with the arithmetic."""

import itertools
import math

import pytest

from saeray.sae.schedules import lr_multiplier


def at(name, steps, **options):
    return [lr_multiplier(name, s, **({"total_steps": 100} | options)) for s in steps]


def test_schedules_by_hand():
    assert at("constant", [0, 50, 99]) == [1, 1, 1]
    # (step + 1) / 10
    assert at("constantwithwarmup", [0, 4, 9, 50], warm_up_steps=10) == [0.1, 0.5, 1, 1]
    assert at("constantwithwarmup", [0], warm_up_steps=0) == [1]
    # up over 10 steps, then (100 - s) / 90
    assert at("linearwarmupdecay", [4, 10, 55, 100], warm_up_steps=10) == [0.5, 1, 0.5, 0]
    # 0.5 (1 + cos(pi s / 100))
    assert at("cosineannealing", [0, 50, 100]) == pytest.approx([1, 0.5, 0])
    assert at("cosineannealing", [25], lr_end=0.2) == pytest.approx(
        [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))]
    )
    assert at("cosineannealingwarmup", [4, 10, 55], warm_up_steps=10) == pytest.approx(
        [0.5, 1, 0.5]
    )
    # two cycles of 50 steps
    assert at("cosineannealingwarmrestarts", [0, 25, 50, 75], num_cycles=2) == pytest.approx(
        [1, 0.5, 1, 0.5]
    )
    # three of 100 / 3: the second begins at step 34 (3 * 34 = 102), the last step is 97 % through
    thirds = at("cosineannealingwarmrestarts", range(100), num_cycles=3)
    assert thirds[34] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.02)))
    assert thirds[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.97)))
    assert sum(b > a for a, b in itertools.pairwise(thirds)) == 2


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="linear"):
        lr_multiplier("linear", 0, total_steps=1)


def test_agrees_with_torchs_own_schedulers():
    import torch

    def torchs(make):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        scheduler, got = make(optimizer), []
        for _ in range(100):
            got.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return got

    sched = torch.optim.lr_scheduler
    assert at("cosineannealing", range(100), lr_end=0.1) == pytest.approx(
        torchs(lambda o: sched.CosineAnnealingLR(o, T_max=100, eta_min=0.1))
    )
    assert at("cosineannealingwarmrestarts", range(100), num_cycles=4) == pytest.approx(
        torchs(lambda o: sched.CosineAnnealingWarmRestarts(o, T_0=25))
    )
