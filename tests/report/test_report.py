"""What report.html says of a sweep: finished, going on, several at once, far away."""

import json
import math
import re

import pytest
from support.finished import finished, sae
from support.pictured import pictured

from saeray.client.cli import main
from saeray.errors import ConfigError, SaerayError
from saeray.files import account
from saeray.files.storage import Folder
from saeray.report.gather import read_log, read_sweep
from saeray.report.page import HERE
from saeray.report.report import write_report
from saeray.spec.messages import FAILED, INTERRUPTED, WAITING


def data_of(folder, name="report.html"):
    """What scripts get, and the page itself."""
    page = folder.read(name).decode()
    inside = re.search(r'<script type="application/json" id="data">(.*?)</script>', page).group(1)
    return json.loads(inside), page


def reported(folder):
    write_report([folder], folder)
    return data_of(folder)


def test_a_finished_sweep(tmp_path):
    folder = pictured(tmp_path / "one", l1_coefficient=[1e-3, 2e-3], lr=[1e-4, 1e-3])
    data, page = reported(folder)
    assert data["axes"] == ["l1_coefficient", "lr"]
    assert data["frontiers"] == ["ce_loss_score", "fvu", "kl_div"]
    first = data["saes"][0]
    assert first["values"] == {"l1_coefficient": 1e-3, "lr": 1e-4}
    assert first["figures"]["l0"] == pytest.approx(0.04 / 1e-3 * 4**0.2, rel=1e-5)
    assert first["d_sae"] == 256 == sum(first["density"])
    assert first["figures"]["never_fired_share"] == pytest.approx(first["density"][0] / 256)
    tokens, losses = first["curves"]["of"]["losses/overall_loss"]
    assert len(first["curves"]["tokens"]) == 1 and tokens == 0
    assert first["curves"]["tokens"][0][-1] == 8000 and losses[0] > losses[-1]
    assert first["final"].startswith("./trials/lr%3D0.0001")
    assert first["fields"] == {"l1_coefficient": 1e-3, "lr": 1e-4}
    assert "8,200" in page and "100 s" in page  # LM tokens, wall time
    assert "Limit:</b> the SAEs&#39; step (90% of the time" in page
    assert "not over yet" not in page


def test_one_that_goes_on(tmp_path):
    folder = pictured(
        tmp_path / "going",
        l1_coefficient=[1e-3, 2e-3, 4e-3, 8e-3],
        ends={1: WAITING, 2: WAITING, 3: INTERRUPTED},
        session=False,
    )
    data, page = reported(folder)
    assert [s["status"] for s in data["saes"]] == ["done", "unfinished", "waiting", "interrupted"]
    going, waiting = data["saes"][1:3]
    assert going["tokens"] == 3200 and going["figures"]["l0"] is not None and not going["ended"]
    assert going["on"] == []  # the frontier is of those that have ended
    assert waiting["figures"]["l0"] is None and waiting["curves"]["of"] == {}
    assert "not over yet" in page and "not recorded" in page


def test_nothing_has_begun_yet(tmp_path):
    folder = pictured(tmp_path / "new", l1_coefficient=[1e-3], ends={0: WAITING}, session=False)
    data, page = reported(folder)
    assert data["saes"][0]["status"] == "waiting" and data["edges"] is None
    assert "<h1>new</h1>" in page


def test_several_sweeps_have_one_frontier(tmp_path):
    one = pictured(tmp_path / "one", l1_coefficient=[1e-3])
    two = pictured(tmp_path / "x" / "one", l1_coefficient=[2e-3], seed=[1, 2])
    target = Folder.at(tmp_path)
    write_report([one, two], target, "both.html")
    data, page = data_of(target, "both.html")
    assert data["sweeps"] == [f"{tmp_path.name}/one", "x/one"]  # both are called `one`
    assert data["axes"][:3] == ["l1_coefficient", "lr", "seed"]
    assert [s["sweep"] for s in data["saes"]] == [0, 1, 1]
    assert data["saes"][1]["final"].startswith("x/one/trials/")
    assert "Between seeds" in page


def test_sweeps_at_other_hook_points_are_not_compared(tmp_path):
    folder = finished(
        tmp_path / "two",
        a=sae(10.0, 0.7, 0.8, hook_point="blocks.0.hook_resid_pre", hook_point_layer=0),
        b=sae(20.0, 0.6, 0.7, hook_point="blocks.1.hook_resid_pre", hook_point_layer=1),
    )
    data, _ = reported(folder)
    assert len(data["hooks"]) == 2
    assert [s["on"] for s in data["saes"]] == [["ce_loss_score", "fvu"]] * 2


