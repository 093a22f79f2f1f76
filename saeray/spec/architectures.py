"""The architectures by name, and which fields of the config belong to which of them.

What they compute stands in `saeray.sae.architectures`, a file each. Plain data, without torch.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from saeray.errors import bad_value, nearest

NO_DEFAULT = None  # the field stays None, or depends on others (`derived`)

L1 = {
    "l1_coefficient": NO_DEFAULT,
    "target_l0": NO_DEFAULT,
    "feature_sampling_method": NO_DEFAULT,
}
TOPK = {
    "k": NO_DEFAULT,
    "target_l0": NO_DEFAULT,
    "auxk_scaling": "residual_variance",
    "auxk_coefficient": NO_DEFAULT,
}
BATCHTOPK = TOPK | {"topk_threshold_rate": 0.01}

# Architecture -> its own fields, each with what it is where it is not given.
OWN_FIELDS: dict[str, dict[str, Any]] = {
    "standard": L1 | {"use_ghost_grads": False},
    "p_anneal": L1
    | {
        "use_ghost_grads": False,
        "p_end": 0.2,
        "p_anneal_start_step": NO_DEFAULT,
        "p_updates": NO_DEFAULT,
    },
    "gated": L1 | {"gated_aux_decoder": NO_DEFAULT},
    "topk": TOPK,
    "batchtopk": BATCHTOPK,
    "matryoshka": BATCHTOPK | {"matryoshka_widths": NO_DEFAULT},
    "jumprelu": {
        "l0_coefficient": NO_DEFAULT,
        "jumprelu_sparsity_loss_mode": NO_DEFAULT,
        "jumprelu_init_threshold": 0.01,
        "jumprelu_bandwidth": 0.05,
        "jumprelu_tanh_scale": 4.0,
        "jumprelu_ste_to_input": False,
        "target_l0": NO_DEFAULT,
        "pre_act_loss_coefficient": 0.0,
    },
}
FIELDS = tuple(dict.fromkeys(name for own in OWN_FIELDS.values() for name in own))

# What decides how sparse an SAE becomes; each has some of them.
SPARSITY = ("l1_coefficient", "l0_coefficient", "target_l0", "k")
# Of an L1 where none is given: the guide's own, and what is about as much for the other losses.
L1_COEFFICIENT = {"centred_norm": 1e-3, "none": 1e-2, "sum": 1.0}
L0_COEFFICIENT = 1.0  # of quadratic jumprelu
RESAMPLING = ("anthropic", "l2")
# Of gated, by decoder_norm: unit rows are best left alone, free ones shrink unless they learn.
GATED_AUX_DECODER = {"unit": "constant", "free": "live"}
SPARSITY_LOSS_MODES = ("step", "tanh", "quadratic")
AUXK_SCALINGS = {"residual_variance": 1 / 32, "dead_share": 1.0}  # and their coefficients
# lr: auto of the topk family, as in OpenAI's code, dictionary_learning and sparsify.
AUTO_LR, AUTO_LR_WIDTH = 2e-4, 2**14
P_UPDATES = 10  # or as many as there are steps
P_ANNEAL_START = 0.25  # of all steps, where p_anneal_start_step is not given
# Widths below d_sae, as shares of it, where matryoshka_widths is not given: groups of 1/32, 1/16,
# 1/8 and 1/4 of the features, as in dictionary_learning.
MATRYOSHKA_SHARES = (1 / 32, 3 / 32, 7 / 32, 15 / 32)
# Under Adam, L0 hardly depends on jumprelu's coefficient outside of these (step mode).
STEP_ACTS_BETWEEN = (1e-3, 1e-1)


def owners(name: str) -> list[str]:
    """The architectures that a field belongs to."""
    return [architecture for architecture, own in OWN_FIELDS.items() if name in own]


def check_architecture(name: str) -> None:
    """Raises: ConfigError: no such architecture."""
    if name not in OWN_FIELDS:
        raise bad_value(
            "architecture", name, f"one of {', '.join(OWN_FIELDS)}; {nearest(name, OWN_FIELDS)}"
        )


def filled(config: Any) -> dict[str, Any]:
    """The values of a config's own fields that it has none for.

    Raises:
        ConfigError: no such architecture, a field that means nothing for it, one that it needs.
    """
    check_architecture(config.architecture)
    own = OWN_FIELDS[config.architecture]
    for name in FIELDS:
        value = getattr(config, name)
        if name not in own and value is not None:
            raise bad_value(
                name,
                value,
                f"means nothing for architecture: {config.architecture}; it belongs to "
                f"{', '.join(owners(name))}.",
            )
    values = {
        name: default
        for name, default in own.items()
        if getattr(config, name) is None and default is not None
    }
    if isinstance(config.lr, str):
        values["lr"] = lr_of(config)
    return values | {n: v for n, v in derived(config).items() if getattr(config, n) is None}


def lr_of(config: Any) -> float:
    """What lr: auto is, of the architectures for which a rule is known.

    Raises:
        ConfigError: another word, another architecture, or no d_in, by which the rule goes.
    """
    if config.lr != "auto":
        raise bad_value("lr", config.lr, "a number is wanted here, or auto.")
    if "k" not in OWN_FIELDS[config.architecture]:
        raise bad_value(
            "lr",
            "auto",
            f"the rule, {AUTO_LR:g} / sqrt(d_sae / {AUTO_LR_WIDTH}), is known to hold for "
            f"{', '.join(owners('k'))}; give architecture: {config.architecture} a number.",
        )
    if config.d_in is None:
        raise bad_value("lr", "auto", "goes by d_sae = d_in * expansion_factor; give d_in, too.")
    d_sae = config.d_sae(config.d_in)
    if d_sae < 1:
        raise bad_value("lr", "auto", f"d_in = {config.d_in}: d_sae would be {d_sae}.")
    return float(AUTO_LR / math.sqrt(d_sae / AUTO_LR_WIDTH))


def derived(config: Any) -> dict[str, Any]:
    """What depends on other fields: for each that has none, its value.

    Raises:
        ConfigError: nothing that says how sparse the SAE shall be.
    """
    own = OWN_FIELDS[config.architecture]
    found: dict[str, Any] = {}
    if config.architecture == "p_anneal":
        start = config.p_anneal_start_step
        if start is None:
            start = int(config.steps * P_ANNEAL_START)
        found["p_anneal_start_step"] = start
        found["p_updates"] = max(1, min(P_UPDATES, config.steps - start))
    if "auxk_coefficient" in own:
        scaling = config.auxk_scaling or own["auxk_scaling"]
        found["auxk_coefficient"] = AUXK_SCALINGS.get(scaling, 0.0)
    if "k" in own:
        if (config.k is None) == (config.target_l0 is None):
            if config.k != config.target_l0:  # both may be known, of a config that is read again
                raise bad_value("target_l0", config.target_l0, f"k = {config.k:g} says it already.")
            if config.k is None:
                raise bad_value("k", None, f"architecture: {config.architecture} needs k.")
        found["k"] = config.target_l0
    if "jumprelu_sparsity_loss_mode" in own:
        mode = config.jumprelu_sparsity_loss_mode
        if mode is None:
            mode = "step" if config.target_l0 is None else "quadratic"
        found["jumprelu_sparsity_loss_mode"] = mode
        if mode == "quadratic":
            found["l0_coefficient"] = L0_COEFFICIENT
        elif config.l0_coefficient is None:
            raise bad_value(
                "l0_coefficient", None, "architecture: jumprelu needs it, or a target_l0."
            )
    return found


def check_own_values(config: Any) -> None:
    """Ranges and choices of what is given or filled; the architecture is known.

    Raises:
        ConfigError: a value that can't be.
    """
    own = {n: v for n in OWN_FIELDS[config.architecture] if (v := getattr(config, n)) is not None}
    above_0 = "k jumprelu_bandwidth jumprelu_tanh_scale target_l0 p_updates topk_threshold_rate"
    for name in above_0.split():
        if name in own and own[name] <= 0:
            raise bad_value(name, own[name], "above 0.")
    not_below_0 = (
        "l1_coefficient l0_coefficient auxk_coefficient jumprelu_init_threshold "
        "pre_act_loss_coefficient p_anneal_start_step"
    )
    for name in not_below_0.split():
        if name in own and own[name] < 0:
            raise bad_value(name, own[name], "not below 0.")
    choices = {
        "feature_sampling_method": RESAMPLING,
        "jumprelu_sparsity_loss_mode": SPARSITY_LOSS_MODES,
        "auxk_scaling": tuple(AUXK_SCALINGS),
        "gated_aux_decoder": tuple(GATED_AUX_DECODER.values()),
    }
    for name, of in choices.items():
        if name in own and own[name] not in of:
            raise bad_value(name, own[name], f"one of {', '.join(of)}; {nearest(own[name], of)}")
    if config.architecture == "topk" and config.k != int(config.k):
        raise bad_value("k", config.k, "a whole number; batchtopk takes others, as a mean.")
    if config.architecture == "p_anneal":
        if not 0 < config.p_end <= 1:
            raise bad_value("p_end", config.p_end, "above 0, where a power ends, and at most 1.")
        left = config.steps - config.p_anneal_start_step
        if left < config.p_updates:
            raise bad_value(
                "p_anneal_start_step",
                config.p_anneal_start_step,
                f"{left} of {config.steps} steps are left for p_updates = {config.p_updates}.",
            )
    if config.architecture == "jumprelu":
        quadratic = config.jumprelu_sparsity_loss_mode == "quadratic"
        if quadratic and config.target_l0 is None:
            raise bad_value("target_l0", None, "jumprelu_sparsity_loss_mode: quadratic needs it.")
        if not quadratic and config.target_l0 is not None:
            raise bad_value(
                "target_l0",
                config.target_l0,
                "jumprelu gets there by jumprelu_sparsity_loss_mode: quadratic; leave that out.",
            )
    widths_of(config.matryoshka_widths, None)


def check_width(config: Any, d_in: int) -> None:
    """What depends on d_sae, which the model decides.

    Raises:
        ConfigError: more features than there are.
    """
    d_sae = config.d_sae(d_in)
    for name in ("k", "target_l0"):
        value = getattr(config, name)
        if value is not None and value > d_sae:
            raise bad_value(name, value, f"at most d_sae = {d_sae}.")
    if config.architecture == "matryoshka":
        widths_of(config.matryoshka_widths, d_sae)


def widths_of(text: str | None, d_sae: int | None) -> tuple[int, ...]:
    """The widths of a matryoshka SAE, ascending; the last is d_sae.

    Raises:
        ConfigError: text that is not ascending whole numbers, parted by commas, below d_sae.
    """
    if text is None:
        if d_sae is None:
            return ()
        inner = [max(1, round(d_sae * share)) for share in MATRYOSHKA_SHARES]
        return (*dict.fromkeys(w for w in inner if w < d_sae), d_sae)
    wanted = "ascending whole numbers parted by commas, like 64,256; d_sae itself is added."
    try:
        widths = [int(part) for part in text.split(",")]
    except ValueError:
        raise bad_value("matryoshka_widths", text, wanted) from None
    if widths[0] < 1 or any(a >= b for a, b in itertools.pairwise(widths)):
        raise bad_value("matryoshka_widths", text, wanted)
    if d_sae is None:
        return tuple(widths)
    if widths[-1] > d_sae:
        raise bad_value("matryoshka_widths", text, f"at most d_sae = {d_sae}.")
    return tuple(widths) if widths[-1] == d_sae else (*widths, d_sae)


def cautions(config: Any) -> list[str]:
    """What is odd about the values, though it can be meant."""
    low, high = STEP_ACTS_BETWEEN
    step = config.architecture == "jumprelu" and config.jumprelu_sparsity_loss_mode == "step"
    if step and not low <= config.l0_coefficient <= high:
        return [
            f"l0_coefficient = {config.l0_coefficient:g}: under Adam L0 hardly depends on it "
            f"outside of about {low:g} to {high:g}; for a certain L0 take "
            "jumprelu_sparsity_loss_mode: quadratic, with target_l0."
        ]
    return []
