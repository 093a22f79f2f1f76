"""The options of `saeray features`; what it does is in `features_asked`, imported then."""

from __future__ import annotations

import argparse
from typing import Any

from saeray.spec.features import TOKENS, TOP


def add_features(commands: Any, addresses: str) -> None:
    """commands: of the command line. addresses: what --address takes, in words."""
    features = commands.add_parser("features", help="what makes each feature fire, as pages")
    features.add_argument("sweep", metavar="SWEEP[/SAE]", help="its folder; all its SAEs, or one")
    features.add_argument(
        "--tokens",
        type=int,
        default=TOKENS,
        help=f"to read, those held out from training first ({TOKENS})",
    )
    features.add_argument("--top", type=int, default=TOP, help=f"contexts of a feature ({TOP})")
    features.add_argument("--feature", type=int, metavar="I", help="print this one of the SAE")
    features.add_argument(
        "--format",
        action="append",
        default=[],
        choices=("saedashboard", "neuronpedia"),
        help="beside the pages, what SAEDashboard would write, or what Neuronpedia imports",
    )
    features.add_argument("--harvesters", type=int, help="language models; default: the sweep's")
    features.add_argument("--address", help=f"{addresses}; default: RAY_ADDRESS, or this machine")
    features.add_argument("--namespace", help="Ray's; default: saeray")
    features.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    from saeray.client.features_asked import features_command

    return features_command(arguments)
