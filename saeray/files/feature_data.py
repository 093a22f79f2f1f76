"""What is known of an SAE's features after a pass over text: plain arrays, read by numpy alone.

    <sweep>/features/<SAE>/
      tokens.safetensors      tokens [windows, context]: the text that was read
      features.safetensors    arrays by feature, see `FeatureData`
      about.json              what of, texts of tokens; written last

Contexts are kept sparsely: of each its window, the position and value of its peak, and the other
tokens on which the feature is active, as shares of the peak. Neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load, save

from saeray.errors import ConfigError
from saeray.files import strict_json
from saeray.files.storage import Folder

PLACE = "features"  # in a sweep's folder
ABOUT, TOKENS, FEATURES = "about.json", "tokens.safetensors", "features.safetensors"
FULL = 32767  # the share of a context's peak itself
DENSE = 0.1  # a feature that fires on a larger share of the tokens is dense

Array = np.ndarray[Any, Any]


class Context(NamedTuple):
    """One context of one feature."""

    window: int  # its number in `tokens`
    position: int  # of the peak
    peak: float
    positions: Array  # int, of the tokens on which the feature is active
    values: Array  # float32, there


class Band(NamedTuple):
    """A band of activation below the top, with a sample of the contexts whose peak is in it."""

    low: float
    high: float
    tokens: int  # on which the activation is in the band
    contexts: list[Context]


class Effect(NamedTuple):
    """What a feature adds to the logit of a token."""

    token: int
    logit: float


@dataclass
class FeatureData:
    """Of one SAE.

    arrays, by name (L features, T tokens of a logit list, S = n_top + n_bands * per_band places):
        histogram [L, bins], bin_width [L], largest [L]
        band_edges [L, n_bands + 1], band_tokens [L, n_bands], the highest band first
        window, position, peak [L, S]; -1 where there is no context
        offsets [L * S + 1] into active_position, active_share: the active tokens of each place
        neighbour, cosine [L, n]
        decoder_norm [L]
        and, where the hook point is in the residual stream: top_token, top_logit, bottom_token,
        bottom_logit [L, T], logit_histogram [L, bins], logit_range [L, 2]
    """

    about: dict[str, Any]
    arrays: dict[str, Array]
    tokens: Array  # int32 [windows, context]

    def __len__(self) -> int:
        return len(self.arrays["largest"])

    @property
    def n_tokens(self) -> int:
        """That the SAE has seen."""
        return int(self.about["n_tokens"])

    @property
    def fired(self) -> Array:
        """Tokens on which each fired: int64 [L]."""
        return self.arrays["histogram"].sum(axis=1)

    @property
    def density(self) -> Array:
        """Share of the tokens: float64 [L]."""
        return self.fired / self.n_tokens

    @property
    def has_logits(self) -> bool:
        return "top_token" in self.arrays

    def text(self, token: int) -> str:
        """What a token stands for."""
        return str(self.about["texts"].get(str(token), f"<{token}>"))

    def context(self, feature: int, place: int) -> Context | None:
        a = self.arrays
        if a["window"][feature, place] < 0:
            return None
        at = feature * a["window"].shape[1] + place
        active = slice(int(a["offsets"][at]), int(a["offsets"][at + 1]))
        peak = a["peak"][feature, place]
        return Context(
            int(a["window"][feature, place]),
            int(a["position"][feature, place]),
            float(peak),
            a["active_position"][active].astype(np.int64),
            a["active_share"][active].astype(np.float32) * (peak / np.float32(FULL)),
        )

    def contexts(self, feature: int, places: range) -> list[Context]:
        return [c for place in places if (c := self.context(feature, place)) is not None]

    def top(self, feature: int) -> list[Context]:
        """The contexts with the largest peaks, the largest first."""
        return self.contexts(feature, range(self.about["top"]))

    def bands(self, feature: int) -> list[Band]:
        """Below the top; the highest first."""
        a, first, size = self.arrays, self.about["top"], self.about["per_band"]
        edges = a["band_edges"][feature]
        found = []
        for i, tokens in enumerate(a["band_tokens"][feature]):
            at, high = first + i * size, len(edges) - 1 - i
            found.append(
                Band(
                    float(edges[high - 1]),
                    float(edges[high]),
                    int(tokens),
                    self.contexts(feature, range(at, at + size)),
                )
            )
        return found

    def effects(self, feature: int, which: str) -> list[Effect]:
        """which: `top` or `bottom`. None where the hook point does not reach the logits so."""
        if not self.has_logits:
            return []
        tokens, logits = (self.arrays[f"{which}_{of}"][feature] for of in ("token", "logit"))
        return [Effect(int(t), float(v)) for t, v in zip(tokens, logits, strict=True)]

    def neighbours(self, feature: int) -> list[tuple[int, float]]:
        """(feature, cosine between the decoder rows), the nearest first."""
        pairs = zip(self.arrays["neighbour"][feature], self.arrays["cosine"][feature], strict=True)
        return [(int(j), float(c)) for j, c in pairs if j >= 0]

    def used_windows(self) -> Array:
        """The windows that any context is of, in order."""
        windows = np.unique(self.arrays["window"])
        return windows[windows >= 0]


def used_tokens(tokens: Array, arrays: Mapping[str, Array]) -> Array:
    """The ids of which a page needs the texts, in order."""
    windows = np.unique(arrays["window"])
    ids = [tokens[windows[windows >= 0]]]
    ids += [arrays[name] for name in ("top_token", "bottom_token") if name in arrays]
    return np.unique(np.concatenate([part.ravel().astype(np.int64) for part in ids]))


def write(folder: Folder, data: FeatureData) -> None:
    """The folder of one SAE, in the place of what was there; about.json last."""
    folder.delete()
    folder.write(TOKENS, save({"tokens": np.ascontiguousarray(data.tokens)}))
    folder.write(FEATURES, save({n: np.ascontiguousarray(a) for n, a in data.arrays.items()}))
    folder.write(ABOUT, (strict_json.dumps(data.about, ensure_ascii=True) + "\n").encode())


def read_about(folder: Folder) -> dict[str, Any] | None:
    """about.json of an SAE's folder; None where its pass has not ended."""
    try:
        found = strict_json.loads(folder.read(ABOUT))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read(folder: Folder) -> FeatureData:
    """What `write` wrote.

    Raises:
        ConfigError: nothing is there, or not all of it.
    """
    about = read_about(folder)
    if about is None:
        raise ConfigError(f"{folder.uri}: no features are there; `saeray features` makes them.")
    try:
        tokens = load(folder.read(TOKENS))["tokens"]
        return FeatureData(about, load(folder.read(FEATURES)), tokens)
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{folder.uri}: damaged ({error}).") from None


def folders(sweep: Folder) -> Iterator[tuple[str, Folder]]:
    """(SAE, its folder) of every one whose features are there."""
    place = sweep / PLACE
    for name in place.names():
        if not name.startswith(".") and read_about(place / name) is not None:
            yield name, place / name
