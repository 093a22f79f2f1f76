"""What is written is JSON in every case, and reads back as what it was."""

import ast
import json
import math
from pathlib import Path

import pytest
from support.configs import short_run

import saeray
from saeray.client.status import Listed, as_json
from saeray.client.status_file import StatusFile, status_from
from saeray.files import strict_json
from saeray.files.checkpoint import json_bytes
from saeray.files.metrics_log import MetricsLog, read_lines
from saeray.files.storage import Folder
from saeray.files.sweep_folder import Memory, SweepFolder
from saeray.spec.messages import FAILED, SAERow, SweepStatus

NAN, INF = float("nan"), float("inf")
FLOOR = Path(saeray.__file__).parent


def strictly(text):
    """As other languages read JSON: without NaN and Infinity."""

    def refuse(word):
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_null_and_its_name_stands_beside_it():
    data = {"loss": NAN, "l0": 3.5, "inner": {"a": -INF}, "edges": [0.0, INF, [NAN]]}
    text = strict_json.dumps(data)
    assert strictly(text) == {
        "loss": None,
        "l0": 3.5,
        "inner": {"a": None, "not_finite": {"a": "-inf"}},
        "edges": [0.0, None, [None]],
        "not_finite": {"loss": "nan", "edges": {"1": "inf", "2": {"0": "nan"}}},
    }
    back = strict_json.loads(text)
    assert math.isnan(back.pop("loss"))
    assert math.isnan(back["edges"].pop()[0])
    assert back == {"l0": 3.5, "inner": {"a": -INF}, "edges": [0.0, INF]}


def test_what_is_finite_is_written_as_ever():
    data = {"b": [1, 2.5, None, "NaN"], "a": {"x": True}}
    assert strict_json.dumps(data, sort_keys=True) == json.dumps(data, sort_keys=True)
    assert strict_json.loads('{"loss": NaN}').keys() == {"loss"}  # as earlier versions wrote it
    with pytest.raises(ValueError, match="no object around"):
        strict_json.dumps([NAN])


def test_the_log_of_an_sae_that_fails_is_json_and_says_how(tmp_path):
    log = MetricsLog(Folder.at(tmp_path))
    log.append(4, {"losses/mse_loss": 0.25})
    log.append(8, {"losses/mse_loss": NAN, "metrics/l2_ratio": INF})
    lines = [strictly(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["losses/mse_loss"] is None
    assert lines[1]["not_finite"] == {"losses/mse_loss": "nan", "metrics/l2_ratio": "inf"}
    read = read_lines(Folder.at(tmp_path))
    assert math.isnan(read[1]["losses/mse_loss"])
    assert "not_finite" not in read[1]


def test_a_log_that_an_earlier_version_wrote_becomes_json(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"losses/mse_loss": NaN, "step": 4}\n')
    MetricsLog(Folder.at(tmp_path)).append(8, {"losses/mse_loss": 1.0})
    lines = [strictly(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [4, 8]
    assert lines[0]["not_finite"] == {"losses/mse_loss": "nan"}


def test_a_failed_saes_figures_are_read_from_its_sweeps_folder(tmp_path):
    files = SweepFolder(Folder.at(tmp_path), "s")
    MetricsLog(Folder.at(tmp_path / "trials" / "a")).append(8, {"losses/overall_loss": NAN})
    assert math.isnan(files.known(["a"])["a"].metrics["losses/overall_loss"])
    files.remember(Memory({"a": short_run().to_dict() | {"lr": NAN}}, {}, [], {"b": (1, 2)}))
    memory = (tmp_path / ".ray" / "roster.json").read_text()
    assert strictly(memory)["saes"]["a"]["not_finite"] == {"lr": "nan"}
    assert math.isnan(files.recall().saes["a"]["lr"])


def test_status_is_json_for_other_programs(tmp_path):
    one = Listed("s", "saeray", "running", 1, 0, NAN, 0.0, INF, "", "/f", None, [])
    (listed,) = strictly(as_json([one]))
    assert listed["not_finite"] == {"progress": "nan", "seconds_left": "inf"}
    status = SweepStatus([SAERow("a", FAILED, 3, 9, 30, {"losses/mse_loss": NAN})], "training")
    StatusFile(tmp_path / "status.json").write(status, [{"trial": "a", "mse_loss": INF}])
    text = (tmp_path / "status.json").read_text()
    strictly(text)
    data = strict_json.loads(text)  # as `jobs` does
    assert math.isnan(status_from(data).rows[0].metrics["losses/mse_loss"])
    assert data["results"] == [{"trial": "a", "mse_loss": INF}]
    assert strictly(json_bytes({"lr": NAN}))["not_finite"] == {"lr": "nan"}


def test_nothing_else_writes_json():
    users = set()
    for file in FLOOR.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps"):
                users.add((getattr(node.value, "id", None), str(file.relative_to(FLOOR))))
    json_users = {file for module, file in users if module == "json"}
    # `digest` makes a hash of it, which is in no file.
    assert json_users == {"files/strict_json.py", "spec/config.py", "models/build_tiny_python.py"}
