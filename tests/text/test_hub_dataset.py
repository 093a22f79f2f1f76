"""Datasets of a hub: a server on loopback answers as the real one does, to a process of its own."""

import io
import json
import os
import re
import subprocess
import sys

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest
from support.digits import windows_of
from support.hub import Hub

from saeray.errors import ConfigError

# What the process does; HF_ENDPOINT is read when huggingface_hub is imported.
TRIES = """
import json, sys
from support.digits import windows_of
from saeray.errors import ConfigError

for path, changes in json.loads(sys.argv[1]):
    said = []
    try:
        windows = windows_of(path, warn=said.append, **changes)
        outcome = sorted(set(windows.train(0, 9).ravel().tolist()))
    except ConfigError as error:
        outcome = str(error)
    print(json.dumps([outcome, said]))
"""


def table(text):
    file = io.BytesIO()
    pa.parquet.write_table(pa.table({"text": [text] * 20, "x": range(20)}), file)
    return file.getvalue()


SCRIPT = b"import datasets\n"
CONVERSION = "refs/convert/parquet"
REPOS = {
    "some/plain": {"main": {"train-0.parquet": table("123")}, "old": {"a.parquet": table("456")}},
    "some/script": {
        "main": {"script.py": SCRIPT},
        CONVERSION: {
            "plain_text/train/0000.parquet": table("123"),
            "plain_text/partial-test/0000.parquet": table("456"),
        },
    },
    "some/several": {
        "main": {"several.py": SCRIPT},
        CONVERSION: {f"{c}/train/0000.parquet": table(c * 3) for c in "78"},
    },
    "some/lost": {"main": {"lost.py": SCRIPT}},
}

CASES = {
    "a hub name": ("some/plain", {}, [0, 1, 2, 3]),
    "its revision": ("some/plain", dict(dataset_revision="old"), [0, 4, 5, 6]),
    "a URI": ("hf://datasets/some/plain", {}, [0, 1, 2, 3]),
    "a URI of a file": ("hf://datasets/some/plain/train-0.parquet", {}, [0, 1, 2, 3]),
    "no such split": ("some/plain", dict(dataset_split="no"), "dataset_split = 'no'.*train"),
    "no such revision": ("some/plain", dict(dataset_revision="no"), "dataset_revision = 'no'"),
    "no such configuration": ("some/plain", dict(dataset_config="no"), "dataset_config = 'no'"),
    "no such dataset": ("some/nothing", {}, "dataset_path = 'some/nothing': neither a local"),
    "a script": ("some/script", {}, [0, 1, 2, 3]),
    "a script, in part": (
        "some/script",
        dict(dataset_split="test", streaming=False),
        [0, 4, 5, 6],
    ),
    "a script's split": ("some/script", dict(dataset_split="no"), "dataset_split = 'no'.*train"),
    "a script's revision": (
        "some/script",
        dict(dataset_revision="main"),
        "dataset_revision = 'main'.*script.*without it",
    ),
    "a script, several configurations": ("some/several", {}, "dataset_config = None.*has: 7, 8"),
    "a script, one of them": ("some/several", dict(dataset_config="8"), [0, 8]),
    "the conversion by name": ("some/script", dict(dataset_revision=CONVERSION), [0, 1, 2, 3]),
    "a script without a conversion": ("some/lost", {}, "loading script.*no conversion"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    hub = Hub(REPOS)
    home = {"HF_HOME": str(tmp_path_factory.mktemp("hub")), "HF_ENDPOINT": hub.url}
    tries = json.dumps([(path, changes) for path, changes, _ in CASES.values()])
    try:
        done = subprocess.run(
            [sys.executable, "-c", TRIES, tries],
            env=os.environ
            | home
            | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        hub.close()
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(CASES, lines, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_what_the_hub_has_is_read_or_refused_by_its_field(outcomes, case):
    outcome, said = outcomes[case]
    wanted = CASES[case][2]
    if isinstance(wanted, str):
        assert re.search(wanted, outcome)
        assert "\n" not in outcome
    else:
        assert outcome == wanted
        assert bool(said) == ("script" in case or "conversion" in case)


def test_a_warning_says_what_is_read_instead_of_a_script(outcomes):
    (warning,) = outcomes["a script"][1]
    assert "found script.py; the hub's own conversion" in warning
    assert f"{CONVERSION}, plain_text" in warning
    assert "first part" not in warning
    assert "which has only a first part of it" in outcomes["a script, in part"][1][0]


@pytest.mark.parametrize("cached", [True, False])
def test_where_the_hub_lists_nothing_its_cache_may_have_it(monkeypatch, cached):
    def load_dataset(name, config_name, *, split, streaming, revision):
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found script.py")
        if not cached:
            raise ConnectionError("offline")
        assert revision == CONVERSION
        return datasets.Dataset.from_dict({"text": ["123"] * 9})

    def list_repo_tree(*_, **__):
        raise ConnectionError("the hub can't be reached")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", list_repo_tree)
    said = []
    if cached:
        assert windows_of("some/script", warn=said.append).evaluation().tolist() == [[0, 1, 2, 3]]
        assert CONVERSION in said[0]
    else:
        with pytest.raises(ConfigError, match=r"no conversion .*the hub can't be reached"):
            windows_of("some/script")
