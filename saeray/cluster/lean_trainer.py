"""Ray Train without what is of no use here: each takes a second of a core, some a process.

Before its first worker a run of Ray Train (V2) starts, one after the other: a cleaner of what a
killed controller leaves behind (`cluster.dispatch` is one), a manager of Ray Data sets (there are
none). In a Ray that this machine's sweep has started for itself also a coordinator with an
autoscaler (there is none); and it gives controller and workers a runtime_env of variables that all
processes there have inherited anyway, so that none of them can be one that Ray has started in
advance. `client.own_ray` does the like to Ray.

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

from saeray.actors.environment import in_own_ray

NOT_NEEDED = ("PlacementGroupCleanerCallback", "DatasetsCallback")

if in_own_ray():
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
    without = in_cluster(trainer)
    return alone(without) if in_own_ray() else without


def in_cluster(trainer: type) -> type:
    """Without what is of no use anywhere."""

    class Lean(trainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [c for c in callbacks if type(c).__name__ not in NOT_NEEDED]

    return Lean


def alone(trainer: type) -> type:
    """Without what is of no use in a Ray of one's own."""

    class Alone(trainer):
        def _initialize_and_run_controller(self, **arguments: Any) -> train.Result:
            arguments["scaling_policy"] = AsItIs(self.scaling_config)
            controller = ray.remote(num_cpus=0)(TrainController).remote(**arguments)
            ray.get(controller.run.remote())
            return ray.get(controller.get_result.remote())

    return Alone
