"""Recipes: the values of fields that make an SAE train well together, by name.

A recipe fills the fields of `Recipe` that are not given, and nothing else; what it filled is in
sweep.yaml like anything that was given. Steps scale with the length of the training.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from saeray.errors import bad_value, nearest
from saeray.spec import transcoder
from saeray.spec.architectures import GATED_AUX_DECODER, L1_COEFFICIENT, OWN_FIELDS, SPARSITY


class Share(NamedTuple):
    """Of the training's optimizer steps, and at most so many."""

    of_steps: float
    at_most: int | None = None
    at_least: int = 0

    def of(self, steps: int) -> int:
        share = max(self.at_least, int(steps * self.of_steps))
        return share if self.at_most is None else min(share, self.at_most)


GUIDES_WINDOW = 1000
DEAD_WINDOW = Share(0.1, at_most=GUIDES_WINDOW, at_least=1)
GUIDES_WARM_UP = Share(0.1, at_most=500)
# Below any norm of the gradient of the guide's loss: that goes with the activations' norm over d_in
# and was 0.002 to 0.05 on two models of d_in 96 and 128, whatever the coefficient.
GUIDES_CLIP = 1e-3


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a recipe says of each field it fills; what a field means stands in the config."""

    encoder_init: str = "decoder_transpose"
    encoder_init_scale: float = 1.0
    decoder_init_norm: float = 1.0
    decoder_norm: str = "unit"
    mse_normalization: str = "centred_norm"
    b_dec_init_method: str = "geometric_median"
    lr_warm_up_steps: Share | int = GUIDES_WARM_UP
    lr_decay_steps: Share | int = 0
    l1_warm_up_steps: Share | int = 0
    gradient_clip: float = 0.0
    normalize_activations: str = "none"
    dead_feature_window: Share | int = DEAD_WINDOW


FREE = Recipe(
    decoder_init_norm=0.1,
    decoder_norm="free",
    mse_normalization="sum",
    b_dec_init_method="zeros",
    lr_warm_up_steps=0,
    gradient_clip=1.0,
)
RECIPES = {
    # The guide's loss, so that its coefficients keep their meaning: with the L1 weighted by free
    # rows' norms it is the loss of the same SAE with rows of norm 1, which it is published as. From
    # a start where every feature reads what it writes, and where rows are as long as they will be:
    # from a tenth of that, as sae_lens begins, they are late. Of a norm that the loss's gradient
    # always has, the clip makes every step's gradient the same length: else the first ones, ten
    # times as long as the later, stay in Adam's second moments for a thousand steps and slow them
    # down. The L1's slow rise lets features find something to read before it silences them.
    "guide": Recipe(
        encoder_init_scale=0.1,
        decoder_norm="free",
        b_dec_init_method="zeros",
        lr_warm_up_steps=0,
        lr_decay_steps=Share(0.2),
        l1_warm_up_steps=Share(0.2, at_most=5000),
        gradient_clip=GUIDES_CLIP,
    ),
    # As the guide's own code began: two independent matrices.
    "guide-2024": Recipe(
        encoder_init="independent", lr_warm_up_steps=500, dead_feature_window=GUIDES_WINDOW
    ),
    # The defaults of sae_lens from version 6 on.
    "sae_lens": FREE,
    # Anthropic's update of April 2024.
    "anthropic-april": dataclasses.replace(
        FREE,
        l1_warm_up_steps=Share(0.05),
        lr_decay_steps=Share(0.2),
        normalize_activations="expected_average",
    ),
}
FIELDS = tuple(f.name for f in dataclasses.fields(Recipe))


def filled(config: Any) -> dict[str, Any]:
    """The values that a config's recipe gives its fields that have none.

    Raises:
        ConfigError: no such recipe.
    """
    name = config.recipe
    if name is None:
        guides = config.architecture == "standard" and config.hook_point_out is None
        name = "guide" if guides else "sae_lens"
    recipe = RECIPES.get(name)
    if recipe is None:
        raise bad_value("recipe", name, f"one of {', '.join(RECIPES)}; {nearest(name, RECIPES)}")
    if config.decoder_norm not in (None, recipe.decoder_norm):
        norm, scale = (1.0, 0.1) if config.decoder_norm == "unit" else (0.1, 1.0)
        recipe = dataclasses.replace(recipe, decoder_init_norm=norm, encoder_init_scale=scale)
    values: dict[str, Any] = {"recipe": name} | transcoder.filled(config)
    if config.lr_scheduler_name is None:
        values["lr_scheduler_name"] = "constantwithwarmup"
    elif config.lr_decay_steps is None:
        values["lr_decay_steps"] = 0  # a schedule that is given is the whole of it
    for field in FIELDS:
        if getattr(config, field) is None and field not in values:
            value = getattr(recipe, field)
            values[field] = value.of(config.steps) if isinstance(value, Share) else value
    if "l1_coefficient" in OWN_FIELDS[config.architecture] and config.l1_coefficient is None:
        loss = config.mse_normalization or recipe.mse_normalization
        values["l1_coefficient"] = L1_COEFFICIENT.get(loss)
    if config.architecture == "gated" and config.gated_aux_decoder is None:
        rows = config.decoder_norm or recipe.decoder_norm
        values["gated_aux_decoder"] = GATED_AUX_DECODER.get(rows)
    return values


def described(config: Any) -> str:
    """What a config's recipe and architecture fill or would fill, for --dry-run."""
    values = ", ".join(f"{name}: {getattr(config, name)}" for name in FIELDS)
    own = [n for n in OWN_FIELDS[config.architecture] if getattr(config, n) is not None]
    rest = "".join(f", {n}: {getattr(config, n)}" for n in own if n not in SPARSITY)
    return f"recipe {config.recipe}: {values}; architecture {config.architecture}{rest}"
