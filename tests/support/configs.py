"""A config for tests that load no model."""

from support.bundled import HOOK

from saeray.spec.config import LanguageModelSAERunnerConfig, resolve


def config(**changes):
    values = dict(model_name="m", hook_point=HOOK, dataset_path="d")
    return LanguageModelSAERunnerConfig(**(values | changes))


def short_run(**changes):
    """Ten steps of eight rows, resolved."""
    values = dict(train_batch_size=8, training_tokens=80, log_to_wandb=False)
    return resolve(config(**(values | changes)))
