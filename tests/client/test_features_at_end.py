"""`features:` of a sweep: of which SAEs, what it costs, and where it means nothing."""

import pytest
from support.configs import config, short_run
from support.finished import finished, sae

import saeray
from saeray.client import features_at_end as at_end
from saeray.cluster.trial import one_sae
from saeray.errors import ConfigError, SaerayError
from saeray.spec.features import TOKENS
from saeray.spec.synthetic import HOOK_POINT, TEXT


def rows_of(tmp_path, **saes):
    return saeray.load_sweep(finished(tmp_path / "s", **saes).path).rows


def test_pages_are_of_the_saes_on_the_frontier(tmp_path):
    rows = rows_of(
        tmp_path,
        sparse=sae(10.0, 0.7, 0.8),
        worse=sae(12.0, 0.6, 0.7, lr=1e-2),
        dense=sae(50.0, 0.9, 0.9, lr=2e-2),
        failed=sae(state="failed", lr=1.0),
    )
    assert at_end.wanted_at_end(short_run(features=True), rows).saes == ["sparse", "dense"]
    assert at_end.wanted_at_end(short_run(features=True), rows).tokens == TOKENS
    assert at_end.wanted_at_end(short_run(features=4096), rows).tokens == 4096
    assert at_end.wanted_at_end(short_run(), rows) is None


def test_of_a_large_frontier_some_are_spread_over_it(tmp_path):
    many = {
        f"lr{i}": sae(float(10 * i), 0.5 + 0.01 * i, 0.5 + 0.01 * i, lr=1e-3 * i)
        for i in range(1, 31)
    }
    names = at_end.those_with_pages(rows_of(tmp_path, **many))
    assert len(names) == at_end.MOST_AT_END
    assert (names[0], names[-1]) == ("lr1", "lr30")


def test_where_nothing_is_judged_all_that_are_trained_have_pages(tmp_path):
    rows = rows_of(tmp_path, a=sae(), b=sae(lr=1e-2), c=sae(state="failed", lr=1e-1))
    assert at_end.those_with_pages(rows) == ["a", "b"]


def test_what_prevents_them_is_a_warning(tmp_path, monkeypatch):
    folder = finished(tmp_path / "s", a=sae(1.0, 0.7, 0.8))
    rows = saeray.load_sweep(folder.path).rows

    def make(*_):
        raise SaerayError("no room.")

    monkeypatch.setattr("saeray.client.features.make", make)
    said = at_end.make_at_end(folder, short_run(features=True), rows, print)
    assert said == f"no pages of features: no room. `saeray features {folder.uri}` tries again."
    assert at_end.make_at_end(folder, short_run(), rows, print) is None


def test_what_they_cost_is_said():
    one = short_run(features=1000, training_tokens=80_000)
    assert at_end.cost_at_end(one, 40, 1024).startswith(
        "features: pages of the SAEs on the frontier, 12 at most: 1,000 tokens read once more "
        "(1.2% of the text), up to "
    )


def test_where_they_mean_nothing_they_are_refused():
    with pytest.raises(ConfigError, match="features = -1: true, false, or a number of tokens"):
        config(features=-1)
    with pytest.raises(ConfigError, match="features = True: a synthetic model has no text"):
        config(
            model_name="synthetic:d_in=8,features=16,l0=2", hook_point=HOOK_POINT,
            dataset_path=TEXT, features=True,
        )  # fmt: skip
    with pytest.raises(ConfigError, match="features = True: are of a sweep's frontier"):
        one_sae(config(features=True))
    with pytest.raises(ConfigError, match=r"features.*it can't be a grid axis"):
        config(features=[True, False])
