"""How long a sweep takes, from how fast its parts are: every figure by hand."""

import pytest
from support.bundled import HOOK
from support.configs import config

from saeray.spec.advice import advice
from saeray.spec.config import resolve
from saeray.spec.forecast import HARVEST, STEP, Speeds, Stretch, forecast, paced, work_of
from saeray.spec.memory import fit_saes
from saeray.spec.plan import plan_stream
from saeray.spec.resources import Resources
from saeray.spec.room import Cluster

WIDTHS = {HOOK: 128}
BATCH = 4096


def asked(n_saes=6, cpus=2, resources=None, **changes):
    """The work of n SAEs on one machine: 256 steps of 4,096, blocks of 4,096, and its placement."""
    values = dict(
        training_tokens=256 * BATCH, n_batches_in_buffer=16, eval_windows=32, eval_every=0,
        expansion_factor=8, resources=resources or Resources(), seed=1,
    )  # fmt: skip
    saes = [resolve(config(**(values | changes)))] * n_saes
    fitted = fit_saes(saes, Cluster.one_machine(cpus), use_gpu=False)
    return work_of(saes, fitted, plan_stream(saes[0], [HOOK], WIDTHS), WIDTHS), fitted


def both(step, harvest, **others):
    """Speeds of a run that is alike from its beginning to its end."""
    stretch = Stretch(step, harvest)
    return Speeds(stretch, stretch, **others)


def test_who_is_faster_waits_and_each_is_slower_beside_the_other():
    assert paced(2.0, 1.0, 2.0, 1.0) == 2.0
    assert paced(2.0, 3.0, 2.0, 3.0) == 3.0
    # A row takes 1 s, or 2 s beside the harvester, which takes 1 s then: in that second half of the
    # row is done, and the other half takes 0.5 s.
    assert paced(1.0, 0.5, 2.0, 1.0) == 1.5
    # The other way round: 1 s beside the step, in which half a token is made of 2 s; 1 s alone.
    assert paced(0.5, 1.0, 1.0, 2.0) == 1.5
    assert paced(1.0, 0.0, 1.0, 0.0) == 1.0  # from a cache


def test_the_time_of_a_sweep_by_its_parts():
    work, _ = asked()
    assert (work.lm_tokens, work.first_rows, work.packs) == (256 * BATCH, 8 * BATCH, 1)
    # 32 windows of 128 tokens: a forward for each of six SAEs, one without any, 4 once.
    assert work.evaluated == 32 * 128 * (6 + 1 + 4)
    found = forecast(work, both(1e-5, 2e-5, forward=1e-4, start_up=15.0, trials=0.5, end=6.0))
    # 6 x 1,048,576 SAE-tokens at 100,000/s. The first 8 blocks at 50,000/s come before.
    assert found.training == pytest.approx(6 * 256 * BATCH * 1e-5 + 6 * 0.5)
    assert (found.dense, found.trials) == (0.0, 3.0)
    assert found.harvest == pytest.approx(8 * BATCH * 2e-5)
    assert found.evaluation == pytest.approx(45_056 * 1e-4)
    assert found.total == pytest.approx(15 + 0.65536 + 62.91456 + 3 + 4.5056 + 6)
    assert found.limit == STEP
    # The language model has 248 blocks left to make beside them.
    assert found.busy == pytest.approx((1.0, 248 * BATCH * 2e-5 / 62.91456))


def test_dense_steps_have_their_share():
    work, _ = asked()
    speeds = Speeds(Stretch(3e-5, 1e-6), Stretch(1e-5, 1e-6), dense_share=0.25)
    found = forecast(work, speeds)
    saes_rows = 6 * 256 * BATCH
    assert found.dense == pytest.approx(saes_rows * 0.25 * 3e-5)
    assert found.sparse == pytest.approx(saes_rows * 0.75 * 1e-5)


def test_where_the_language_model_is_the_limit_more_harvesters_are_as_much_faster_as_computed():
    work, fitted = asked()
    speeds = both(1e-6, 1e-3, start_up=10.0, end=5.0)
    now = forecast(work, speeds)
    assert now.limit == HARVEST
    assert now.total == pytest.approx(15 + 256 * BATCH * 1e-3)
    (first, *_) = advice(work, speeds, fitted)
    # Two: 15 + 1,048.576 s become 15 + 524.288.
    assert first.what.startswith("2 harvesters (each on")
    assert first.faster == pytest.approx(1063.576 / 539.288)
    assert str(first).endswith(": 1.97 x faster")
    # Two that share the cores of this machine, as measured: 1.3 times as fast as one.
    here = advice(work, speeds, fitted, two_harvesters=1.3, measured=True)
    by = {a.what: a.faster for a in here}
    assert by["2 harvesters (on this machine)"] == pytest.approx(1063.576 / (15 + 1048.576 / 1.3))
    assert list(by) == sorted(by, key=by.get, reverse=True)


