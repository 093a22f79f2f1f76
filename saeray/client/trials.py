"""Ray Tune's part of a sweep of ours: a trial for each SAE."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from saeray.files import strict_json
from saeray.files.storage import Folder
from saeray.spec.grid import SAE
from saeray.spec.memory import TRIALS_AT_ONCE

TRIAL_RESTARTS = 5  # of an SAE's trial by Tune; the SAE itself is not disturbed
LOGGERS_OFF = "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"


def run_trials(
    saes: list[SAE], folder: Folder, name: str, scheduler: Any, all_ended: Callable[[], bool]
) -> None:
    """Tune, from the first trial of these SAEs to the end of the last.

    all_ended: whether the SAEs have. Where no scheduler decides, trials that have not had their
    turn by then have nothing to see any more, and get none.
    """
    if not saes:
        return
    from ray import tune

    from saeray.cluster.stopping import Over, scheduler_of
    from saeray.cluster.trial import INTERNAL, SAETrial

    scheduler = scheduler or scheduler_of(saes[0].config)
    keep_keys_out_of_logs()

    # A failed SAE is in the results with its reason; Tune would print its traceback too.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # As text: of each trial's config Tune copies all of them, part by part.
    points = [strict_json.dumps({"name": s.name, "config": s.config.to_dict()}) for s in saes]
    known = {
        "sweep": name,
        "folder": folder.uri,
        "sae": tune.grid_search(points),
        "decides": scheduler is not None,
    }
    with no_loggers():
        tune.run(
            SAETrial,
            name=f"tune-{uuid.uuid4().hex[:6]}",
            storage_path=(folder / ".ray").uri,
            config={INTERNAL: known},
            scheduler=scheduler,
            stop=Over(all_ended) if scheduler is None else None,
            verbose=0,
            # Says nothing either; but the one that Tune takes in a notebook clears the cell's
            # output, and with it the live view.
            progress_reporter=tune.CLIReporter(),
            max_failures=TRIAL_RESTARTS,
            # SAEs are trained whether their trial is there or not. Where nothing is decided on what
            # trials report, they come in turns and in the processes of those before them: one takes
            # 120 MB, and more than two seconds of a core to start.
            max_concurrent_trials=TRIALS_AT_ONCE if scheduler is None else None,
            reuse_actors=scheduler is None,
            raise_on_failed_trial=False,
            trial_name_creator=lambda trial: f"trial_{trial.trial_id}",
            trial_dirname_creator=lambda trial: f"trial_{trial.trial_id}",
        )


def keep_keys_out_of_logs() -> None:
    """Keeps Tune from handing on AWS keys in a runtime_env, which Ray writes into its logs.

    On this machine trials inherit them; a cluster's nodes need their own anyway. Nor does Tune hand
    on anything else: a process with a runtime_env takes half a second more of a core to start.
    """
    from ray.tune.execution import class_cache

    for handed_on in ("ENV_VARS_TO_PROPAGATE", "DEFAULT_ENV_VARS"):
        getattr(class_cache, handed_on, set()).clear()


@contextmanager
def no_loggers() -> Iterator[None]:
    """Tune writes no logs of its own: nobody reads them, and each trial's cost it three threads."""
    before = os.environ.get(LOGGERS_OFF)
    os.environ[LOGGERS_OFF] = "1"
    try:
        yield
    finally:
        del os.environ[LOGGERS_OFF]
        if before is not None:
            os.environ[LOGGERS_OFF] = before
