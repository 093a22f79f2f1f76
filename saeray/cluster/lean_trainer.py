"""Ray Train without what is of no use in a Ray that this machine's sweep has started for itself.

Before its first worker a run of Ray Train (V2) starts, one after the other and each for a second of
a core: a coordinator with an autoscaler (there is none), a cleaner that asks a dashboard whether
the controller is alive (there is none), a manager of Ray Data sets (there are none); and it gives
controller and workers a runtime_env of variables that all processes have inherited anyway, so that
none of them can be one that Ray has started in advance. `client.own_ray` does the like to Ray.

All of this is done by private means, so only with the version it was tried with (`TRIED_WITH`).
Imported by launchers and, when it unpickles what they hand on, by Ray Train's controller.
"""

from __future__ import annotations

from typing import Any

import ray
from ray import train
from ray.train.v2._internal import constants
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

NOT_NEEDED = ("PlacementGroupCleanerCallback", "DatasetsCallback")

constants.ENV_VARS_TO_PROPAGATE.clear()  # here, since the controller hands them on as well


class AsItIs(FixedScalingPolicy):
    """A worker group of the size that is asked for, on the node there is."""

    def nobody_to_tell(self, *_: Any) -> None:
        """There is no autoscaler."""

    _maybe_send_resource_request = nobody_to_tell
    _send_resource_request = nobody_to_tell
    _cancel_resource_request = nobody_to_tell


def lean(trainer: type) -> type:
    """A trainer class of Ray Train without all that."""

    class Lean(trainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [c for c in callbacks if type(c).__name__ not in NOT_NEEDED]

        def _initialize_and_run_controller(self, **arguments: Any) -> train.Result:
            arguments["scaling_policy"] = AsItIs(self.scaling_config)
            controller = ray.remote(num_cpus=0)(TrainController).remote(**arguments)
            ray.get(controller.run.remote())
            return ray.get(controller.get_result.remote())

    return Lean
