"""The pages of features: what is in them, and how they come in parts."""

import base64
import json
import re

import numpy as np
import pytest
from support.feature_files import DEAD, DENSE, TEXTS, L, by_hand

from saeray.errors import ConfigError
from saeray.files import feature_data
from saeray.files.storage import Folder
from saeray.report import features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sweep = Folder.at(tmp_path_factory.mktemp("pages") / "my sweep")
    place = sweep / "features" / "an SAE, #1"
    feature_data.write(place, by_hand())
    assert features.write_pages(place) > 1000
    features.write_list(sweep)
    return sweep


def script(folder, name):
    """The argument of the call that a data file is."""
    text = (folder / "features" / "an SAE, #1" / "data").read(name).decode("ascii")
    return json.loads(re.fullmatch(r"saeray\w+\((.*)\);\n", text, re.DOTALL).group(1))


def embedded(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))


def test_what_was_written_is_read_again(folder):
    place = folder / "features" / "an SAE, #1"
    again, before = feature_data.read(place), by_hand()
    assert again.about == before.about
    assert all(np.array_equal(again.arrays[n], a) for n, a in before.arrays.items())
    assert [name for name, _ in feature_data.folders(folder)] == ["an SAE, #1"]
    top = again.top(7)
    assert [(c.window, c.position, round(c.peak, 4)) for c in top] == [(1, 2, 1.07)]
    assert again.bands(7)[0].contexts[0].window == 2 and again.bands(7)[0].high == 1.5
    assert again.neighbours(0) == [(1, 0.5), (2, 0.25)]


def test_features_come_in_files_of_their_own(folder):
    names = (folder / "features" / "an SAE, #1" / "data").names()
    assert names == ["features-00000.js", "features-00001.js", "tokens.js"]
    assert len(script(folder, "features-00000.js")["features"]) == 64
    last = script(folder, "features-00001.js")
    assert (last["first"], len(last["features"])) == (64, L - 64)
    one = last["features"][1]
    assert one["top"] == [[1, 2, 1.65, [2, 1.65, 4, pytest.approx(0.825, rel=1e-3)]]]
    assert one["top_logits"] == [["<script>", 2.0], [" cat", 1.0]]
    assert one["density"] == 3 / 18


def test_the_text_is_there_once(folder):
    data = script(folder, "tokens.js")
    ids = np.frombuffer(base64.b64decode(data["windows"]), "<u4").reshape(-1, data["context"])
    assert data["numbers"] == [0, 1, 2]
    assert "".join(data["texts"][i] for i in ids[0]) == "<bos> the<script>alert(1)</script> cat"
    assert set(data["texts"]) == set(TEXTS)


def test_the_index_has_every_feature_and_what_it_is_found_by(folder):
    page = (folder / "features" / "an SAE, #1").read("index.html").decode()
    data = embedded(page)
    assert len(data["density"]) == len(data["largest"]) == len(data["peaks"]) == L
    assert data["density"][DEAD] == 0 and data["peaks"][DEAD] == []
    assert data["density"][DENSE] > data["dense"]
    assert [data["texts"][t] for t in data["peaks"][0]] == ["<script>"]
    assert "<script>alert" not in page and "<b>1</b>" not in page


def test_the_list_links_to_each_sae_whatever_its_name(folder):
    page = (folder / "features").read("index.html").decode()
    assert 'href="an%20SAE%2C%20%231/index.html"' in page


def test_an_sae_without_logits_has_pages_too(tmp_path):
    data = by_hand()
    for name in [n for n in data.arrays if "logit" in n or "token" in n]:
        if name != "band_tokens":
            del data.arrays[name]
    feature_data.write(Folder.at(tmp_path), data)
    features.write_pages(Folder.at(tmp_path))
    page = Folder.at(tmp_path).read("index.html").decode()
    assert embedded(page)["top"] == []


def test_a_folder_without_features_says_what_makes_them(tmp_path):
    with pytest.raises(ConfigError, match="`saeray features` makes them"):
        feature_data.read(Folder.at(tmp_path))