def test_where_the_step_is_the_limit_more_trainers_help_and_more_harvesters_are_not_spoken_of():
    work, fitted = asked()
    speeds = both(1e-4, 1e-6)
    (only,) = advice(work, speeds, fitted)
    assert only.what == "trainers on twice as many nodes like this"
    assert only.faster == pytest.approx(2.0, rel=0.01)
    assert advice(*asked(n_saes=1)[:1], speeds, fitted) == []  # one SAE is one pack


def test_harvesters_on_the_trainers_cores_cost_what_another_node_would_save():
    work, fitted = asked(n_saes=1)
    stretch = Stretch(1e-4, 0.5e-4, 2e-4, 1e-4)
    speeds = Speeds(stretch, stretch)
    now = forecast(work, speeds)
    # h' = 248/256 of 1e-4: h' + 1e-4 (1 - h'/2e-4)
    beside = 1e-4 * 248 / 256
    first = 8 * BATCH * 0.5e-4
    assert now.sparse == pytest.approx(256 * BATCH * (beside + 1e-4 * (1 - beside / 2e-4)))
    (only,) = advice(work, speeds, fitted)
    assert only.what == "harvesters on another node than the trainers"
    assert only.faster == pytest.approx(now.total / (first + 256 * BATCH * 1e-4))


def test_packs_in_waves_read_the_text_again_unless_a_cache_keeps_it(tmp_path):
    apart = Resources(saes_per_trainer=3, trainer_cpus=1)  # beside a harvester room for one
    work, fitted = asked(resources=apart)
    assert (len(work.waves), work.lm_tokens) == (2, 2 * 256 * BATCH)
    assert [w.sae_rows for w in work.waves] == [3 * 256 * BATCH] * 2
    speeds = both(1e-9, 1e-3)
    rest = 248 * BATCH * 1e-3  # of each pass; the first half buffer is there before it
    assert forecast(work, speeds).sparse == pytest.approx(2 * rest, rel=1e-3)
    said = {a.what for a in advice(work, speeds, fitted)}
    assert "activation_cache, for the second pass on" in said
    assert any(what.startswith("one pass over the text (") for what in said)
    kept, _ = asked(resources=apart, activation_cache=str(tmp_path))
    assert kept.lm_tokens == 256 * BATCH
    assert forecast(kept, speeds).sparse == pytest.approx(rest, rel=1e-3)


def test_evaluations_while_it_trains_are_harvesters_time():
    work, fitted = asked(eval_every=100)
    # After 100 and 200 of 256 steps: 6 SAEs and the model as it is.
    assert work.waves[0].evaluated == 2 * 32 * 128 * 7
    speeds = both(1e-9, 1e-5, forward=1e-3)
    found = forecast(work, speeds)
    during = 57_344 * 1e-3
    assert found.sparse == pytest.approx(248 * BATCH * 1e-5 + during, rel=1e-3)
    assert any(a.what.startswith("eval_every: 0") for a in advice(work, speeds, fitted))


def test_more_saes_than_are_evaluated_together_cost_more_forwards_of_the_model_alone():
    assert asked(n_saes=9)[0].evaluated == 32 * 128 * (9 + 2 + 4)


def test_rows_that_are_left_out_are_computed_all_the_same():
    work, _ = asked(context_slice=[64, 127])
    assert work.tokens_per_row == 2.0
    assert work.lm_tokens == 2 * 256 * BATCH


def test_streams_come_one_after_the_other():
    one = forecast(asked()[0], both(1e-5, 2e-5, start_up=15.0, end=6.0))
    two = one + one
    assert two.training == 2 * one.training
    assert two.total == pytest.approx(2 * one.total - 21)


def test_harvesters_share_the_blocks_and_not_an_evaluation():
    speeds = both(1e-5, 2e-5, forward=1e-4).for_harvesters(2)
    assert speeds.sparse.harvest == 1e-5
    assert speeds.forward == 1e-4
