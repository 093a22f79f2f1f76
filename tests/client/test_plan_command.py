"""`saeray plan` and `saeray.plan`: from figures, from a calibration, and what is refused."""

import os
import re

import pytest
from support.bundled import ROOT, fields

import saeray
from saeray.client.calibrate import END, START_UP, Side, calibrated, speeds_of
from saeray.client.cli import load_sweep_file, main
from saeray.client.dry_run import this_machine
from saeray.errors import ConfigError, SaerayError
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve
from saeray.spec.grid import expand
from saeray.spec.memory import fit_saes

TINY = str(ROOT / "sweeps" / "tiny.yaml")


def test_a_plan_from_figures_that_are_given(capsys):
    figures = ["--tokens-per-s", "50000", "--sae-tokens-per-s", "100000"]
    assert main(["plan", TINY, *figures, "--address", "local"]) == 0
    out = capsys.readouterr().out
    assert "language model: 1,048,576 tokens in 1 pass" in out
    assert "evaluation: 45,056 more in whole forwards (4.3%)" in out
    # 15 to start, 8 blocks of 4,096 at 50,000/s, 6 x 1,048,576 at 100,000/s, 45,056 at 50,000/s,
    # and 6 at the end.
    assert "time: about 1m25s: start-up 15.0 s, the first blocks 0.7 s, dense steps 0.0 s, " in out
    assert "sparse steps 1m02s, trials' processes 0.0 s, evaluation at the end 0.9 s" in out
    assert "limit: the SAEs' step" in out
    # 85.5 s become 85.5 - 31.5.
    assert "would help: trainers on twice as many nodes like this: 1.58 x faster" in out
    assert "50.3 MB of the object store" in out
    # 2 x 128 x 1024 + 1152 numbers of an SAE, six of them, of 4 bytes; Adam twice as many; two
    # gradients for each of the threads.
    assert "650 MB the process, 6.32 MB weights, 12.6 MB Adam, " in out


def test_a_plan_in_python_says_itself_in_a_line():
    found = saeray.plan(load_sweep_file(TINY), address="local", calibrate=False)
    assert (found.n_saes, found.lm_tokens, found.passes) == (6, 1_048_576, 1)
    assert found.object_store_bytes == 24 * 4096 * 128 * 4
    assert found.seconds is None
    assert "time: not told, since nothing was measured" in str(found)
    assert repr(found).startswith("<Plan: 6 SAEs, time not known, ")
    with pytest.raises(ConfigError, match=r"--tokens-per-s = -1"):
        saeray.plan(load_sweep_file(TINY), tokens_per_s=-1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("n_batches_in_buffer=1000000", "n_batches_in_buffer: the buffer takes"),
        ("expansion_factor=100000", "memory: .* GB are needed on this machine"),
        ("resources.harvesters=1000", "resources: 1000 harvesters of"),
    ],
)
def test_what_does_not_fit_here_is_refused_with_the_numbers(change, words, capsys):
    changes = ["--set", "training_tokens=100000000000", "--set", change]
    assert main(["plan", TINY, *changes, "--address", "local"]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_speeds_are_means_over_the_run():
    # Dense at the beginning, half of the SAEs at the middle, none at the end. Steps of 4, 3 and 1 s
    # on 100 rows of two SAEs, in trapezoids of halves of the run.
    at = [[0.0, 4.0, 1.0, 9.0], [0.5, 3.0, 0.5, 9.0], [1.0, 1.0, 0.0, 9.0]]
    prepared = {"rows": 100.0, "saes": 2.0, "small_rows": 10.0, "small_s": 1.0}
    speeds = speeds_of(at, prepared, 100, 1e-3, (1.5, 2.0), (3.0, 4.0))
    # Weights: 1/4 of each end, 1/2 of the middle.
    assert speeds.dense_share == pytest.approx(0.25 + 0.5 * 0.5)
    dense = (0.25 * 4 + 0.25 * 3) / 0.5
    sparse = (0.25 * 3 + 0.25 * 1) / 0.5
    assert speeds.dense.step == pytest.approx(dense / 200)
    assert speeds.sparse.step == pytest.approx(sparse / 200)
    assert speeds.dense.step_beside == pytest.approx(1.5 * dense / 200)
    assert speeds.sparse.harvest_beside == pytest.approx(4e-3)
    # Timed on 50 rows of a batch of 100: each further one takes (4 - 1) / (50 - 10) s.
    fewer = speeds_of(at, prepared | {"rows": 50.0}, 100, 1e-3, (1, 1), (1, 1))
    assert fewer.dense.step == pytest.approx((1 + 3 / 40 * 50 / 4) * dense / 200)


def small(**changes):
    few = dict(
        l1_coefficient=[1e-3, 3e-3], expansion_factor=0.25, training_tokens=8192,
        train_batch_size=128, feature_sampling_window=20, n_batches_in_buffer=2,
    ) | changes  # fmt: skip
    saes = expand(resolve(LanguageModelSAERunnerConfig.from_dict(fields(**few))))
    configs = [sae.config for sae in saes]
    return configs, fit_saes(configs, this_machine(gpu=False), use_gpu=False)


def test_a_calibration_measures_the_model_and_the_step_here():
    # One SAE of 32 features and whole batches: the language model takes some nine times as long as
    # its step, so that two of it are measured, too.
    found = calibrated(
        *small(l1_coefficient=3e-3, training_tokens=32768, train_batch_size=512), seconds=1.0
    )
    speeds = found.speeds
    assert 0 <= speeds.dense_share <= 1
    for stretch in (speeds.dense, speeds.sparse):
        assert 1e-8 < stretch.step <= stretch.step_beside < 1
        assert 1e-8 < stretch.harvest <= stretch.harvest_beside < 1
    assert speeds.forward > 0
    assert speeds.start_up > START_UP * speeds.end / END  # both are of the same imports
    assert any("tokens/s" in text for text in found.said)
    assert (found.two_harvesters is not None) == ((os.cpu_count() or 1) > 1)
    assert found.two_harvesters is None or 1 <= found.two_harvesters < 10


def test_what_goes_wrong_over_there_is_said_here():
    side = Side("train")
    try:
        with pytest.raises(SaerayError, match=r"calibration: AttributeError: .*'no_such'"):
            side.does("no_such")
    finally:
        side.close()


def test_a_calibration_whose_process_dies_says_so(monkeypatch):
    from saeray.client import calibrate

    monkeypatch.setattr(calibrate.sys, "executable", "/bin/false")
    with pytest.raises(SaerayError, match="process of its harvest part ended"):
        calibrated(*small(), seconds=1.0)
