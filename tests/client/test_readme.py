"""Blocks of README and docs that would train on GPT-2 small, run up to where Ray would start."""

import itertools

import pytest
from ray import tune
from ray.tune.search.sample import Categorical, Float
from support.blocks import blocks_of

from saeray.cluster.trial import EVALUATED, SAETrial, one_sae
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve
from saeray.spec.guide import in_our_words


def python_of(page):
    return [block.text for block in blocks_of(page) if block.language == "python"]


def points(space):
    """Each value of grid_search, and the ends of a domain."""
    axes = []
    for name, value in space.items():
        if isinstance(value, dict):
            axes.append([(name, v) for v in value["grid_search"]])
        elif isinstance(value, Categorical):
            axes.append([(name, v) for v in value.categories])
        elif isinstance(value, Float):
            axes.append([(name, v) for v in (value.lower, value.upper)])
        else:
            axes.append([(name, value)])
    return [dict(point) for point in itertools.product(*axes)]


def check(space, metric):
    """Every point is an SAE, all at one L0, and the objective is a held-out figure."""
    saes = [resolve(one_sae(LanguageModelSAERunnerConfig.from_dict(p))) for p in points(space)]
    assert len(saes) > 1
    assert {s.target_l0 for s in saes} == {50}
    assert metric in EVALUATED


def test_the_readmes_tune_example_searches_at_one_l0(monkeypatch):
    asked = {}
    monkeypatch.setattr(tune, "run", lambda trainable, **given: asked.update(given, of=trainable))
    (block,) = [b for b in python_of("README.md") if "tune.run(" in b]
    exec(block, {})
    assert asked["of"] is SAETrial
    check(asked["config"], asked["scheduler"]._metric)


def test_the_docs_search_is_at_one_l0(monkeypatch):
    asked = {}

    class Tuner:
        def __init__(self, trainable, **given):
            asked.update(given)
            raise KeyboardInterrupt  # nothing is run

    monkeypatch.setattr(tune, "Tuner", Tuner)
    (block,) = [b for b in python_of("docs/search.md") if "tune.Tuner(" in b]
    with pytest.raises(KeyboardInterrupt):
        exec(block, {})
    check(asked["param_space"], asked["tune_config"].metric)


def test_the_guides_snippet_names_fields_that_there_are():
    (block,) = [b for b in python_of("README.md") if "language_model_sae_runner(cfg)" in b]
    made = block.partition("sparse_autoencoder =")[0]
    namespace = {}
    exec(made, namespace)
    cfg = namespace["cfg"]
    assert (cfg.lr, cfg.l1_coefficient, cfg.steps) == (4e-4, 8e-5, 73_242)
    assert in_our_words(cfg.to_dict(), cfg.to_dict()) == cfg.to_dict()
