"""report.html in a real browser: what is drawn, pointed at, chosen, opened, printed."""

import re

import pytest
from support.pictured import pictured

from saeray.report.report import write_report
from saeray.spec.messages import FAILED, WAITING

NASTY = '<script>window.struck = true</script> & "loss" is nan'
MARKERS = "#frontier-plot .scatterlayer .points path"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Twelve SAEs: two architectures' worth of shapes, one that failed, one that goes on."""
    folder = pictured(
        tmp_path_factory.mktemp("report") / "seen",
        l1_coefficient=[4e-4, 1e-3, 2e-3],
        lr=[1e-4, 1e-3],
        expansion_factor=[4, 8],
        ends={4: FAILED, 7: WAITING},
        error=NASTY,
        model_name="a-name-" + "without-an-end-" * 20,
    )
    (folder / "features" / "expansion_factor=4,lr=0.0001,l1_coefficient=0.0004").write(
        "index.html", b"<title>features of the first</title>"
    )
    write_report([folder], folder)
    return folder


@pytest.fixture
def page(browser, sweep, tmp_path_factory):
    from pathlib import Path

    path = Path(sweep.path) / "report.html"
    browser.open(path)
    yield browser
    assert browser.said() == []  # no error, and no file that was asked for in vain
    browser.as_laptop()


def test_it_draws_every_part(page):
    plots = ("frontier", "dead", "curve", "density")
    assert [len(page.all(f"#{p}-plot .main-svg")) > 0 for p in plots] == [True] * 4
    assert len(page.all(MARKERS)) == 11  # the failed one has no figures
    assert len(page.all("#table tbody tr")) == 12
    assert "1e-" not in page.one("#bands").text and "20 – 50" in page.one("#bands").text
    assert len(page.all("#heat-map td.cell")) == 6
    assert page.run("return performance.getEntriesByType('resource').length") == 0


def test_the_frontier_is_the_one_that_python_finds(page):
    for by in ("ce_loss_score", "fvu", "kl_div"):
        ours = page.run(
            "return report.saes.filter((s) => s.on.includes(arguments[0])).map((s) => s.index)", by
        )
        drawn = page.run(
            "return report.frontier(report.saes, arguments[0]).map((s) => s.index)", by
        )
        assert sorted(drawn) == ours and len(ours) > 1


def test_pointing_at_an_sae_shows_its_config_and_a_click_opens_it(page):
    marker = page.all(MARKERS)[0]
    page.point_at(marker)
    page.until("return !document.getElementById('tip').hidden")
    words = page.one("#tip").text
    assert "l1_coefficient" in words and "0.0004" in words and "CE loss score" in words
    page.click(marker)
    page.until("return document.getElementById('sae').open")
    assert page.one("#sae-name").text == "expansion_factor=4,lr=0.0001,l1_coefficient=0.0004"
    assert "load_sweep(" in page.one("#sae-body pre").text
    assert len(page.all("#sae .plot .main-svg")) > 0
    page.one("#sae-body a").click()
    page.until("return document.title === 'features of the first'")


def test_filters_choose_what_is_drawn_and_listed(page):
    page.choose("[data-filter=lr]", "0.001")
    assert len(page.all(MARKERS)) == 5  # of six that one goes on without
    assert len([r for r in page.all("#table tbody tr") if r.is_displayed()]) == 6
    page.choose("[data-filter=lr]", "")
    assert len(page.all(MARKERS)) == 11


def test_switches_change_the_figures(page):
    page.one("#frontier-by [data-value=fvu]").click()
    assert "fraction of variance" in page.one("#frontier-note").text
    page.choose("#curve-of", "metrics/l0")
    assert page.run("return document.getElementById('curve-plot').layout.yaxis.title.text") == "L0"
    page.choose("#heat-figure", "l0")
    first = page.one("#heat-map td.cell").text
    assert float(first) > 50
    page.choose("#colour-by", "expansion_factor")
    assert "expansion_factor" in page.one("#legend").text


def test_texts_of_a_sweep_stay_texts(page):
    assert NASTY in page.one("#failures").text
    assert page.run("return window.struck") is None


def test_light_and_dark(page):
    colour = "return getComputedStyle(document.body).backgroundColor"
    tick = "return getComputedStyle(document.querySelector('#frontier-plot .xtick text')).fill"
    before = page.run(colour), page.run(tick)
    page.one("#theme").click()
    after = page.run(colour), page.run(tick)
    assert before[0] != after[0] and before[1] != after[1]
    page.one("#theme").click()
    assert (page.run(colour), page.run(tick)) == before


def test_on_a_phone_nothing_sticks_out(page):
    page.as_phone()
    page.until("return innerWidth === 390")
    page.until("return document.querySelector('#frontier-plot .main-svg').clientWidth < 390")
    assert page.run("return document.documentElement.scrollWidth") <= 390
    page.run("location.hash = 'sae-1'")
    page.until("return document.getElementById('sae').open")
    assert page.run("return document.getElementById('sae').clientWidth") <= 390


def test_it_prints(page):
    pdf = page.pdf()
    assert pdf.startswith(b"%PDF")
    sizes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", pdf)
    assert sizes and all(float(wide) > float(high) for wide, high in sizes)  # as the style asks
    page.until("return document.querySelectorAll('#config details:not([open])').length === 2")


def test_without_scripts_the_tables_are_there(sweep):
    text = sweep.read("report.html").decode().split("<script")[0]
    assert text.count("<tr class=") == 12 and "8,200" in text and "<dt" in text
