"""The side of a calibration that trains SAEs in small, and what it assumes where that is long."""

import json

import numpy as np
import pytest
from support.configs import config

from saeray.client.calibrate import beside_the_rest
from saeray.cluster import calibration
from saeray.cluster.calibration import TrainSide, serve, spread
from saeray.spec.config import resolve
from saeray.spec.forecast import Speeds, Stretch

HOOK = config().hook_point
STEPS = 80


def side(tmp_path, **changes):
    """On 4,096 random rows of 16; SAEs of 64 features."""
    rows = np.random.default_rng(0).standard_normal((4096, 16), dtype=np.float32)
    np.save(tmp_path / "0.npy", rows)
    values = dict(
        expansion_factor=4, train_batch_size=512, training_tokens=STEPS * 512, device="cpu",
        lr_warm_up_steps=10, l1_warm_up_steps=20, seed=1, **changes,
    )  # fmt: skip
    saes = [resolve(config(l1_coefficient=c, **values)) for c in (1e-4, 0.05)]
    one = TrainSide()
    one.open([c.to_dict() for c in saes], str(tmp_path), [HOOK], {HOOK: 16}, 2)
    return one


def test_a_run_is_rehearsed_and_whole_steps_are_timed_on_the_way(tmp_path):
    one = side(tmp_path)
    prepared = one.prepare(5.0)
    assert (prepared["saes"], prepared["rows"], prepared["small_rows"]) == (2, 512, 256)
    found = one.rehearse(60.0)
    assert found["rehearsed"]
    assert found["steps"] == found["of"] == STEPS  # so few that all of them have time
    shares = [at[0] for at in found["at"]]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1], len(shares)) == (0.0, 1.0, len(calibration.WARM))
    assert all(0 < seconds < 60 and 0 <= dense <= 1 for _, seconds, dense, _ in found["at"])
    assert found["at"][0][2] == 1.0  # every run begins with dense steps
    assert 0 < found["dense"] <= 1
    # Each of them has made all of the run's small steps, and those that were timed.
    assert {t.step for t in one.trainers} == {STEPS + 1 + 2 * len(calibration.WARM) - 1}
    assert one.step(0.01)["step_s"] > 0


def test_where_a_rehearsal_takes_too_long_its_schedule_is_compressed(tmp_path):
    one = side(tmp_path)
    half = one.started(one.configs[0], 0.5).options
    assert (half.lr_warm_up_steps, half.l1_warm_up_steps) == (5, 10)
    assert half.lr == 2 * one.trainers[0].options.lr  # so that Adam comes as far
    assert half.total_steps == STEPS // 2 + 2 * len(calibration.WARM)


def test_where_not_even_that_has_time_the_l0_is_assumed(tmp_path):
    one = side(tmp_path)
    one.prepare(5.0)
    found = one.rehearse(0.0)
    assert (found["rehearsed"], found["steps"]) == (False, 0)
    first, warm, then, last = found["at"]
    # Dense until the L1 has warmed up: 20 of 80 steps.
    assert [first[0], warm[0], then[0], last[0]] == [0.0, 0.25, 0.25, 1.0]
    assert (first[2], then[2]) == (1.0, 0.0)
    assert found["dense"] == 0.25
    assert all(t.sparse for t in one.trainers)


def test_silenced_saes_have_the_l0_that_is_asked_for(tmp_path):
    one = side(tmp_path)
    x = one.rows[0][:512]
    for t in one.trainers:
        calibration.silence(t, x, 7.0)
        active = (x - t.sae.b_dec) @ t.sae.W_enc + t.sae.b_enc > 0
        assert float(active.sum() / len(x)) == pytest.approx(7.0, abs=0.01)


def test_some_of_many_are_spread_over_all():
    assert spread(3, 8) == [0, 1, 2]
    assert spread(9, 3) == [0, 4, 8]
    assert spread(100, 1) == [0]


def test_what_it_can_not_do_is_an_answer_and_not_an_end():
    said = []
    asked = [
        {"do": "open", "with": dict(config={"lr": 1}, hooks=[HOOK])},
        {"do": "harvest", "with": {}},
    ]
    serve("harvest", map(json.dumps, asked), said.append)
    assert said[0]["bad_input"]
    assert "must be given" in said[0]["wrong"]
    assert "TypeError" in said[1]["wrong"]


def test_the_rest_of_a_sweep_takes_its_share_of_few_cores():
    """13.5 CPU seconds of 57 were the rest's: 0.24 of a core, 0.12 of two, nearly none of many."""
    alone = Stretch(step=0.88, harvest=0.44)
    speeds = Speeds(alone, alone, forward=0.22)
    on_two = beside_the_rest(speeds, 2)
    assert on_two.sparse == pytest.approx((1.0, 0.5, 1.0, 0.5), rel=0.01)
    assert on_two.forward == pytest.approx(0.25, rel=0.01)
    assert beside_the_rest(speeds, 1).dense.step == pytest.approx(0.88 / 0.76, rel=0.01)
    assert beside_the_rest(speeds, 64).dense.step == pytest.approx(0.88, rel=0.01)
