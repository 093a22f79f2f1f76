"""`model_name: synthetic:…`: activations of known features in the place of a language model's.

    synthetic:d_in=64,features=256,l0=4,zipf=1

What is left out has the default below. Every row is a sparse sum of known directions (how it is
made: `saeray.lm.synthetic`), so it is known how much of them an SAE has found. Plain data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saeray.errors import ConfigError, bad_value, nearest

PREFIX = "synthetic:"
HOOK_POINT = "activations"  # the only one there is
TEXT = "synthetic"  # what stands in dataset_path
MOST_ROWS = 2**31  # row numbers travel as tokens do, in 32 bits
CHILDLESS = 0.5  # share of a parent's firings without any child


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """The dictionary and how its features fire. The defaults are the easy setting."""

    d_in: int = 64  # width of the activations; less than features: superposition
    features: int = 256  # unit vectors in random directions
    l0: float = 4.0  # mean number of features that fire in a row
    zipf: float = 0.0  # the feature of rank r fires in proportion to r ** -zipf; 0: all alike
    spread: float = 0.5  # magnitudes are uniform between 1 - spread and 1 + spread
    hierarchy: int = 0  # children of each parent: one at most fires, and only with its parent
    correlation: float = 0.0  # of the firing of features of a group of eight neighbours in rank
    noise: float = 0.0  # standard deviation of what is added to every coordinate
    seed: int = 0  # of the directions

    @property
    def trees(self) -> int:
        """Features that fire by themselves: all, or the parents."""
        return self.features // (1 + self.hierarchy)

    def frequencies(self) -> list[float]:
        """How often each feature fires: first the trees' (in order of rank), then the children's.

        Child k of tree t is feature trees + t * hierarchy + k. The sum is l0.
        """
        weights = [(rank + 1.0) ** -self.zipf for rank in range(self.trees)]
        share = (1 - CHILDLESS) / self.hierarchy if self.hierarchy else 0.0
        each = self.l0 / (math.fsum(weights) * (1 + share * self.hierarchy))
        children = [w * share * each for w in weights for _ in range(self.hierarchy)]
        return [w * each for w in weights] + children

    def __str__(self) -> str:
        values = dataclasses.asdict(self)
        return PREFIX + ",".join(f"{name}={shown(value)}" for name, value in values.items())


def shown(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def is_synthetic(model_name: Any) -> bool:
    return isinstance(model_name, str) and model_name.startswith(PREFIX)


def parse(model_name: str) -> Synthetic:
    """The dictionary that a `synthetic:…` describes.

    Raises:
        ConfigError: an unknown parameter, or a value that makes no dictionary.
    """
    types = {f.name: type(f.default) for f in dataclasses.fields(Synthetic)}
    values: dict[str, Any] = {}
    for part in model_name.removeprefix(PREFIX).split(","):
        name, _, text = (word.strip() for word in part.partition("="))
        if not part.strip():
            continue
        if name not in types:
            raise wrong(model_name, f"unknown parameter {name!r}; {nearest(name, types)}")
        if name in values:
            raise wrong(model_name, f"{name} is given twice.")
        values[name] = number(model_name, name, text, types[name])
    spec = Synthetic(**values)
    check(spec, model_name)
    return spec


def number(model_name: str, name: str, text: str, wanted: type) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (wanted is int and not value.is_integer()):
        what = "a whole number" if wanted is int else "a number"
        raise wrong(model_name, f"{name}={text}: {what} is wanted.")
    return int(value) if wanted is int else value


def check(spec: Synthetic, model_name: str) -> None:
    """Ranges, and that no feature would have to fire in more than every row."""
    for name, at_least in (
        ("d_in", 1), ("features", 1), ("zipf", 0), ("hierarchy", 0), ("noise", 0), ("seed", 0),
    ):  # fmt: skip
        if getattr(spec, name) < at_least:
            raise wrong(model_name, f"{name}={getattr(spec, name):g}: at least {at_least}.")
    for name in ("spread", "correlation"):
        if not 0 <= getattr(spec, name) <= 1:
            raise wrong(model_name, f"{name}={getattr(spec, name):g}: between 0 and 1.")
    if spec.l0 <= 0:
        raise wrong(model_name, f"l0={spec.l0:g}: above 0.")
    if spec.features % (1 + spec.hierarchy):
        raise wrong(
            model_name,
            f"features={spec.features}: a multiple of {1 + spec.hierarchy}, since hierarchy="
            f"{spec.hierarchy} makes trees of a parent and {spec.hierarchy} children.",
        )
    most = spec.frequencies()[0]
    if most > 1:
        raise wrong(
            model_name,
            f"l0={spec.l0:g}: the most frequent feature would fire {most:.3g} times in every row; "
            f"at most l0={spec.l0 / most:.3g} here, or a lower zipf, or more features.",
        )


def wrong(model_name: str, remedy: str) -> ConfigError:
    return bad_value("model_name", model_name, remedy)


def completed(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given of a config, with the fields that are settled where the model is synthetic."""
    names = given.get("model_name")
    names = names if isinstance(names, (list, tuple)) else [names]
    settled = {"hook_point": HOOK_POINT, "dataset_path": TEXT}
    return {**(settled if names and all(map(is_synthetic, names)) else {}), **given}


# Of the language model and its text alone: they say nothing of known features.
MEANINGLESS = (
    "hook_point_layer",
    "is_dataset_tokenized",
    "dataset_split",
    "dataset_config",
    "dataset_revision",
    "streaming",
    "text_column",
    "txt_documents",
    "prepend_bos",
    "exclude_special_tokens",
    "context_slice",
    "trust_remote_code",
    "model_revision",
)


def check_synthetic(config: Any) -> None:
    """Refuses what makes no sense for a synthetic model, whose name is stored in full.

    Raises:
        ConfigError: with the field and what would be right.
    """
    if not is_synthetic(config.model_name):
        return
    # With every parameter, so that the SAE stays what it was should a default ever change.
    object.__setattr__(config, "model_name", str(parse(config.model_name)))
    for name, only in (("hook_point", HOOK_POINT), ("dataset_path", TEXT)):
        if getattr(config, name) != only:
            raise bad_value(
                name,
                getattr(config, name),
                f"model_name: {PREFIX}… has only {only!r}; leave it out.",
            )
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for name in MEANINGLESS:
        if getattr(config, name) != defaults[name]:
            raise bad_value(
                name,
                getattr(config, name),
                f"means nothing for model_name: {PREFIX}…, which reads no text; leave it out.",
            )
    if config.feature_sampling_method == "anthropic":
        raise bad_value(
            "feature_sampling_method",
            "anthropic",
            f"draws by the loss that rows cost a language model, and model_name: {PREFIX}… is "
            "none; l2 draws by their squared error.",
        )
    block = config.store_batch_size * config.context_size
    rows = max(config.stream_tokens or 0, config.training_tokens)
    rows += block + config.eval_windows * config.context_size
    if rows > MOST_ROWS:
        raise bad_value(
            "training_tokens",
            config.training_tokens,
            f"model_name: {PREFIX}… has at most {MOST_ROWS:,} rows, held-out ones included.",
        )
