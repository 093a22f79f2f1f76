"""The live view: what is said of a sweep at one moment."""

from saeray.client.live import Rates, plain_line
from saeray.client.live_table import fitted_names, lines_of, state_of
from saeray.client.speed import Times, account, bottleneck, duration, human
from saeray.spec.messages import DONE, TRAINING, Gauges, ReaderGauges, SAERow, SweepStatus


def status(waited=0.0, busy=10.0, harvest=2.0, error=None, stepped=None):
    stepped = busy if stepped is None else stepped
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
        readers={"pack-001": ReaderGauges(waited, busy, stepped)},
        warnings=["wandb is not installed"],
        error=error,
    )


def test_numbers_for_people():
    assert [human(x) for x in (5, 1234, 1_234_567, 2e9)] == ["5", "1.23k", "1.23M", "2G"]
    assert [duration(x) for x in (5, 65, 3661)] == ["5s", "1m05s", "1h01m"]


def test_what_limits_it():
    # 4 of 10 seconds waited for the one harvester, which was busy for 8 of 10, or for 2.
    assert bottleneck(status(waited=4, busy=6, harvest=8)) == (
        "limit: the language model (trainers wait for activations 40% of the time)"
    )
    assert bottleneck(status(waited=4, busy=6)) == (
        "limit: the text, or a pack that is slower than others (trainers wait for activations 40% "
        "of the time, harvesters are idle 80%)"
    )
    assert bottleneck(status()) == ("limit: the SAEs' step (100% of the time; harvesters idle 80%)")
    # 0.5 of 10 seconds waited, 6.5 in the step: 3 with reports, snapshots and checkpoints.
    assert bottleneck(status(waited=0.5, busy=9.5, stepped=6.5)) == (
        "limit: what is around the SAEs' step (30% of the trainers' time)"
    )
    assert bottleneck(SweepStatus([], "starting trainers")) == "starting trainers"
    assert bottleneck(status(busy=1.5, stepped=0.5)) == "training"  # too early to say


def test_the_account_of_a_sweep_that_is_over():
    over = status()
    over.pass_tokens = [75_000]
    assert account(over, Times(100.0, 160.0)) == []  # it never trained
    # 12 s to the first step, 40 s of training 150,000 SAE-tokens, 8 s for the rest.
    over.training_since, over.training_until = 112.0, 152.0
    assert account(over, Times(100.0, 160.0)) == [
        "1m00s in all: 12.0 s to the first step, 40.0 s of training at 3.75k SAE-tokens/s "
        "(1.88k tokens/s), 8.0 s for evaluation and the end.",
        "limit: the SAEs' step (100% of the time; harvesters idle 80%)",
    ]
    # Resumed: an earlier session had trained two thirds of them; and the start took the longest.
    over.training_since = 142.0
    assert account(over, Times(100.0, 160.0, 100_000)) == [
        "1m00s in all: 42.0 s to the first step, 10.0 s of training at 5k SAE-tokens/s "
        "(2.5k tokens/s), 8.0 s for evaluation and the end.",
        "limit: start-up, which was longer than the training; then the SAEs' step (100% of the "
        "time; harvesters idle 80%)",
    ]


def test_rates_and_what_is_left():
    rates, early, late = Rates(), status(), status()
    early.trained_tokens, early.harvested_tokens = 50_000, 20_000
    rates.add(0.0, early)
    assert rates.time_left(early, 0.0) is None
    rates.add(10.0, late)
    assert rates.per_second() == (4_000, 10_000)
    # One SAE has 50 steps of 1,000 tokens to go, at 10,000 tokens a second; 2 s are gone.
    assert rates.time_left(late, 12.0) == 3.0
    line = plain_line(late, rates, 10.0, 75.0)
    assert line.startswith(" 1m15s training: 5s left · trained 150k SAE-tokens (10k/s)")
    assert "harvested 60k (4k/s)" in line
    assert "buffer 20/24 blocks" in line
    before = SweepStatus([], "loading the language model and the text")
    assert plain_line(before, Rates(), 0.0, 2.0).strip() == f"2s {before.phase}"


def test_reports_that_come_in_jumps_do_not_make_the_time_left_jump():
    # 3 SAEs, 10 steps of 1,000 tokens each reported every 14 s: 30,000 / 14 a second.
    rates, lefts = Rates(), []
    rows = [SAERow(f"lr={i}", TRAINING, 0, 300, 0, {}) for i in range(3)]
    for second in range(300):
        steps = second // 14 * 10
        for row in rows:
            row.step, row.n_training_tokens = steps, steps * 1000
        now = SweepStatus(rows, "training", trained_tokens=3 * steps * 1000)
        rates.add(float(second), now)
        if second >= 60:
            left = rates.time_left(now, float(second))
            true = 300 / 10 * 14 - second
            lefts.append(abs(left - true) / true)
    assert max(lefts) < 0.1


def test_what_an_sae_waits_for_is_its_state():
    rows = [SAERow("a", TRAINING, 0, 100, 0, {}), SAERow("b", TRAINING, 10, 100, 10, {})]
    phases = ("loading the language model and the text", "starting trainers", "waiting for nodes")
    assert [state_of(rows[0], p) for p in phases] == ["model loads", "starts", "waits"]
    assert state_of(rows[1], "training") == "training"


def test_names_stay_different_however_narrow_it_is():
    grid = [
        f"architecture=topk,expansion_factor=16,lr={lr},seed={s}"
        for lr in (1e-3, 2e-3) for s in range(20)
    ]  # fmt: skip
    for width in (200, 40, 20, 12, 8, 5):
        head, names = fitted_names(grid, width)
        assert len(set(names)) == len(grid)
        assert max(map(len, [head, *names])) <= width
    assert fitted_names(grid, 20)[0] == "lr seed"
    assert fitted_names(grid, 20)[1][0] == "0.001 0"
    # Every field is among what heads them, the longest without their ends.
    wide = [
        f"expansion_factor={i},lr={lr},l1_coefficient={i}" for i in (2, 4) for lr in (1e-3, 2e-3)
    ]
    assert fitted_names(wide, 24)[0] == "expansion… lr l1_coeffi…"
    mixed = ["lr=0.001,l1_coefficient=0.0004", "lr=0.001,architecture=topk,k=16"]
    assert fitted_names(mixed, 22)[1] == ["l1_coefficient=0.0004", "architecture=topk,k=16"]


def test_an_error_is_shown_whole():
    said = lines_of(status(error="d_in = 64: " + "wrong " * 40), [], None, 1.0, 80, 24)
    assert " ".join(line.plain for line in said).count("wrong") == 40
