"""`saeray features` on a finished sweep, by real harvesters: what one alone would write."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import yaml
from support import features as of
from support.running import pids

import saeray
from saeray.client.features import make
from saeray.client.session import done_already
from saeray.files import feature_data
from saeray.files.storage import Folder
from saeray.files.sweep_folder import SweepFolder
from saeray.report.gather import feature_pages
from saeray.spec.features import Wanted
from saeray.stream.check import open_text
from saeray.stream.feature_harvester import FeatureHarvester, FeatureJob
from saeray.stream.feature_harvester import Wanted as OneSAE
from saeray.stream.feature_pass import FeaturePass

HOOK = "blocks.2.hook_resid_pre"


@pytest.mark.slow
@pytest.mark.ci
def test_a_pass_by_two_harvesters_is_as_one_by_hand(alone, monkeypatch, tmp_path):
    (row,) = alone.rows
    name, said = row["trial"], []
    sweep = alone.folder  # on S3
    make(sweep, Wanted((name,), tokens=4096, top=4, harvesters=2), said.append)
    place = sweep / "features" / name
    data = feature_data.read(place)
    assert data.about["windows"] * 64 == data.n_tokens == 8 * 64 + 4 * 16 * 64
    assert data.about["held_out_windows"] == 8
    assert {"index.html", "feature.html", "data"} <= set(place.names())
    assert set((sweep / "features").names()) == {name, "index.html"}  # none of what was saved
    # The same text, SAE and model, in this process.
    config = SweepFolder(sweep, sweep.name).read_configs()[name]
    monkeypatch.setattr("saeray.stream.feature_harvester.seen_from_here", Folder.at)
    wanted = OneSAE((sweep / "trials" / name / "final").uri, HOOK, HOOK, len(data))
    job = FeatureJob({name: wanted}, 64, 4, 5, 5, str(tmp_path), str(tmp_path))
    one = FeatureHarvester(config.to_dict(), [HOOK])
    one.begin(job, "one", [])
    text = open_text(config, lambda _: None)
    parts = [text.evaluation(), *(text.train(16 * i, 16) for i in range(4))]
    for i, tokens in enumerate(parts):
        one.collect(i, tokens)
    one.finish(name, np.concatenate(parts), [0, 8, 24, 40, 56], data.about)
    assert (Folder.at(tmp_path) / "features" / name).read(feature_data.FEATURES) == place.read(
        feature_data.FEATURES
    )
    # Once more there is nothing to gather: no harvester is started.
    said.clear()
    make(sweep, Wanted((name,), tokens=4096, top=4), said.append)
    assert len(said) == 1 and "index.html" in said[0]
    (sweep / "features").delete()  # others look at this sweep, too


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["gather", "join"])
def test_a_harvester_that_is_killed_changes_no_byte(tmp_path, ray_instance, monkeypatch, phase):
    folder = of.sweep_of(tmp_path / "sweep", a=of.sparse_sae(0), b=of.sparse_sae(1))
    wanted = Wanted(("a", "b"), tokens=40_000, harvesters=2)
    make(folder, wanted, lambda _: None)
    kept = {s: (folder / "features" / s).read(feature_data.FEATURES) for s in "ab"}
    (folder / "features").delete()
    said, killed, real = [], [], getattr(FeaturePass, phase)

    def struck(self, *arguments):
        if not killed:
            killed.append(min(pids("FeatureHarvester")))
            os.kill(killed[0], signal.SIGKILL)
        return real(self, *arguments)

    monkeypatch.setattr(FeaturePass, phase, struck)
    make(folder, wanted, said.append)
    assert {s: (folder / "features" / s).read(feature_data.FEATURES) for s in "ab"} == kept
    assert [text for text in said if "died" in text]


def features_by_command(folder):
    return subprocess.Popen(
        [sys.executable, "-m", "saeray", "features", folder.path, "--tokens", "60000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def runs(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def made(folder, names):
    return {
        f"{s}/{file}": (folder / "features" / s).read(file)
        for s in names
        for file in (feature_data.FEATURES, "index.html", "data/tokens.js")
    }


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on_when_it_is_given_again(tmp_path):
    folder = of.sweep_of(tmp_path / "sweep", a=of.sparse_sae(0), b=of.sparse_sae(1))
    text = yaml.safe_load(folder.read("sweep.yaml"))
    for config in text["saes"].values():
        config["checkpoint_every_s"] = 0.1
    folder.write("sweep.yaml", yaml.safe_dump(text).encode())
    whole = features_by_command(folder)
    said = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, said
    kept = made(folder, "ab")
    (folder / "features").delete()
    first = features_by_command(folder)
    deadline = time.monotonic() + 200
    while not any(name.endswith("/parts.json") for name in (folder / "features").files()):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    below = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait(timeout=60)
    first.stdout.close()
    deadline = time.monotonic() + 120
    while any(map(runs, below)):  # what it has started ends with it
        assert time.monotonic() < deadline, [p for p in below if runs(p)]
        time.sleep(0.2)
    assert "a" not in (folder / "features").names()  # it was in the middle
    again = features_by_command(folder)
    said = again.communicate(timeout=300)[0]
    assert again.returncode == 0, said
    assert "parts that were saved" in said
    assert made(folder, "ab") == kept
    assert set((folder / "features").names()) == {"a", "b", "index.html"}


@pytest.mark.slow
def test_resuming_a_sweep_makes_the_pages_that_it_lacks(tmp_path, ray_instance):
    folder = of.sweep_of(tmp_path / "sweep", a=of.sparse_sae(0), b=of.sparse_sae(1))
    asked = yaml.safe_load(folder.read("sweep.yaml"))
    for config in asked["saes"].values():
        config["features"] = 4096
    folder.write("sweep.yaml", yaml.safe_dump(asked).encode())
    (said,) = done_already(folder).status.warnings  # as from a laptop
    assert said == f"pages of features are not made yet: saeray features {folder.uri}"
    result = saeray.resume(folder.path, live=False)
    assert result.ok and result.status.warnings == []
    assert feature_pages(folder) == {"a", "b"}
    assert done_already(folder).status.warnings == []
