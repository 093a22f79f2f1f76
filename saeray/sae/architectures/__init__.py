"""The architectures: a file each, and a line in this table.

`base` is what the training step knows of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from saeray.sae.architectures.base import SAE, transcoder_name
from saeray.sae.architectures.batchtopk import BatchTopK
from saeray.sae.architectures.gated import Gated, GatedSAE
from saeray.sae.architectures.jumprelu import JumpReLU, JumpReLUSAE
from saeray.sae.architectures.matryoshka import Matryoshka
from saeray.sae.architectures.p_anneal import PAnneal
from saeray.sae.architectures.rule import Rule
from saeray.sae.architectures.standard import Standard, StandardSAE
from saeray.sae.architectures.topk import TopK, TopKSAE


class Architecture(NamedTuple):
    """Two classes: the weights in training, and how they are trained."""

    sae: type[SAE]
    rule: type[Rule]


ARCHITECTURES: dict[str, Architecture] = {
    "standard": Architecture(StandardSAE, Standard),
    "p_anneal": Architecture(StandardSAE, PAnneal),
    "gated": Architecture(GatedSAE, Gated),
    "topk": Architecture(TopKSAE, TopK),
    "batchtopk": Architecture(StandardSAE, BatchTopK),
    "matryoshka": Architecture(StandardSAE, Matryoshka),
    "jumprelu": Architecture(JumpReLUSAE, JumpReLU),
}

# What is published, by the name that stands in cfg.json.
PUBLISHED: dict[str, type[SAE]] = {
    name: kind
    for kind in (StandardSAE, GatedSAE, TopKSAE, JumpReLUSAE)
    for name in (
        kind.architecture,
        transcoder_name(kind.architecture, skip=False),
        transcoder_name(kind.architecture, skip=True),
    )
}


def published_sae(cfg: dict[str, Any], tensors: dict[str, Tensor]) -> SAE:
    """The SAE of a cfg.json and the tensors beside it.

    Raises:
        ValueError: of an architecture that is not known here.
    """
    kind = PUBLISHED.get(cfg["architecture"])
    if kind is None:
        raise ValueError(f"architecture {cfg['architecture']!r}: one of {', '.join(PUBLISHED)}")
    return kind.from_sae_lens(tensors, cfg)
