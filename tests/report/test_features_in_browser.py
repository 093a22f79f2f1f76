"""Pages of features in a real browser, from disk: found, opened, read; text stays text."""

import shutil
from pathlib import Path

import pytest
from support.feature_files import DEAD, DENSE, L, by_hand

from saeray.files import feature_data
from saeray.files.storage import Folder
from saeray.report import features


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A folder whose name needs quoting in an address."""
    sweep = Folder.at(tmp_path_factory.mktemp("features") / "my sweep")
    place = sweep / "features" / "lr=0.001,l1=5e-4 #1"
    feature_data.write(place, by_hand())
    features.write_pages(place)
    features.write_list(sweep)
    return Path(place.path)


@pytest.fixture
def quiet(browser):
    yield browser
    assert browser.said() == []  # no error, no file asked for in vain
    assert browser.run("return document.querySelectorAll('main script').length") == 0


def numbers(browser):
    return [int(e.text) for e in browser.all("#rows td:first-child a")]


def type_into(browser, text):
    field = browser.one("#find")
    field.clear()
    field.send_keys(text)


def test_the_index_sorts_filters_and_finds(quiet, pages):
    quiet.open(pages / "index.html")
    assert numbers(quiet)[:2] == [69, 68] and quiet.one("#count").text == f"{L - 1} of {L}"
    quiet.choose("#by", "density")
    assert numbers(quiet)[0] == DENSE
    quiet.choose("#by", "number")
    quiet.choose("#which", "dead")
    assert numbers(quiet) == [DEAD] and "never fired" in quiet.one("#rows").text
    quiet.choose("#which", "all")
    quiet.choose("#where", "peaks")
    type_into(quiet, "<SCRIPT")  # features that fire on it: those of the first window
    assert numbers(quiet) == [j for j in range(0, L, 2) if j != DEAD]
    quiet.choose("#where", "any")
    type_into(quiet, "42")
    assert numbers(quiet) == [42]
    type_into(quiet, "no such token")
    assert numbers(quiet) == []


def test_from_the_list_to_a_feature_and_its_neighbour(quiet, pages):
    quiet.driver.get((pages.parent / "index.html").as_uri())
    quiet.click(quiet.one("tbody a"))
    quiet.until("return document.getElementById('rows')?.children.length")
    quiet.click(quiet.one("#rows td:first-child a"))
    quiet.until("return document.documentElement.dataset.ready === '69'")
    quiet.click(quiet.one("#near a"))
    quiet.until("return document.documentElement.dataset.ready === '1'")
    assert quiet.one("#number").text == "1"
    quiet.click(quiet.one("#before"))
    quiet.until("return document.documentElement.dataset.ready === '0'")
    assert not quiet.one("#before").is_enabled()


def test_a_context_that_holds_a_script_shows_it(quiet, pages):
    quiet.open(pages / "feature.html", "#64")
    line = quiet.one("#contexts .words")
    assert line.text == "<bos> the<script>alert(1)</script> cat"
    shaded = [e.text for e in line.find_elements("css selector", ".on")]
    assert shaded == ["<script>", "</script>"]
    peak = line.find_element("css selector", ".peak")
    assert peak.text == "<script>" and peak.get_attribute("title").startswith("1.64")
    assert "/ 85%" in peak.get_attribute("style")
    assert "held out" in quiet.one("#contexts .value").text
    assert len(quiet.all("#histogram rect")) == 41 and len(quiet.all("#logits rect")) == 50
    assert "<script>" in quiet.one("#effects").text


def test_a_feature_that_never_fired_says_so(quiet, pages):
    quiet.open(pages / "feature.html", f"#{DEAD}")
    assert "It fired on none of the tokens." in quiet.one("#contexts").text
    assert "never fired" in quiet.one("#badge").text


def test_it_is_printed_and_read_on_a_phone(quiet, pages):
    quiet.open(pages / "feature.html", "#2")
    assert quiet.pdf().startswith(b"%PDF")
    quiet.as_phone()
    wide = "return document.documentElement.scrollWidth <= window.innerWidth"
    assert quiet.run(wide)
    quiet.open(pages / "index.html")
    assert quiet.run(wide)
    quiet.as_laptop()


def test_a_data_file_that_is_missing_is_named(browser, pages, tmp_path):
    shutil.copytree(pages, tmp_path / "copy")
    (tmp_path / "copy" / "data" / "features-00001.js").unlink()
    browser.open(tmp_path / "copy" / "feature.html", "#65")
    assert "data/features-00001.js is not there" in browser.one("#status").text
    browser.said()
