"""What harvesters gather of features, without Ray: the same however they share it and go on."""

import numpy as np
import pytest
import torch
from support import features as of
from support.features import ABOUT, BANDS, FIRSTS, PER_BAND, TOP

from saeray.errors import SaerayError
from saeray.files import feature_data
from saeray.files.storage import Folder
from saeray.stream.feature_pass import saved_states

SAES = ("a", "b")


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    monkeypatch.setattr("saeray.stream.feature_harvester.seen_from_here", Folder.at)


@pytest.fixture(scope="module")
def parts():
    return of.parts()


@pytest.fixture(scope="module")
def tokens(parts):
    return np.concatenate([t for _, t in parts])


@pytest.fixture(scope="module")
def alone(tmp_path_factory, parts, tokens):
    """(the sweep's folder, the harvester) of one harvester that has seen all parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saeray.stream.feature_harvester.seen_from_here", Folder.at)
        where = tmp_path_factory.mktemp("features") / "sweep"
        folder = of.sweep_of(where, a=of.sparse_sae(0), b=of.sparse_sae(1))
        one, has = of.harvester(of.job_of(folder, *SAES))
        assert has == []
        for part in parts:
            one.collect(*part)
        for sae in SAES:
            one.finish(sae, tokens, FIRSTS, ABOUT | {"sae": sae})
    return folder, one


def read(folder, sae):
    return (folder / "features" / sae).read(feature_data.FEATURES)


def test_the_features_are_those_of_the_latents(alone, tokens):
    folder, one = alone
    data = feature_data.read(folder / "features" / "a")
    with torch.inference_mode():
        x = one.model.activations(torch.from_numpy(tokens))["blocks.2.hook_resid_pre"]
        f = of.sparse_sae(0).encode(x).view(*tokens.shape, -1)
    assert data.fired.tolist() == (f > 0).sum(dim=(0, 1)).tolist()
    assert data.about["n_dead"] == int((f.amax(dim=(0, 1)) == 0).sum()) >= 2
    assert (data.fired > 20).sum() > 50 and 0 < data.density.sum() < 20
    assert len(data) == data.about["d_sae"] == of.L
    peaks = f.amax(dim=1)
    for j in range(of.L):
        top = data.top(j)
        wanted = peaks[:, j].topk(TOP)
        assert [c.peak for c in top] == pytest.approx(
            [v for v in wanted.values.tolist() if v > 0], rel=1e-4
        )
        for c in [*top, *(c for b in data.bands(j) for c in b.contexts)]:
            mine = f[c.window, :, j]
            assert c.position == mine.argmax()
            seen = np.zeros(64, np.float32)
            seen[c.positions] = c.values
            np.testing.assert_allclose(seen, mine, rtol=1e-3, atol=c.peak / 30000)
    texts = [data.text(int(t)) for t in tokens[0]]
    assert texts[0] == "<|endoftext|>" and any(" " in t for t in texts)
    assert data.has_logits and data.effects(0, "top")[0].logit > 0 > data.effects(0, "bottom")[0][1]
    assert data.arrays["window"].shape == (of.L, TOP + BANDS * PER_BAND)


def test_harvesters_that_share_the_text_write_the_same_bytes(alone, tmp_path, parts, tokens):
    folder = of.sweep_of(tmp_path / "sweep", a=of.sparse_sae(0), b=of.sparse_sae(1))
    job = of.job_of(folder, *SAES)
    (first, _), (second, _) = of.harvester(job), of.harvester(job, "harvester-1")
    for part in (parts[3], parts[1]):
        first.collect(*part)
    for part in (parts[0], parts[4], parts[2]):
        second.collect(*part)
    for sae in SAES:
        first.absorb(sae, second.state(sae))
        first.finish(sae, tokens, FIRSTS, ABOUT | {"sae": sae})
        assert read(folder, sae) == read(alone[0], sae)


def test_what_was_saved_goes_on_with_another_number_of_harvesters(alone, tmp_path, parts, tokens):
    folder = of.sweep_of(tmp_path / "sweep", a=of.sparse_sae(0), b=of.sparse_sae(1))
    job = of.job_of(folder, *SAES)
    place = Folder.at(job.place)
    (first, _), (second, _) = of.harvester(job), of.harvester(job, "harvester-1")
    first.collect(*parts[0])
    assert first.save() == [0]
    first.collect(*parts[1])
    assert first.save() == [0, 1]
    second.collect(*parts[4])
    second.save()
    second.collect(*parts[3])  # lost
    saved = saved_states(place)
    assert list(saved.values()) == [{0, 1}, {4}]  # the newest only
    again, has = of.harvester(job, saved=saved)
    assert has == [0, 1, 4]
    for part in (parts[2], parts[3]):
        again.collect(*part)
    assert again.save() == [0, 1, 2, 3, 4]
    assert list(saved_states(place).values()) == [{0, 1, 2, 3, 4}]
    for sae in SAES:
        again.finish(sae, tokens, FIRSTS, ABOUT | {"sae": sae})
        assert read(folder, sae) == read(alone[0], sae)


def test_of_saved_states_that_share_parts_one_is_taken(tmp_path):
    place = Folder.at(tmp_path)
    for name, parts in {"a": "[0, 1]", "b": "[1, 2, 3]", "c": "[4]"}.items():
        (place / name).write("parts.json", parts.encode())
    (place / "cut off").write("0.safetensors", b"")
    assert saved_states(place) == {"b": {1, 2, 3}, "c": {4}}


def test_a_harvester_that_was_started_again_says_so(parts):
    made = of.FeatureHarvester(of.fields(), ["blocks.2.hook_resid_pre"])
    with pytest.raises(SaerayError, match="not begun"):
        made.collect(*parts[0])


def test_rows_that_no_sae_sees_are_in_no_context(tmp_path, parts, tokens):
    """Of each window of 64 tokens those from the fourth to the last but one: 60."""
    folder = of.sweep_of(tmp_path / "sweep", a=of.sparse_sae(0))
    one, _ = of.harvester(of.job_of(folder, "a"), context_slice=(3, -2))
    for part in parts:
        one.collect(*part)
    one.finish("a", tokens, FIRSTS, ABOUT | {"sae": "a"})
    data = feature_data.read(folder / "features" / "a")
    assert data.n_tokens == len(tokens) * 60
    with torch.inference_mode():
        x = one.model.activations(torch.from_numpy(tokens))["blocks.2.hook_resid_pre"]
        f = of.sparse_sae(0).encode(x).view(*tokens.shape, -1)[:, 3:63]
    assert data.fired.tolist() == (f > 0).sum(dim=(0, 1)).tolist()
    positions = [c.position for j in range(of.L) for c in data.top(j)]
    assert positions and min(positions) >= 3 and max(positions) <= 62
