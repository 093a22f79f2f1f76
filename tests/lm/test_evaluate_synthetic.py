"""Evaluation on known features: an SAE that is the dictionary has found it."""

import pytest
import torch

from saeray.lm import evaluate_synthetic
from saeray.lm.evaluate_synthetic import GroundTruthEvaluator
from saeray.lm.synthetic import SyntheticModel
from saeray.sae.architectures.standard import StandardSAE
from saeray.sae.initial import initial_sae
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve
from saeray.text.row_numbers import RowNumbers

THRESHOLD = 0.25


@pytest.fixture
def config():
    return resolve(
        LanguageModelSAERunnerConfig(
            model_name="synthetic:d_in=64,features=24,l0=2",
            device="cpu",
            eval_windows=16,
            context_size=128,
        )
    )


def evaluator(config):
    model = SyntheticModel(config, [config.hook_point])
    windows = torch.from_numpy(RowNumbers(config).evaluation())
    return GroundTruthEvaluator(model, windows), torch.from_numpy(model.known.dictionary)


def test_the_dictionary_itself_has_all_features(config):
    held_out, dictionary = evaluator(config)
    # The pseudo-inverse reads each magnitude exactly, less a quarter; none is below a half.
    sae = StandardSAE(
        torch.linalg.pinv(dictionary), dictionary, torch.full((24,), -THRESHOLD), torch.zeros(64)
    )
    got = held_out.evaluate(sae, config.hook_point)
    for name in ("mcc", "features_found", "firing_precision", "firing_recall", "firing_f1"):
        assert got[f"ground_truth/{name}"] == pytest.approx(1), name
    # Magnitudes are 1 on average: a quarter of them is missing.
    assert got["ground_truth/shrinkage"] == pytest.approx(THRESHOLD, rel=0.02)
    assert got["metrics/l0"] == got["ground_truth/l0"] == pytest.approx(2, rel=0.05)
    assert got["eval/n_tokens"] == 16 * 128
    assert 0.8 < got["metrics/explained_variance"] < 1
    assert got["warnings"] == []


def test_parts_change_nothing_and_random_directions_find_nothing(config, monkeypatch):
    whole, _ = evaluator(config)
    sae = initial_sae(64, 40, seed=0, b_dec=torch.zeros(64), dtype=torch.float32)
    got = whole.evaluate(sae, config.hook_point)
    assert got["ground_truth/features_found"] == 0
    assert got["ground_truth/shrinkage"] is None
    assert 0.1 < got["ground_truth/mcc"] < 0.5
    monkeypatch.setattr(evaluate_synthetic, "AT_ONCE", 100 * (24 + 40))
    in_parts = evaluator(config)[0].evaluate(sae, config.hook_point)
    assert in_parts.keys() == got.keys()
    for name, value in got.items():
        if isinstance(value, float):
            value = pytest.approx(value, rel=1e-5)
        assert in_parts[name] == value, name


def test_no_row_is_held_out_and_trained_on(config):
    rows = RowNumbers(config)
    held_out, first = rows.evaluation(), rows.train_within(None, 0, 2)
    assert held_out.ravel().tolist() == list(range(16 * 128))
    assert first.ravel().tolist() == list(range(16 * 128, 18 * 128))
    assert (first[1] == rows.train_within(1.0, 1, 1)[0]).all()
