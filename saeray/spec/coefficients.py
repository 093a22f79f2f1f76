"""What an `l1_coefficient` counts in the units of the other losses, for --dry-run.

The three losses differ in what the squared error of a row x, summed over d_in, is divided by: 1
("sum"), d_in ("none"), or d_in times the row's centred norm ("centred_norm"). A coefficient that
stands for the same trade between error and sparsity is divided by as much: exactly between sum and
none; with the mean of the rows' norms for centred_norm, so as an estimate. Of activations scaled by
s (`normalize_activations`) the error is s² times as large and the features s times, so there the
coefficient is s times as large for sum and none, and the same for centred_norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

USUAL = 5.0  # in sae_lens, whose loss is `sum`
SHOWN = 6  # coefficients written out in a line; the ends of more


class MeanNorms(NamedTuple):
    """Of the activations at a hook point, over some rows of held-out text."""

    rows: int
    plain: float  # mean of ‖x‖
    centred: float  # mean of ‖x - mean x‖


def in_each_unit(
    l1_coefficient: float, mse_normalization: str, scaled: bool, d_in: int, norms: MeanNorms
) -> dict[str, float]:
    """The coefficient for each loss on activations as they are, by mse_normalization."""
    scale = math.sqrt(d_in) / norms.plain if scaled and mse_normalization != "centred_norm" else 1.0
    divisor = {"sum": 1.0, "none": float(d_in), "centred_norm": d_in * norms.centred}
    of_sum = l1_coefficient / scale * divisor[mse_normalization]
    return {unit: of_sum / d for unit, d in divisor.items()}


def most(mse_normalization: str, scaled: bool, d_in: int, norms: MeanNorms) -> float:
    """The coefficient from which on about no feature gains more than it costs.

    At f = 0 the error falls by 2⟨x, d⟩ over the loss's divisor for each unit of a feature with
    decoder direction d, by 2‖x‖ at best.
    """
    of_sum = 2 * norms.centred
    return in_each_unit(of_sum, "sum", False, d_in, norms)[mse_normalization] * (
        math.sqrt(d_in) / norms.plain if scaled and mse_normalization != "centred_norm" else 1.0
    )


def silenced_text(config: Any, d_in: int, norms: MeanNorms, when: str) -> str:
    """What is said of a coefficient that leaves no feature active."""
    loss, scaled = config.mse_normalization, config.normalize_activations != "none"
    limit = most(loss, scaled, d_in, norms)
    text = (
        f"l1_coefficient = {config.l1_coefficient:g}: {when}: nothing is left to train. With "
        f"mse_normalization: {loss} no feature gains what it costs from about {limit:.2g} on."
    )
    if loss != "sum":
        here = in_each_unit(USUAL, "sum", False, d_in, norms)[loss]
        text += (
            f" A coefficient of sae_lens is of summed squares: its usual {USUAL:g} is ≈ {here:.2g} "
            "here; or write recipe: sae_lens, where it is what it is there."
        )
    return text


def silencing(configs: Sequence[Any], d_in: int, norms: MeanNorms) -> list[str]:
    """Warnings of coefficients among the configs of one hook point that leave nothing active."""
    found: dict[str, None] = {}
    for c in configs:
        scaled = c.normalize_activations != "none"
        if c.l1_coefficient is None or c.target_l0 is not None:
            continue
        if c.l1_coefficient >= most(c.mse_normalization, scaled, d_in, norms):
            text = silenced_text(c, d_in, norms, "hardly a feature will be active")
            found[text] = None
    return list(found)


def converted(configs: Sequence[Any], d_in: int, norms: MeanNorms) -> list[str]:
    """A line for each loss among the configs of one hook point: their coefficients in each unit."""
    by_loss: dict[tuple[str, bool], list[float]] = {}
    for c in configs:
        if c.l1_coefficient is None:
            continue
        scaled = c.normalize_activations != "none"
        by_loss.setdefault((c.mse_normalization, scaled), []).append(c.l1_coefficient)
    return [
        line(sorted(set(values)), unit, scaled, d_in, norms)
        for (unit, scaled), values in by_loss.items()
    ]


def line(values: list[float], unit: str, scaled: bool, d_in: int, norms: MeanNorms) -> str:
    each = [in_each_unit(x, unit, scaled, d_in, norms) for x in values]
    others = []
    for other in ("sum", "none", "centred_norm"):
        if other == unit and not scaled:
            continue
        exact = "centred_norm" not in (unit, other) and not scaled
        others.append(f"{'=' if exact else '≈'} {listed([x[other] for x in each])} of {other}")
    given = f"{listed(values)} of {unit}{' on scaled activations' if scaled else ''}"
    mean = f"mean norm {norms.plain:.3g}, centred {norms.centred:.3g} over {norms.rows:,} rows"
    return f"l1_coefficient {given} {'; '.join(others)} (≈: by the {mean} of held-out text)"


def listed(values: Sequence[float]) -> str:
    shown = [f"{x:.3g}" for x in values]
    return ", ".join(shown if len(shown) <= SHOWN else [*shown[:2], "…", shown[-1]])
