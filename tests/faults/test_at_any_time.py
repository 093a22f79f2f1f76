"""One process of a sweep is killed before or after the middle of its training; by the command line.

`soak.py` does it at random; these are the moments at which something went wrong once.
"""

import json

import pytest
from faults.blows import Blow
from faults.soak import digest_of, one_run, soak_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What the soak's sweep leaves behind when nothing happens to it."""
    folder = tmp_path_factory.mktemp("alone")
    run = one_run(folder, "undisturbed", soak_config(), [], None, limit=1200.0)
    assert run.problems == [], run.said
    return digest_of(folder, "undisturbed")


@pytest.mark.parametrize(
    "blows",
    [
        "driver:KILL@0.3,driver:KILL@6",  # before it has written anything, before Ray runs
        "Roster:KILL@loading",
        "TokenServer:KILL@loading",
        "Harvester:TERM@loading",
        "Launcher:KILL@window",
        "TrainController:KILL@window",
        "TrainController:KILL@saved",
        "Roster:TERM@training",
        "Roster:KILL@window,Launcher:KILL@window",
        "Roster:KILL@saved,Launcher:KILL@saved",  # nobody knows what the dead pack's reader holds
    ],
)
def test_the_sweep_ends_with_the_same_files(alone, tmp_path, blows):
    plan = [Blow.read(b) for b in blows.split(",")]
    # No reader that is dead is waited for until it lags.
    fields = soak_config() | dict(reader_lag_s=3600.0)
    run = one_run(tmp_path, "struck", fields, plan, alone, limit=1200.0)
    assert len(run.sent) == len(plan), json.dumps(run.sent)
    assert run.problems == [], run.said


@pytest.mark.parametrize("blows", ["Gcs:KILL@training", "Raylet:KILL@training"])
def test_where_nothing_can_go_on_it_ends_and_resumes(alone, tmp_path, blows):
    run = one_run(tmp_path, "struck", soak_config(), [Blow.read(blows)], alone, limit=1200.0)
    assert run.problems == [], run.said
