"""`saeray plan FILE.yaml` and `saeray.plan(config)`: what a sweep would take, before it takes it.

What runs where, memory, tokens of the language model and the time by part; the time from a
calibration on the machine at hand (`calibrate`), or from figures that are given. What can't fit is
refused, with the numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from saeray.client.plan import CALIBRATION_SECONDS, Figures, Plan
from saeray.spec.config import LanguageModelSAERunnerConfig


def plan(
    config: LanguageModelSAERunnerConfig | Mapping[str, Any],
    *,
    address: str | None = None,
    namespace: str | None = None,
    calibrate: bool = True,
    tokens_per_s: float | None = None,
    sae_tokens_per_s: float | None = None,
    seconds: float = CALIBRATION_SECONDS,
) -> Plan:
    """What the grid of a config would take here, or on a cluster. Nothing is trained or written.

    Args:
        config: the guide's fields, as an object or flat data.
        address: of a Ray cluster: the plan is the cluster's. Default: RAY_ADDRESS, or this machine.
        calibrate: measure how fast the parts are, for about `seconds`; else the time is told only
            where both figures are given.
        tokens_per_s: of the language model on one harvester, instead of measuring it.
        sae_tokens_per_s: of a pack: tokens/s times its SAEs.

    Raises:
        ConfigError: what the sweep would be refused for.
    """
    from saeray.client.dry_run import planned

    if not isinstance(config, LanguageModelSAERunnerConfig):
        config = LanguageModelSAERunnerConfig.from_dict(config)
    figures = Figures(calibrate, tokens_per_s, sae_tokens_per_s, seconds).checked()
    return planned(config, address, namespace, figures)


def add_plan(commands: Any, addresses: str, command: Callable[[argparse.Namespace], int]) -> None:
    """commands: of the command line. addresses: what --address takes, in words."""
    one = commands.add_parser(
        "plan", help="what a sweep would take: placement, memory, LM tokens, time, what limits it"
    )
    one.add_argument("file", metavar="FILE.yaml")
    one.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a field"
    )
    one.add_argument(
        "--tokens-per-s",
        type=float,
        metavar="N",
        help="of the language model on one harvester, instead of measuring it",
    )
    one.add_argument(
        "--sae-tokens-per-s",
        type=float,
        metavar="N",
        help="of a pack's SAEs together, instead of measuring it; both given: nothing is measured",
    )
    one.add_argument(
        "--seconds",
        type=float,
        default=CALIBRATION_SECONDS,
        help=f"for the calibration, beside loading the model ({CALIBRATION_SECONDS:g})",
    )
    one.add_argument("--address", help=f"{addresses}; default: RAY_ADDRESS, or this machine")
    one.add_argument("--namespace", help="Ray's; default: saeray")
    one.set_defaults(command=command)
