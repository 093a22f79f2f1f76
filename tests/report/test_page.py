"""A page stands alone, and what texts are in it stays text."""

import json
import re

import pytest
from jinja2 import ChoiceLoader, DictLoader

from saeray.report.page import as_script, asset, environment, render

NASTY = "</script><script>alert(\"1\")</script><!-- & \u2028 'x'"


TEMPLATE = """{% extends "base.html" %}
{% block content %}<p title="{{ text }}">{{ text }}</p>{% endblock %}"""


@pytest.fixture
def page(monkeypatch):
    ours = environment()
    loader = ChoiceLoader([DictLoader({"any.html": TEMPLATE}), ours.loader])
    monkeypatch.setattr("saeray.report.page.environment", lambda: ours.overlay(loader=loader))
    return render("any.html", {"text": NASTY, "loss": float("nan")}, text=NASTY).decode()


def test_texts_are_escaped_wherever_they_stand(page):
    assert "alert(" in page and "<script>alert" not in page
    assert page.count("<script") == 2  # the data's and base.js


def test_scripts_get_the_data_as_they_were(page):
    inside = re.search(r'<script type="application/json" id="data">(.*?)</script>', page).group(1)
    data = json.loads(inside)
    assert data["text"] == NASTY
    assert data["loss"] is None and data["not_finite"] == {"loss": "nan"}


def test_a_page_asks_no_network(page):
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert "@import" not in page and "url(" not in page


def test_data_are_json_of_ascii_where_html_has_meaning():
    assert not set("<>&") & set(as_script({"<a&>": "<b>"}))


def test_an_asset_that_would_end_its_element_is_refused(tmp_path, monkeypatch):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "bad.js").write_text("'</script>'")
    monkeypatch.setattr("saeray.report.page.HERE", tmp_path)
    with pytest.raises(ValueError, match=r"bad\.js: can't stand"):
        asset("bad.js", "script")
