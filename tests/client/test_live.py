"""The live view: what is said of a sweep at one moment."""

import io

from rich.console import Console

from saeray.client.live import Rates, bottleneck, draw, duration, human, summary, time_left
from saeray.spec.messages import DONE, TRAINING, Gauges, ReaderGauges, SAERow, SweepStatus


def status(waited=0.0, busy=10.0, harvest=2.0, error=None):
    metrics = {"losses/overall_loss": 0.125, "metrics/l0": 31.5, "metrics/explained_variance": 0.75}
    return SweepStatus(
        rows=[
            SAERow("lr=0.001", TRAINING, 50, 100, 50_000, metrics),
            SAERow("lr=[red]", DONE, 100, 100, 100_000, {}),
        ],
        phase="training",
        harvested_tokens=60_000,
        trained_tokens=150_000,
        gauges=[Gauges(60_000, 24, 20, 18, harvest, 10.0, 1, {"pack-001": 3}, [])],
        readers={"pack-001": ReaderGauges(waited, busy)},
        warnings=["wandb is not installed"],
        error=error,
    )


def test_numbers_for_people():
    assert [human(x) for x in (5, 1234, 1_234_567, 2e9)] == ["5", "1.23k", "1.23M", "2G"]
    assert [duration(x) for x in (5, 65, 3661)] == ["5s", "1m05s", "1h01m"]


def test_who_waits_for_whom():
    # 4 of 10 seconds waited; or the one harvester busy for 2 of 10 seconds.
    assert bottleneck(status(waited=4, busy=6)) == "trainers wait for activations 40% of the time"
    assert bottleneck(status()) == "harvesters idle 80% of the time: training is the limit"
    assert bottleneck(SweepStatus([], "starting trainers")) == "starting trainers"


def test_rates_and_what_is_left():
    rates, early, late = Rates(), status(), status()
    early.trained_tokens, early.harvested_tokens = 50_000, 20_000
    rates.add(0.0, early)
    rates.add(10.0, late)
    assert rates.per_second() == (4_000, 10_000)
    # One SAE has 50 steps of 1,000 tokens to go, at 10,000 tokens a second.
    assert time_left(late, 10_000) == 5.0
    assert time_left(late, 0.0) is None
    line = summary(late, rates)
    assert "harvested 60k (4k/s)" in line
    assert "buffer 20/24 blocks" in line
    assert line.endswith("5s left")


def test_the_table_shows_every_sae_and_takes_names_literally():
    console = Console(file=io.StringIO(), width=120)
    console.print(draw(status(), Rates(), 61.0))
    drawn = console.file.getvalue()
    assert "lr=[red]" in drawn
    assert "50k  50%" in drawn
    assert "31.5" in drawn
    assert "! wandb is not installed" in drawn
    console.print(draw(status(error="d_in = 64: wrong"), Rates(), 61.0))
    assert "d_in = 64: wrong" in console.file.getvalue()
