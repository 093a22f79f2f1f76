"""Harvester: a language model in an actor. Stateless, so any of them can do any block again.

Whoever only creates the actor needs this module too, so torch and the model are imported where
they are used: in the harvester's own process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from saeray.actors.gauges import Meter
from saeray.actors.names import own_name, tags_of
from saeray.actors.nodes import own_node
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import CacheKey, ModelFacts, RowsFor, Snapshot
from saeray.spec.order import permutation
from saeray.spec.stream import row_values

if TYPE_CHECKING:
    from torch import Tensor

    from saeray.files.cache import ActivationCache
    from saeray.lm.evaluate import Evaluator
    from saeray.lm.evaluate_synthetic import GroundTruthEvaluator
    from saeray.lm.model import LanguageModel
    from saeray.lm.synthetic import SyntheticModel
    from saeray.sae.architectures.base import SAE
    from saeray.text.served import ServedRows


class Harvested(NamedTuple):
    """What the buffer learns of a block: the block itself stays in the object store."""

    block: int
    n_tokens: int  # computed
    seconds: float
    cached_tokens: int = 0  # read from the activation cache
    warnings: tuple[str, ...] = ()


CACHE_WRITES = 2  # blocks that may wait to be written to the cache; then harvesting waits


class Harvester:
    """Loads its model at the first call, so that a wrong hook is an answer and not a dead actor."""

    def __init__(
        self,
        config: dict[str, Any],
        hook_points: list[str],
        environment: dict[str, str] | None = None,
    ) -> None:
        os.environ.update(environment or {})
        self.config = LanguageModelSAERunnerConfig.from_dict(config)
        self.hook_points = hook_points
        self.model: LanguageModel | SyntheticModel | None = None
        self.served: ServedRows | None = None  # rows; None: all of them
        self.evaluator: Evaluator | GroundTruthEvaluator | None = None
        # One thread each on the CPU: the sums inside a matrix product are then the same however
        # many harvesters or cores there are. More harvesters, not more threads.
        self.threads = 1
        self.caches: dict[str, ActivationCache] = {}
        self.writer = ThreadPoolExecutor(1, "cache")
        self.writes: list[Future[None]] = []
        self.meter = Meter(**tags_of(own_name()))

    def open(self) -> LanguageModel | SyntheticModel:
        if self.model is None:
            import torch

            from saeray.stream.check import open_model

            torch.set_num_threads(self.threads)
            self.model = open_model(self.config, self.hook_points)
            self.served = served_rows(self.config)
        return self.model

    def check(self, configs: list[dict[str, Any]]) -> ModelFacts:
        """Facts of the model, after comparing each config's hook point and d_in with it.

        Raises:
            ConfigError: the model, a hook point or d_in is wrong.
        """
        from saeray.stream.check import check_config

        facts = self.open().facts
        for config in configs:
            check_config(LanguageModelSAERunnerConfig.from_dict(config), facts)
        return facts

    def check_others(self, streams: list[list[dict[str, Any]]]) -> list[ModelFacts]:
        """`check` of streams that others will serve, before this harvester loads its own model.

        Raises:
            ConfigError: as `check`.
        """
        from saeray.stream.check import check_models

        read = LanguageModelSAERunnerConfig.from_dict
        return check_models([[read(c) for c in configs] for configs in streams])

    def fingerprints(self) -> tuple[str, str]:
        """See `LanguageModel.fingerprints`."""
        return self.open().fingerprints()

    def node(self) -> str:
        """The id of the node it runs on."""
        return own_node()

    def harvest(
        self, index: int, tokens: np.ndarray, cache_key: CacheKey | None = None
    ) -> tuple[Any, ...]:
        """Block `index`: (Harvested, then one array [rows, d_in] per hook point).

        tokens: int32 [n, context_size].
        """
        started = time.perf_counter()
        cache = None if cache_key is None else self.open_cache(cache_key)
        arrays = None if cache is None else cache.read(self.hook_points, index, tokens)
        n_cached = tokens.size if arrays is not None else 0
        if arrays is None:
            arrays = self.computed(tokens)
            if cache is not None:
                self.write_behind(cache, index, tokens, arrays)
        done = Harvested(
            index,
            tokens.size - n_cached,
            time.perf_counter() - started,
            n_cached,
            () if cache is None else tuple(cache.warnings),
        )
        self.meter.add(
            saeray_harvester_tokens=done.n_tokens,
            saeray_harvester_blocks=1,
            saeray_harvester_busy_seconds=done.seconds,
        )
        return (done, *arrays)

    def computed(self, tokens: np.ndarray) -> list[np.ndarray]:
        """The activations of int32 [n, context_size] that are served, at every hook point."""
        import torch

        from saeray.stream.arrays import to_array

        model = self.open()
        if self.served is None:
            activations = model.activations(torch.from_numpy(tokens.copy()))
            return [to_array(activations[h]) for h in self.hook_points]
        rows = torch.from_numpy(self.served.of_block(tokens))
        parts, first = [], 0
        # Of one size, as far as can be, and none larger than what memory is planned for.
        for some in np.array_split(tokens, -(-len(tokens) // self.config.store_batch_size)):
            here = rows[(rows >= first) & (rows < first + some.size)] - first
            activations = model.activations(torch.from_numpy(some.copy()))
            at = here.to(model.device)
            parts.append([activations[h][at] for h in self.hook_points])
            first += some.size
        return [to_array(torch.cat(of_hook)) for of_hook in zip(*parts, strict=True)]

    def open_cache(self, key: CacheKey) -> ActivationCache:
        if key.uri not in self.caches:
            from saeray.files.cache import ActivationCache

            self.caches[key.uri] = ActivationCache(key.uri, key.identity, key.earlier)
        return self.caches[key.uri]

    def write_behind(
        self, cache: ActivationCache, index: int, tokens: np.ndarray, arrays: list[np.ndarray]
    ) -> None:
        """Writes to the cache while the next block is computed; a full disk costs a warning."""

        def write() -> None:
            try:
                for hook, array in zip(self.hook_points, arrays, strict=True):
                    cache.write(hook, index, tokens, array)
            except OSError as error:
                text = f"activation_cache: {error}; blocks are not cached."
                if text not in cache.warnings:
                    cache.warnings.append(text)

        self.flush(CACHE_WRITES - 1)
        self.writes.append(self.writer.submit(write))

    def flush(self, left: int = 0) -> None:
        """Waits until no more than `left` blocks are still to be written to the cache."""
        while len(self.writes) > left:
            self.writes.pop(0).result()

    def statistic(self, name: str, n_rows: int, seed: int, *blocks: np.ndarray) -> np.ndarray:
        """float32, `statistic_of` a seeded sample of `n_rows` of the rows in blocks."""
        import torch

        from saeray.sae.sample_statistics import statistic_of
        from saeray.stream.arrays import to_tensor

        dtype = getattr(torch, self.config.activation_dtype)
        rows = [to_tensor(b, dtype) for b in blocks]
        per_block = len(rows[0])
        chosen = permutation(per_block * len(rows), seed, 0, salt=4)[:n_rows]
        sample = torch.stack([rows[i // per_block][i % per_block] for i in chosen.tolist()])
        return statistic_of(sample, name).numpy()

    def rows_for_dead(
        self, block: int, tokens: np.ndarray, saes: Sequence[RowsFor], *snapshots: Snapshot
    ) -> tuple[int, list[tuple[np.ndarray, np.ndarray]]]:
        """(tokens that were run, for each SAE rows [n, d_in] float32 and weights [n] float64).

        A row of each context of LM batch `block`: see `saeray.lm.rows_for_dead`. tokens: int32
        [store_batch_size, context_size].
        """
        import torch

        from saeray.lm.rows_for_dead import rows_for_dead

        model = self.open()
        found = [
            (picked.rows.numpy(), picked.weights.numpy())
            for picked in rows_for_dead(
                model,
                torch.from_numpy(tokens.copy()),
                block,
                list(zip(saes, self.published(snapshots), strict=True)),
                None if self.served is None else torch.from_numpy(self.served.mask(tokens)),
            )
        ]
        return tokens.size, found

    def published(self, snapshots: Sequence[Snapshot]) -> list[SAE]:
        """The SAEs, where the model is."""
        import torch

        from saeray.sae.architectures import published_sae

        saes = []
        for snapshot in snapshots:
            tensors = {k: torch.from_numpy(v.copy()) for k, v in snapshot.tensors.items()}
            saes.append(published_sae(snapshot.cfg, tensors).to(self.open().device))
        return saes

    def evaluate(
        self, hooks: Sequence[str], held_out: np.ndarray, final: bool, *snapshots: Snapshot
    ) -> list[dict[str, Any]]:
        """Metrics of SAEs on the held-out windows, by wandb key; `warnings` beside them.

        hooks: what they read and, of transcoders, what they reconstruct.
        final: `features` too, the bytes of a features.parquet.
        """
        import torch

        from saeray.files.features import as_parquet

        model = self.open()
        if self.evaluator is None:
            served = None if self.served is None else torch.from_numpy(self.served.mask(held_out))
            self.evaluator = evaluator_of(model, torch.from_numpy(held_out.copy()), served)
        found = self.evaluator.evaluate_all(self.published(snapshots), hooks, final)
        for of in found:
            if "features" in of:
                of["features"] = as_parquet({k: v.numpy() for k, v in of["features"].items()})
        return found


def served_rows(config: LanguageModelSAERunnerConfig) -> ServedRows | None:
    """As the stream's token server has it."""
    from saeray.lm.hub import load_tokenizer
    from saeray.text.served import ServedRows, excluded_ids

    if not row_values(config):
        return None
    excluded = excluded_ids(config, load_tokenizer(config)) if config.exclude_special_tokens else ()
    return ServedRows(config, excluded)


def evaluator_of(
    model: LanguageModel | SyntheticModel, windows: Tensor, served: Tensor | None = None
) -> Evaluator | GroundTruthEvaluator:
    """What evaluates SAEs of a model on held-out windows, int [n, context].

    served: bool [n, context], the rows that SAEs see; None: all of them.
    """
    from saeray.lm.synthetic import SyntheticModel

    if isinstance(model, SyntheticModel):
        from saeray.lm.evaluate_synthetic import GroundTruthEvaluator

        return GroundTruthEvaluator(model, windows)
    from saeray.lm.evaluate import Evaluator

    return Evaluator(model, windows, served)
