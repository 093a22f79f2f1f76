"""Ray Tune's searchers and schedulers on `SAETrial`, and `scheduler:` of a sweep."""

import pytest
import yaml
from ray import tune
from ray.tune.search.optuna import OptunaSearch

import saeray
from saeray.errors import ConfigError
from saeray.files.storage import Folder
from saeray.files.sweep_folder import SweepFolder

pytestmark = pytest.mark.usefixtures("ray_instance")

SCORE = "metrics/CE_loss_score"
LONG = 600  # steps: so many that Tune decides while they train


class Seen(tune.Callback):
    """Every result, by trial."""

    def __init__(self):
        self.results = {}

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.results.setdefault(trial.trial_id, []).append(dict(result))


def rows(folder):
    return {r["trial"]: r for r in SweepFolder(Folder.at(folder), folder.name).read_rows()}


@pytest.mark.slow
def test_optuna_searches_on_the_score_and_what_it_stops_loads(tiny, tmp_path):
    seen = Seen()
    results = tune.Tuner(
        saeray.SAETrial,
        # Evaluated at the end only, if nobody asked.
        param_space=tiny
        | dict(training_tokens=LONG * 1024, lr=tune.loguniform(1e-4, 4e-3), eval_every=0),
        tune_config=tune.TuneConfig(
            metric=SCORE,
            mode="max",
            search_alg=OptunaSearch(seed=0),
            num_samples=2,
            max_concurrent_trials=1,
        ),
        run_config=tune.RunConfig(
            name="optuna",
            storage_path=str(tmp_path),
            stop={"step": 20},
            callbacks=[seen],
            verbose=0,
        ),
    ).fit()
    assert not results.errors
    assert len(results) == 2
    for told in seen.results.values():
        assert all(result[SCORE] < 1 for result in told)
        assert [result["step"] for result in told] == [4, 8, 12, 16, 20]
    best = results.get_best_result(metric=SCORE, mode="max")
    assert best.metrics[SCORE] == max(r.metrics[SCORE] for r in results)
    assert saeray.load_sae(best.metrics["path"]).d_sae == 256
    ended = rows(tmp_path / "optuna")
    assert [r["status"] for r in ended.values()] == ["stopped"] * 2
    assert {r.metrics["path"] for r in results} == {r["path"] for r in ended.values()}
    assert all(r["ce_loss_score"] < 1 for r in ended.values())
    # Each ends where Tune has stopped it.
    assert {r["n_training_tokens"] for r in ended.values()} == {20 * 1024}
    assert {r.metrics["n_training_tokens"] for r in results} == {20 * 1024}
    # The first evaluation was for Optuna: the log has that of the end alone, as it would anyway.
    for name, row in ended.items():
        log = Folder.at(tmp_path / "optuna") / "trials" / name
        lines = [yaml.safe_load(x) for x in log.read("metrics.jsonl").decode().splitlines()]
        evaluated = [line["step"] for line in lines if "eval/CE_loss_score" in line]
        assert evaluated == [row["n_training_tokens"] // 1024]


@pytest.mark.slow
def test_a_second_grid_under_the_same_name_adds_to_the_first(tiny, tmp_path):
    """Also with an SAE that the first one has, and with one that it has trained to its end."""

    def grid(lrs, tokens=LONG * 1024):
        return tune.run(
            saeray.SAETrial,
            config=tiny
            | dict(training_tokens=tokens, stream_tokens=LONG * 1024, lr=tune.grid_search(lrs)),
            name="twice",
            storage_path=str(tmp_path),
            stop={"step": 20},
            verbose=0,
        )

    def on_disk():
        table = rows(tmp_path / "twice")
        files = (tmp_path / "twice" / "trials").glob("*/final/*")
        return table, {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in files}

    grid([1e-3], tokens=16 * 1024)
    grid([1e-3, 2e-3])
    first, files = on_disk()
    assert sorted((r["status"], r["n_training_tokens"]) for r in first.values()) == [
        ("done", 16 * 1024), ("stopped", 20 * 1024), ("stopped", 20 * 1024),
    ]  # fmt: skip
    again = grid([1e-3, 4e-3], tokens=16 * 1024)
    told = {t.config["lr"]: t.last_result for t in again.trials}
    assert {lr: result["n_training_tokens"] for lr, result in told.items()} == {
        1e-3: 16 * 1024, 4e-3: 16 * 1024,
    }  # fmt: skip
    second, there = on_disk()
    assert len(second) == 4
    assert {name: second[name] for name in first} == first
    assert {f: there[f] for f in files} == files
    assert {r["path"] for r in second.values()} >= {result["path"] for result in told.values()}
    assert yaml.safe_load((tmp_path / "twice/sweep.yaml").read_text())["saes"].keys() == {*second}


@pytest.mark.slow
def test_hyperband_pauses_saes_and_the_best_goes_on(tiny, tmp_path):
    lrs = [1e-3, 4e-3, 1e-5, 2e-3]
    results = tune.Tuner(
        saeray.SAETrial,
        param_space=tiny
        | dict(
            training_tokens=LONG * 1024,
            lr=tune.grid_search(lrs),
            eval_every=40,
            wandb_log_frequency=20,
        ),
        tune_config=tune.TuneConfig(
            metric=SCORE,
            mode="max",
            # Its first bracket, of two, trains to the end. The other two pause at their first
            # result, from which the better one goes on.
            scheduler=tune.schedulers.HyperBandScheduler(
                time_attr="step", max_t=LONG, reduction_factor=LONG
            ),
        ),
        run_config=tune.RunConfig(name="hyperband", storage_path=str(tmp_path), verbose=0),
    ).fit()
    assert not results.errors
    steps = {r.config["lr"]: r.metrics["step"] for r in results}
    assert steps.pop(1e-5) < LONG
    assert set(steps.values()) == {LONG}
    for r in results:
        assert saeray.load_sae(r.metrics["path"]).d_sae == 256
    ended = rows(tmp_path / "hyperband")
    assert {r["lr"]: r["status"] for r in ended.values()} == {
        lr: "stopped" if lr == 1e-5 else "done" for lr in lrs
    }
    # Every step of the one that went on is in its log once.
    (name,) = [n for n, r in ended.items() if r["lr"] == 2e-3]
    log = (Folder.at(tmp_path / "hyperband") / "trials" / name).read("metrics.jsonl").decode()
    logged = [yaml.safe_load(line)["step"] for line in log.splitlines()]
    # Besides, there may be one of the step it was paused at.
    assert [step for step in logged if step % 20 == 0] == list(range(20, LONG + 1, 20))


def test_a_scheduler_that_moves_weights_is_refused_before_anything_starts(tiny, tmp_path):
    pbt = tune.schedulers.PopulationBasedTraining(
        metric=SCORE, mode="max", hyperparam_mutations=dict(lr=[1e-3, 2e-3])
    )
    with pytest.raises(ConfigError, match="PopulationBasedTraining"):
        saeray.sweep(tiny, name="moved", storage_path=tmp_path, scheduler=pbt, live=False)
    with pytest.raises(Exception, match="PopulationBasedTraining: an SAE does not go on"):
        tune.run(
            saeray.SAETrial,
            config=tiny,
            scheduler=pbt,
            name="pbt",
            storage_path=str(tmp_path),
            verbose=0,
        )
    assert not list(tmp_path.glob("*/trials"))
    assert not list(tmp_path.glob("*/.ray"))


@pytest.mark.slow
def test_a_sweep_stops_its_worst_saes_and_says_so(tiny, tmp_path):
    config = tiny | dict(
        training_tokens=LONG * 1024,
        eval_every=20,
        grid=[dict(lr=4e-3), dict(lr=2e-3, l1_coefficient=5e-4), dict(lr=[3e-5, 1e-5])],
        scheduler=dict(
            name="asha", metric="CE_loss_score", grace_period=40 * 1024, reduction_factor=2
        ),
    )
    result = saeray.sweep(config, name="stops", storage_path=tmp_path, live=False)
    assert result.ok
    status = {r["trial"]: r["status"] for r in result.rows}
    assert list(status) == ["lr=0.004", "lr=0.002,l1_coefficient=0.0005", "lr=3e-05", "lr=1e-05"]
    assert "done" in status.values()
    stopped = [r for r in result.rows if r["status"] == "stopped"]
    assert "stopped" in (status["lr=3e-05"], status["lr=1e-05"])
    for r in stopped:
        assert 40 * 1024 <= r["n_training_tokens"] < LONG * 1024
        assert r["ce_loss_score"] < 1
        assert result.load(r["trial"]).d_sae == 256
    said = f"stopped early by the scheduler: {len(stopped)} of 4 SAEs"
    assert said in result.summary()
