"""Learning-rate schedules: pure functions of the step, so resuming one is just a number."""

from __future__ import annotations

import math


def lr_multiplier(
    name: str,
    step: int,
    *,
    total_steps: int,
    warm_up_steps: int = 0,
    lr_end: float = 0.0,
    num_cycles: int = 1,
    decay_steps: int = 0,
) -> float:
    """What `lr` is multiplied by at optimizer step `step` (counted from 0).

    constant: 1. constantwithwarmup: min(1, (step + 1) / warm_up_steps). linearwarmupdecay: the same
    warm-up, then linearly to 0 at total_steps. cosineannealing: half a cosine from 1 to `lr_end`
    over all steps. cosineannealingwarmup: warm-up first, the cosine over what is left.
    cosineannealingwarmrestarts: `num_cycles` half cosines of total_steps / num_cycles steps each,
    the last of which ends with the training. `lr_end` is a fraction of lr, like what is returned.

    With decay_steps that is the schedule of the steps before them; from where it ends, they lead
    linearly to 0 at total_steps.

    Raises:
        ValueError: an unknown name.
    """
    if decay_steps > 0:
        begins = max(0, total_steps - decay_steps)
        if step >= begins:
            left = (total_steps - step) / (total_steps - begins)
            return left * lr_multiplier(
                name, max(0, begins - 1), total_steps=max(1, begins), warm_up_steps=warm_up_steps,
                lr_end=lr_end, num_cycles=num_cycles,
            )  # fmt: skip
        total_steps = begins
    warm = min(1.0, (step + 1) / warm_up_steps) if warm_up_steps > 0 else 1.0
    warming = step < warm_up_steps
    left = max(1, total_steps - warm_up_steps)
    if name == "constant":
        return 1.0
    if name == "constantwithwarmup":
        return warm
    if name == "linearwarmupdecay":
        return warm if warming else max(0.0, (total_steps - step) / left)
    if name == "cosineannealing":
        return half_cosine(step / max(1, total_steps), lr_end)
    if name == "cosineannealingwarmup":
        return warm if warming else half_cosine((step - warm_up_steps) / left, lr_end)
    if name == "cosineannealingwarmrestarts":
        # In whole numbers: where the cycles don't divide the steps, a step is still in one cycle.
        total = max(1, total_steps)
        return half_cosine(step * num_cycles % total / total, lr_end)
    raise ValueError(f"lr_scheduler_name {name!r} is unknown")


def l1_multiplier(step: int, warm_up_steps: int) -> float:
    """What `l1_coefficient` is multiplied by at optimizer step `step` (counted from 0)."""
    return min(1.0, step / warm_up_steps) if warm_up_steps > 0 else 1.0


def half_cosine(progress: float, end: float) -> float:
    """1 at progress 0, `end` at progress 1."""
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
