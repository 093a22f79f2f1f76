"""A transcoder's fields: what it reads and what it reconstructs, and what makes no sense for it.

An SAE reconstructs what it reads. With `hook_point_out` it reads x at hook_point and reconstructs y
at hook_point_out (2406.11944), with `skip_connection` as x W_skip plus what its features make
(2501.18823); any architecture can. Plain data, without torch.
"""

from __future__ import annotations

import re
from typing import Any

from saeray.errors import bad_value
from saeray.spec.synthetic import is_synthetic


def hooks_read(config: Any) -> tuple[str, ...]:
    """The hook points whose activations a training step takes, the SAE's input first."""
    read = config.resolved_hook_point
    if config.hook_point_out is None:
        return (read,)
    return (read, config.hook_point_out.replace("{layer}", str(config.hook_point_layer)))


def layer_of(hook_name: str | None) -> int | None:
    """The layer that a hook point is in; None where its name has none."""
    found = re.search(r"blocks\.(\d+)\.", hook_name or "")
    return int(found[1]) if found else None


def d_out(config: Any, widths: dict[str, int]) -> int:
    """How wide is what an SAE writes. widths: by hook point."""
    return widths[hooks_read(config)[-1]]


def filled(config: Any) -> dict[str, Any]:
    """What a transcoder's fields are where they are not given, whatever its recipe says.

    An encoder that begins as the decoder's transpose reads what it writes: an SAE's start.
    """
    if config.hook_point_out is None or config.encoder_init is not None:
        return {}
    return {"encoder_init": "independent"}


def check_transcoder(config: Any) -> None:
    """Refuses what makes no sense; after `check_hook_layer`.

    Raises:
        ConfigError: with the field and what would be right.
    """
    if config.hook_point_out is None:
        if config.skip_connection:
            raise bad_value(
                "skip_connection",
                True,
                "is a transcoder's: it needs hook_point_out, the hook point to reconstruct.",
            )
        return
    out = config.hook_point_out
    if is_synthetic(config.model_name):
        raise bad_value(
            "hook_point_out",
            out,
            "means nothing for model_name: synthetic:…, which has one hook point; leave it out.",
        )
    if "{layer}" in out and config.hook_point_layer is None:
        raise bad_value("hook_point_layer", None, f"{out} needs a layer to fill in.")
    read, written = hooks_read(config)
    if read == written:
        raise bad_value(
            "hook_point_out", out, "is what hook_point says; leave it out to train an SAE there."
        )
    if config.encoder_init == "decoder_transpose":
        raise bad_value(
            "encoder_init",
            config.encoder_init,
            "would have a transcoder's features read at hook_point what they write at "
            "hook_point_out; independent, or leave it out.",
        )
    if config.feature_sampling_method is not None:
        raise bad_value(
            "feature_sampling_method",
            config.feature_sampling_method,
            "gives features the direction that they read to write in, which is an SAE's; leave it "
            "out of a transcoder (use_ghost_grads, and AuxK of the topk family, work there).",
        )


def check_order(config: Any, computed: tuple[str, ...]) -> None:
    """What is read must be there before what is reconstructed: computed are hooks in their order.

    Raises:
        ConfigError: the other way round, so that nothing could be put in its place.
    """
    if config.hook_point_out is None or not computed:
        return
    read, written = hooks_read(config)
    if computed.index(read) > computed.index(written):
        raise bad_value(
            "hook_point_out",
            config.hook_point_out,
            f"{config.model_name} computes it before {read}, so it can't be put in its place by "
            "what is made of that; exchange the two, or take a later one.",
        )
