"""`scheduler:`: what is stopped early and on what, or why that can't be."""

import pytest
from ray.tune import schedulers
from ray.tune.execution.tune_controller import TuneController
from support.configs import config, short_run

from saeray.cluster.stopping import scheduler_of
from saeray.cluster.trial import SAETrial, one_sae
from saeray.errors import ConfigError
from saeray.files.results import COLUMNS
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.grid import SAE
from saeray.spec.metric_names import of_batch
from saeray.spec.plan import describe
from saeray.spec.scheduler import OBJECTIVES, refuse_takeover

ASHA = dict(name="asha", metric="CE_loss_score")


def run(**scheduler):
    """100 steps of 8 tokens, evaluated at every fifth."""
    return short_run(training_tokens=800, eval_every=5, scheduler=ASHA | scheduler)


def test_an_objective_has_its_key_and_its_better_end():
    asked = run(metric="ce_loss_score").scheduler
    assert (asked.metric, asked.mode) == ("eval/CE_loss_score", "max")
    assert run(metric="losses/mse_loss").scheduler.mode == "min"
    assert run(metric="l0", mode="min").scheduler.mode == "min"


def test_nobody_is_stopped_before_a_tenth_or_the_first_evaluation():
    assert run().scheduler.grace(run()) == 80
    rarely = short_run(training_tokens=800, eval_every=20, scheduler=ASHA)
    assert rarely.scheduler.grace(rarely) == 160
    assert run(grace_period=100).scheduler.grace(run()) == 100


def test_the_plan_says_it():
    saes = [SAE("a", run(grace_period=100, reduction_factor=2))]
    assert "scheduler: asha on eval/CE_loss_score (max), from 100 tokens on, one of 2 goes" in (
        describe(saes)
    )


def test_it_is_part_of_the_config_and_written_down():
    asked = run(reduction_factor=2)
    assert LanguageModelSAERunnerConfig.from_dict(asked.to_dict()) == asked


def test_tunes_schedulers_are_made_of_it():
    asha = scheduler_of(run(grace_period=100, reduction_factor=2))
    assert isinstance(asha, schedulers.ASHAScheduler)
    assert asha.metric == "eval/CE_loss_score"
    rungs = [milestone for milestone, _ in asha._brackets[0]._rungs]
    assert rungs == [800, 400, 200, 100]
    assert isinstance(scheduler_of(run(name="median")), schedulers.MedianStoppingRule)
    assert scheduler_of(short_run()) is None


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (dict(name="ascha"), "did you mean asha"),
        (dict(name="hyperband"), "asha decides the same"),
        (dict(name="pbt"), "does not go on with another one's weights"),
        (dict(metric="l0"), "scheduler.mode = None: max or min"),
        (dict(metric="CE_los_score"), "did you mean CE_loss_score"),
        (dict(mode="up"), "scheduler.mode = 'up'"),
        (dict(grace_periods=3), "unknown key 'grace_periods'; did you mean grace_period"),
        (dict(grace_period=0), "above 0"),
        (dict(grace_period=800), "training ends after 800 tokens"),
        (dict(grace_period=39), "every 40 tokens"),
        (dict(reduction_factor=1), "above 1"),
    ],
)
def test_what_can_not_be_is_refused(scheduler, words):
    with pytest.raises(ConfigError, match=words):
        run(**scheduler)


def test_an_objective_that_comes_at_the_end_is_refused():
    with pytest.raises(ConfigError, match="known at the end only"):
        short_run(eval_every=0, scheduler=ASHA)
    with pytest.raises(ConfigError, match="eval_every = 10: eval/CE_loss_score, which"):
        short_run(eval_every=10, scheduler=ASHA)  # of 10 steps
    assert short_run(eval_every=0, scheduler=ASHA | dict(metric="mse_loss")).scheduler is not None
    with pytest.raises(ConfigError, match="scheduler: metric must be given"):
        short_run(scheduler=dict(name="asha"))


def test_schedulers_with_which_saes_take_over_weights_are_refused_by_name():
    pbt = schedulers.PopulationBasedTraining(hyperparam_mutations=dict(lr=[1e-3, 2e-3]))
    with pytest.raises(ConfigError, match="PopulationBasedTraining"):
        refuse_takeover(pbt)
    refuse_takeover(schedulers.ASHAScheduler())
    refuse_takeover(None)


class Controller(TuneController):
    """Tune's, as it asks a trainable class for its needs when it adds a trial."""

    def __init__(self, scheduler):
        self._scheduler_alg = scheduler

    def add_trial(self, trial):
        return trial.default_resource_request({})


def test_so_they_are_where_tune_runs_them_itself(monkeypatch):
    monkeypatch.setattr("saeray.cluster.trial.has_head", lambda: False)
    pbt = schedulers.PopulationBasedTraining(hyperparam_mutations=dict(lr=[1e-3, 2e-3]))
    with pytest.raises(ConfigError, match="PopulationBasedTraining: an SAE does not go on"):
        Controller(pbt).add_trial(SAETrial)
    assert Controller(schedulers.ASHAScheduler()).add_trial(SAETrial) is not None


def test_a_trial_takes_no_lists_no_grid_and_no_scheduler():
    for changes in (dict(lr=[1e-3, 2e-3]), dict(grid=[dict(lr=1e-3)]), dict(scheduler=ASHA)):
        with pytest.raises(ConfigError, match=r"tune\.grid_search"):
            one_sae(config(eval_every=5, **changes))
    assert one_sae(config()) == config()


def test_every_objective_is_a_figure_of_the_results_or_the_loss():
    known = {*COLUMNS.values(), *map(of_batch, COLUMNS.values()), "losses/overall_loss"}
    assert set(OBJECTIVES) <= known
