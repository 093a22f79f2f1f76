"""Known features in the place of a language model: its "tokens" are row numbers.

A row is x = Σ_j a_j d_j + noise over the features that fire in it, d_j fixed unit vectors in random
directions of d_in dimensions. Which fire, and how strongly, is a pure function of the parameters
(`saeray.spec.synthetic`), data_seed and the row's number: every random word comes from a counter
(splitmix64: Steele, Lea and Flood 2014), whoever asks for it and whatever else they ask for.

    frequency      tree t (a feature, or a parent with its children) fires with probability p_t
    correlation c  with probability √c a tree takes its group's number instead of its own to decide
                   by, so two of a group with the same p correlate by c, and every p stays as it is
    hierarchy      where a parent fires, so does one of its children, or none (half of the time)
    magnitude      uniform between 1 - spread and 1 + spread
    noise          a scaled sum of four uniform numbers per coordinate, nearly Gaussian

Rows are made on the CPU, and each by the same operations on its own numbers only, so how many are
asked for at a time changes no bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeray.lm.load import choose_device
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import ModelFacts
from saeray.spec.synthetic import CHILDLESS, MOST_ROWS, Synthetic, parse

GROUP = 8  # trees, neighbours in rank, that correlate
AT_ONCE = 1 << 17  # random words, so that they stay in cache
VERSION = 1  # of how rows are made: part of the activation cache's identity


class Entries(NamedTuple):
    """What fires, by row and within a row by feature: one array element each."""

    row: np.ndarray  # int64, counted from the first row asked for
    feature: np.ndarray  # int64
    magnitude: np.ndarray  # float32


class KnownFeatures:
    """The dictionary, and what fires in each row."""

    def __init__(self, spec: Synthetic, data_seed: int) -> None:
        self.spec = spec
        directions = np.random.Generator(np.random.Philox(spec.seed)).standard_normal(
            (spec.features, spec.d_in)
        )
        norms = np.sqrt(np.square(directions).sum(axis=1, keepdims=True))
        self.dictionary = (directions / norms).astype(np.float32)  # [features, d_in]
        frequencies = np.array(spec.frequencies()[: spec.trees])
        # A tree fires where its 32-bit number is below this.
        self.threshold = np.minimum(np.rint(frequencies * 2**32), 2**32 - 1).astype(np.uint32)
        self.group = np.arange(spec.trees) // GROUP
        self.keys = {
            what: key_of(f"{what} {spec.seed} {data_seed}")
            for what in ("tree", "group", "together", "child", "magnitude", "noise")
        }

    def entries(self, rows: np.ndarray) -> Entries:
        """What fires in rows of these numbers, int [n]."""
        n_at_once = max(1, AT_ONCE // self.spec.trees)
        row, tree = [], []
        for first in range(0, len(rows), n_at_once):
            at, which = np.nonzero(self.firing_trees(rows[first : first + n_at_once]))
            row.append(at + first)
            tree.append(which)
        return self.with_children(rows, np.concatenate(row), np.concatenate(tree))

    def firing_trees(self, rows: np.ndarray) -> np.ndarray:
        """bool [n, trees]."""
        n_trees = self.spec.trees
        own = self.table("tree", rows, n_trees)
        if self.spec.correlation:
            groups = self.table("group", rows, int(self.group[-1]) + 1)[:, self.group]
            coin = self.table("together", rows, n_trees)
            # At 1 all but one in 2 ** 32.
            share = min(round(math.sqrt(self.spec.correlation) * 2**32), 2**32 - 1)
            own = np.where(coin < np.uint32(share), groups, own)
        return own < self.threshold

    def with_children(self, rows: np.ndarray, row: np.ndarray, tree: np.ndarray) -> Entries:
        """The entries of trees that fire, their children's among them."""
        spec, feature = self.spec, tree
        number = rows.astype(np.uint64)
        if spec.hierarchy:
            word = self.words("child", number[row] * np.uint64(spec.trees) + tree.astype(np.uint64))
            places = round(spec.hierarchy / (1 - CHILDLESS))
            child = ((word >> np.uint64(32)) * np.uint64(places) >> np.uint64(32)).astype(np.int64)
            has = child < spec.hierarchy
            children = spec.trees + tree[has] * spec.hierarchy + child[has]
            row, feature = np.concatenate([row, row[has]]), np.concatenate([tree, children])
            order = np.argsort(row, kind="stable")
            row, feature = row[order], feature[order]
        counter = number[row] * np.uint64(spec.features) + feature.astype(np.uint64)
        uniform = (self.words("magnitude", counter) >> np.uint64(40)).astype(np.float32) / 2**24
        magnitude = np.float32(1 - spec.spread) + np.float32(2 * spec.spread) * uniform
        return Entries(row, feature, magnitude)

    def rows(self, rows: np.ndarray, entries: Entries | None = None) -> np.ndarray:
        """Activations float32 [n, d_in] of rows of these numbers, int [n]."""
        entries = self.entries(rows) if entries is None else entries
        x = self.noise(rows)
        # The first feature of every row, then the second: no sum depends on who else is there.
        counts = np.bincount(entries.row, minlength=len(rows))
        place = np.arange(len(entries.row)) - (np.cumsum(counts) - counts)[entries.row]
        for k in range(int(counts.max(initial=0))):
            of = np.flatnonzero(place == k)
            part = entries.magnitude[of, None] * self.dictionary[entries.feature[of]]
            x[entries.row[of]] += part
        return x

    def magnitudes(self, n_rows: int, entries: Entries) -> np.ndarray:
        """float32 [n_rows, features], 0 where a feature does not fire."""
        dense = np.zeros((n_rows, self.spec.features), dtype=np.float32)
        dense[entries.row, entries.feature] = entries.magnitude
        return dense

    def noise(self, rows: np.ndarray) -> np.ndarray:
        d_in, deviation = self.spec.d_in, self.spec.noise
        if not deviation:
            return np.zeros((len(rows), d_in), dtype=np.float32)
        counter = rows.astype(np.uint64)[:, None] * np.uint64(d_in) + np.arange(d_in, dtype="u8")
        four = self.words("noise", counter).view(np.uint16).reshape(len(rows), d_in, 4)
        summed = four.sum(axis=2, dtype=np.int64) - 2 * (2**16 - 1)
        return summed.astype(np.float32) * np.float32(deviation * math.sqrt(3) / 2**16)

    # --- random numbers -----------------------------------------------------------------------

    def table(self, what: str, rows: np.ndarray, width: int) -> np.ndarray:
        """uint32 [n, width]: the numbers of each row, two to a word."""
        per_row = -(-width // 2)
        counter = rows.astype(np.uint64)[:, None] * np.uint64(per_row)
        return self.words(what, counter + np.arange(per_row, dtype="u8")).view("u4")[:, :width]

    def words(self, what: str, counter: np.ndarray) -> np.ndarray:
        """uint64, the counter-th word of what; see the module's source."""
        z = counter * np.uint64(0x9E3779B97F4A7C15) + self.keys[what]
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        return z


def key_of(text: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


class SyntheticModel:
    """What a `LanguageModel` is to a harvester."""

    def __init__(self, config: LanguageModelSAERunnerConfig, hook_points: Sequence[str]) -> None:
        assert config.data_seed is not None
        self.config = config
        self.hook_points = list(hook_points)
        self.device = choose_device(config.device)  # where SAEs are evaluated
        self.dtype = getattr(torch, config.activation_dtype)
        self.known = KnownFeatures(parse(config.model_name), config.data_seed)
        self.facts = ModelFacts(
            dict.fromkeys(self.hook_points, self.known.spec.d_in),
            MOST_ROWS,
            True,
            self.device.type,
            self.known.dictionary.nbytes,
        )

    def activations(self, tokens: Tensor) -> dict[str, Tensor]:
        """Row numbers [n, context] of int -> {hook point: [n * context, d_in]}, on the CPU."""
        x = torch.from_numpy(self.known.rows(tokens.reshape(-1).numpy())).to(self.dtype)
        return dict.fromkeys(self.hook_points, x)

    def fingerprints(self) -> tuple[str, str]:
        """See `LanguageModel.fingerprints`; data_seed and the name are in the identity anyway."""
        seen = hashlib.sha256(self.known.dictionary.tobytes()).hexdigest()[:32]
        return f"synthetic {VERSION}:{seen}", f"synthetic {VERSION}:{seen}"