def test_texts_that_differ_are_said(tmp_path):
    folder = pictured(tmp_path / "t", l1_coefficient=[1e-3], context_size=[64, 128])
    assert "the same held-out text (context_size: 64, 128)" in reported(folder)[1]
    assert "the same held-out text" not in reported(pictured(tmp_path / "u", lr=[1e-3]))[1]


def test_seeds_have_intervals(tmp_path):
    folder = pictured(tmp_path / "s", l1_coefficient=[1e-3, 2e-3], seed=[1, 2, 3])
    _, page = reported(folder)
    table = page.partition('id="seeds"')[2].partition("</table>")[0]
    assert "l1_coefficient=0.001" in table and "model_name" not in table
    assert table.count("±") == 8


def test_reasons_of_failures_are_escaped(tmp_path):
    folder = pictured(
        tmp_path / "f", l1_coefficient=[1e-3, 2e-3], ends={0: FAILED}, error="<b>nan</b> at step 7"
    )
    data, page = reported(folder)
    assert "&lt;b&gt;nan&lt;/b&gt; at step 7" in page and "<b>nan" not in page
    assert data["saes"][0]["error"] == "<b>nan</b> at step 7"


def test_figures_that_are_no_numbers_are_drawn_nowhere(tmp_path):
    folder = finished(tmp_path / "n", a=sae(10.0, math.nan, math.inf), b=sae(20.0, 0.5, 0.5))
    data, _ = reported(folder)
    assert data["saes"][0]["figures"]["ce_loss_score"] is None
    assert data["saes"][0]["on"] == []


def test_a_long_log_costs_its_thinned_lines_only(tmp_path):
    folder = Folder.at(tmp_path)
    lines = [{"step": i, "details/n_training_tokens": 8 * i, "losses/l": i} for i in range(5000)]
    lines[17] |= {"eval/n_tokens": 64, "eval/CE_loss_score": 0.5}
    folder.write("metrics.jsonl", "".join(json.dumps(x) + "\n" for x in lines).encode())
    log = read_log(folder, 50)
    tokens, values = log.curves["losses/l"]
    assert 50 <= len(tokens) <= 51 and values[0] == 0 and values[-1] == 4999
    assert log.newest["eval/CE_loss_score"] == 0.5 and log.n_lines == 5000


def test_a_sweep_on_s3(s3, capsys):
    folder = pictured(Folder.at(s3("report")) / "far", l1_coefficient=[1e-3, 2e-3])
    assert main(["report", folder.uri]) == 0
    assert "report.html?endpoint" in capsys.readouterr().out
    data, _ = data_of(folder)
    assert data["saes"][0]["final"].startswith("./trials/")


def test_the_command_writes_where_it_is_told(tmp_path, monkeypatch, capsys):
    one = pictured(tmp_path / "one", l1_coefficient=[1e-3])
    two = pictured(tmp_path / "two", l1_coefficient=[2e-3])
    monkeypatch.chdir(tmp_path)
    assert main(["report", one.path, "--output", "sub/page.html"]) == 0
    size = (tmp_path / "sub" / "page.html").stat().st_size
    assert f"page.html: {size / 1e6:.1f} MB" in capsys.readouterr().out
    assert main(["report", one.path, two.path]) == 0
    assert data_of(Folder.at(tmp_path))[0]["sweeps"] == ["one", "two"]
    for given, said in (
        ([str(tmp_path)], "Sweeps in it: one, two"),
        ([one.path, one.path], "stands in the report twice"),
        ([one.path, "--output", "page.pdf"], "--output = 'page.pdf': a file that ends with .html"),
    ):
        assert main(["report", *given]) == 2
        assert said in capsys.readouterr().err


def test_an_account_that_is_damaged_is_said(tmp_path):
    folder = pictured(tmp_path / "one", l1_coefficient=[1e-3])
    folder.write(account.FILE, b'{"sessions": [3]}')
    with pytest.raises(SaerayError, match=r"account\.json: damaged"):
        read_sweep(folder)
    with pytest.raises(ConfigError, match=r"no sweep\.yaml"):
        read_sweep(Folder.at(tmp_path / "none"))


def test_sessions_add_up(tmp_path):
    folder = pictured(tmp_path / "one", l1_coefficient=[1e-3])
    (first,) = account.read_sessions(folder)
    assert first.rest_s == pytest.approx(10.0)
    account.add_session(folder, first._replace(began=2e9, ended=2e9 + 50, training_s=20.0))
    _, page = reported(folder)
    assert "16,400" in page and "150 s" in page and "2 sessions" in page


def test_a_wheel_takes_along_what_pages_are_made_of():
    """Every file is where pyproject.toml says that data of the package are."""
    text = (HERE.parent.parent / "pyproject.toml").read_text()
    assert '"saeray.report" = ["templates/*", "assets/*"]' in text
    others = [p for p in HERE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    assert {p.parent.name for p in others} == {"templates", "assets"}
