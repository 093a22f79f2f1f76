"""Harvester: a language model in an actor. Stateless, so any of them can do any block again.

Whoever only creates the actor needs this module too, so torch and the model are imported where
they are used: in the harvester's own process.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from saeray.config import LanguageModelSAERunnerConfig
from saeray.shuffle import permutation

if TYPE_CHECKING:
    from saeray.evaluate import Evaluator
    from saeray.lm import LanguageModel, ModelFacts


class Harvested(NamedTuple):
    """What the buffer learns of a block: the block itself stays in the object store."""

    block: int
    n_tokens: int
    seconds: float


class Harvester:
    """Loads its model at the first call, so that a wrong hook is an answer and not a dead actor."""

    def __init__(self, config: dict[str, Any], hook_points: list[str]) -> None:
        self.config = LanguageModelSAERunnerConfig.from_dict(config)
        self.hook_points = hook_points
        self.model: LanguageModel | None = None
        self.evaluator: Evaluator | None = None
        # One thread each on the CPU: the sums inside a matrix product are then the same however
        # many harvesters or cores there are. More harvesters, not more threads.
        self.threads = 1

    def open(self) -> LanguageModel:
        if self.model is None:
            import torch

            from saeray.lm import LanguageModel

            torch.set_num_threads(self.threads)
            self.model = LanguageModel(self.config, self.hook_points)
        return self.model

    def check(self, configs: list[dict[str, Any]]) -> ModelFacts:
        """Facts of the model, after comparing each config's hook point and d_in with it.

        Raises:
            ConfigError: the model, a hook point or d_in is wrong.
        """
        from saeray.lm import check_d_in

        facts = self.open().facts
        for config in configs:
            check_d_in(LanguageModelSAERunnerConfig.from_dict(config), facts)
        return facts

    def harvest(self, index: int, tokens: np.ndarray) -> tuple[Any, ...]:
        """Block `index`: (Harvested, then one array [rows, d_in] per hook point).

        tokens: int32 [store_batch_size, context_size].
        """
        import torch

        from saeray.cluster.blocks import to_array

        started = time.perf_counter()
        activations = self.open().activations(torch.from_numpy(tokens.copy()))
        arrays = [to_array(activations[h]) for h in self.hook_points]
        return (Harvested(index, tokens.size, time.perf_counter() - started), *arrays)

    def initial_b_dec(self, method: str, n_rows: int, seed: int, *blocks: np.ndarray) -> np.ndarray:
        """b_dec [D] float32 from a seeded sample of `n_rows` of the rows in blocks."""
        import torch

        from saeray.cluster.blocks import to_tensor
        from saeray.sae.initial_bias import initial_b_dec

        dtype = getattr(torch, self.config.activation_dtype)
        rows = [to_tensor(b, dtype) for b in blocks]
        per_block = len(rows[0])
        chosen = permutation(per_block * len(rows), seed, 0, salt=4)[:n_rows]
        sample = torch.stack([rows[i // per_block][i % per_block] for i in chosen.tolist()])
        return initial_b_dec(sample, method).numpy()

    def evaluate(
        self, weights: dict[str, np.ndarray], hook_point: str, held_out: np.ndarray
    ) -> dict[str, Any]:
        """Metrics of one SAE on the held-out windows, by wandb key."""
        import torch

        from saeray.checkpoint import sae_from_weights
        from saeray.evaluate import Evaluator

        model = self.open()
        if self.evaluator is None:
            self.evaluator = Evaluator(model, torch.from_numpy(held_out.copy()))
        sae = sae_from_weights({k: torch.from_numpy(v.copy()) for k, v in weights.items()})
        return self.evaluator.evaluate(sae.to(model.device), hook_point)
