"""An SAE to start from: a folder that saeray or sae_lens has written, or one on the hub."""

from __future__ import annotations

from typing import Any

import torch

from saeray.errors import bad_value
from saeray.files.checkpoint import load_sae
from saeray.files.find_sae import folder_of
from saeray.sae.architectures import ARCHITECTURES
from saeray.sae.architectures.base import PARAMETERS, SAE, folded
from saeray.sae.options import TrainingOptions
from saeray.spec.config import LanguageModelSAERunnerConfig


def started_from(
    config: LanguageModelSAERunnerConfig,
    d_in: int,
    options: TrainingOptions | None = None,
    scale: float = 1.0,
) -> SAE:
    """The SAE at `config.init_from`, as one of the config's architecture in training.

    What it computes stays what it is, but for what the architecture selects by: its thresholds, k
    and penalties are the config's own where the SAE has none. With decoder_norm: unit the norms of
    its decoder's rows are folded into the rest.

    options: what parameters begin with that the SAE does not have. scale: what activations are
    multiplied by before it sees them.

    Raises:
        ConfigError: there is no SAE, or it is of another width or kind.
    """
    where = config.init_from
    assert where is not None
    try:
        sae = load_sae(folder_of(where, "init_from"))
    except (OSError, KeyError, ValueError) as error:
        raise bad_value("init_from", where, f"no SAE could be read there: {error}") from None
    wanted = (d_in, config.d_sae(d_in))
    if (sae.d_in, sae.d_sae) != wanted:
        raise bad_value(
            "init_from",
            where,
            f"its d_in and d_sae are {sae.d_in} and {sae.d_sae}, those of this sweep {wanted[0]} "
            f"and {wanted[1]} (d_in * expansion_factor).",
        )
    kind, rule = ARCHITECTURES[config.architecture]
    if ("r_mag" in sae.EXTRA) != ("r_mag" in kind.EXTRA):
        raise bad_value(
            "init_from",
            where,
            f"is a {sae.architecture} SAE; gated ones start from gated ones alone, and no others "
            "do.",
        )
    sae = sae.for_unscaled(1 / scale)
    tensors = dict(sae.tensors)
    if config.decoder_norm == "unit":
        norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
        tensors |= folded(sae)
        tensors |= {n: tensors[n] * norms for n in ("threshold", "b_mag") if n in tensors}
    options = options or TrainingOptions(lr=0.0, total_steps=1)
    made: dict[str, Any] = {n: getattr(options, n) for n in kind.SETTINGS}
    for name in kind.EXTRA:
        start = torch.full((sae.d_sae,), rule.starts(name, options))
        made[name] = tensors.get(name, start)
    dtype = getattr(torch, config.dtype)
    made |= {name: tensors[name] for name in PARAMETERS}
    return kind(
        **{n: v.detach().to(dtype).clone() if torch.is_tensor(v) else v for n, v in made.items()}
    )
