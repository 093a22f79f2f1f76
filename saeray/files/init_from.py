"""An SAE to start from: a folder that saeray or sae_lens has written, or one on the hub."""

from __future__ import annotations

from typing import Any

import torch

from saeray.errors import bad_value
from saeray.files.checkpoint import load_sae
from saeray.files.find_sae import folder_of
from saeray.sae.architectures import ARCHITECTURES
from saeray.sae.architectures.base import OF_OUTPUT, PARAMETERS, SAE, folded
from saeray.sae.options import TrainingOptions
from saeray.spec.config import LanguageModelSAERunnerConfig


def started_from(
    config: LanguageModelSAERunnerConfig,
    d_in: int,
    options: TrainingOptions | None = None,
    scale: float = 1.0,
    *,
    d_out: int | None = None,
    of_output: float = 1.0,
) -> SAE:
    """The SAE at `config.init_from`, as one of the config's architecture in training.

    What it computes stays what it is, but for what the architecture selects by: its thresholds, k
    and penalties are the config's own where the SAE has none. With decoder_norm: unit the norms of
    its decoder's rows are folded into the rest.

    A transcoder starts from a transcoder; where the one has a skip connection and the other none,
    W_skip is 0.

    options: what parameters begin with that the SAE does not have. scale: what activations are
    multiplied by before it sees them; of_output: what a transcoder shall reconstruct, by this.

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
    check_output(config, sae, d_in if d_out is None else d_out)
    kind, rule = ARCHITECTURES[config.architecture]
    if ("r_mag" in sae.EXTRA) != ("r_mag" in kind.EXTRA):
        raise bad_value(
            "init_from",
            where,
            f"is a {sae.architecture} SAE; gated ones start from gated ones alone, and no others "
            "do.",
        )
    sae = sae.for_unscaled(1 / scale, 1 / of_output)
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
    if config.skip_connection and "W_skip" not in tensors:
        tensors["W_skip"] = torch.zeros(sae.d_in, sae.d_out)
    made |= {n: tensors[n] for n in (*PARAMETERS, *OF_OUTPUT) if n in tensors}
    return kind(
        **{n: v.detach().to(dtype).clone() if torch.is_tensor(v) else v for n, v in made.items()}
    )


def check_output(config: LanguageModelSAERunnerConfig, sae: SAE, d_out: int) -> None:
    """Whether it writes what the config's SAE shall.

    Raises:
        ConfigError: an SAE for a transcoder or the other way round, or of another width.
    """
    where, wanted = config.init_from, config.hook_point_out is not None
    if sae.is_transcoder != wanted:
        what, other = ("a transcoder", "an SAE") if wanted else ("an SAE", "a transcoder")
        raise bad_value("init_from", where, f"is {other}, and this is to be {what}.")
    if sae.d_out != d_out:
        raise bad_value(
            "init_from",
            where,
            f"writes {sae.d_out} numbers, and {config.hooks_read[-1]} is {d_out} wide.",
        )
    if sae.W_skip is not None and not config.skip_connection:
        raise bad_value(
            "init_from", where, "has a skip connection; write skip_connection: true to go on so."
        )
