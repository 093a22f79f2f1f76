"""How fast the parts of a planned sweep are: as somebody says, or measured here or on a cluster."""

from __future__ import annotations

import math
from collections.abc import Sequence

from saeray.client.calibrate import Calibration, calibrated
from saeray.client.plan import Figures, Plan
from saeray.errors import ConfigError, SaerayError
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.fitted import Fitted
from saeray.spec.forecast import Speeds, Stretch
from saeray.spec.memory import size
from saeray.spec.messages import ModelFacts
from saeray.spec.room import Cluster, Room

ROOM_SECONDS = 120.0  # that a calibration on a cluster waits for CPUs
# Of a start and an end where nothing was measured: sweeps/tiny.yaml on two cores.
USUAL_START_UP, USUAL_END = 15.0, 6.0


def speeds_for(
    made: Plan,
    configs: Sequence[LanguageModelSAERunnerConfig],
    fitted: Fitted,
    facts: ModelFacts,
    cluster: Cluster | None,
    figures: Figures,
) -> Calibration | None:
    """How fast the parts are, given or measured; None where nothing says it."""
    given = (figures.tokens_per_s, figures.sae_tokens_per_s)
    harvesters = max(1, fitted.harvesters)
    if all(given):
        stretch = Stretch(1 / float(given[1] or 1), 1 / float(given[0] or 1) / harvesters)
        said = f"{given[0]:,.0f} tokens/s and {given[1]:,.0f} SAE-tokens/s, as given"
        made.lines.append(f"  speeds: {said}; start-up and end as on two cores")
        speeds = Speeds(stretch, stretch, 0.0, stretch.harvest, USUAL_START_UP, end=USUAL_END)
        return Calibration(speeds, [], 0.0)
    lacks = cluster is None and configs[0].device == "cuda" and facts.device != "cuda"
    if lacks or not figures.calibrate:
        why = "nothing was measured" if not lacks else "there is no GPU here to measure on"
        made.lines.append(
            f"  time: not told, since {why}; `saeray plan --tokens-per-s N --sae-tokens-per-s N` "
            "tells it from figures" + ("" if lacks else ", `saeray plan` from a calibration")
        )
        return None
    configs = [c.replace(log_to_wandb=False) for c in configs]
    try:
        if cluster is None:
            found = calibrated(configs, fitted, figures.seconds)
        else:
            found = calibrated_there(configs, fitted, cluster, figures.seconds)
    except ConfigError:
        raise
    except SaerayError as error:
        made.lines.append(f"  time: not told: {error}")
        return None
    made.lines.append(f"  calibrated in {found.seconds:.0f} s: {'; '.join(found.said)}")
    if found.gpu_bytes:
        made.lines.append(f"  GPU memory of the SAEs measured: {size(found.gpu_bytes)}")
    gain = (found.two_harvesters or 2.0) ** math.log2(harvesters)
    return found._replace(speeds=with_given(found.speeds, *given).for_harvesters(gain))


def with_given(
    speeds: Speeds, tokens_per_s: float | None, sae_tokens_per_s: float | None
) -> Speeds:
    """Measured speeds, with what is given in the place of what was measured."""
    if tokens_per_s:
        speeds = speeds.with_stretches(harvest=1 / tokens_per_s / speeds.sparse.harvest)
    if sae_tokens_per_s:
        share = speeds.dense_share
        mean = share * speeds.dense.step + (1 - share) * speeds.sparse.step
        speeds = speeds.with_stretches(step=1 / sae_tokens_per_s / mean)
    return speeds


def calibrated_there(
    configs: Sequence[LanguageModelSAERunnerConfig],
    fitted: Fitted,
    cluster: Cluster,
    seconds: float,
) -> Calibration:
    """`calibrated` where a trainer would run.

    Raises:
        SaerayError: there is no room for it now, or it could not be measured.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayTaskError

    from saeray.actors.make import placed

    room = Room(cluster.nodes)
    for node_id in fitted.harvester_nodes:
        room.take(node_id, fitted.harvester)
    node = room.place(fitted.trainer)
    apart = node is None or node.id not in fitted.harvester_nodes
    task = ray.remote(calibrated).options(max_retries=0, **placed(fitted.trainer))
    call = task.remote(configs, fitted, seconds, apart)
    try:
        found: Calibration = ray.get(call, timeout=ROOM_SECONDS + 6 * seconds)
    except GetTimeoutError:
        ray.cancel(call, force=True)
        raise SaerayError(
            f"no node had {fitted.trainer} free, or was done, within {ROOM_SECONDS:g} s."
        ) from None
    except RayTaskError as error:
        if isinstance(error.cause, SaerayError):
            raise error.cause from None
        raise
    return found
