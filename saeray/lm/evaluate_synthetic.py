"""Evaluation where the features are known: reconstruction and sparsity as elsewhere, and how much
of the dictionary was found (`saeray.sae.ground_truth`), on rows that no SAE was trained on.

There is no language model here, so there is no CE loss and no KL divergence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saeray.lm.evaluate import PROJECTED_ROWS, OneSAE
from saeray.lm.synthetic import SyntheticModel
from saeray.sae.architectures.base import SAE
from saeray.sae.ground_truth import RecoverySums
from saeray.sae.metrics import DescriptionLength, density_histogram

AT_ONCE = 1 << 22  # numbers: latents and features of the rows that are evaluated at a time


class Part(NamedTuple):
    """Some of the held-out rows."""

    x: Tensor  # [n, D]
    truth: Tensor  # [n, F] magnitudes, 0 where a feature does not fire


class GroundTruthEvaluator:
    """Evaluates SAEs on one set of held-out rows; memory does not grow with their number."""

    def __init__(self, model: SyntheticModel, windows: Tensor) -> None:
        """windows: row numbers, int [n, context]."""
        self.model = model
        self.rows = windows.reshape(-1)
        self.mean: Tensor | None = None  # [D] of the held-out rows, float32

    def parts(self, width: int) -> Iterator[Part]:
        """width: latents and features of a row."""
        known, device = self.model.known, self.model.device
        for rows in self.rows.split(max(1, AT_ONCE // width)):
            entries = known.entries(rows.numpy())
            x = torch.from_numpy(known.rows(rows.numpy(), entries)).to(self.model.dtype)
            truth = torch.from_numpy(known.magnitudes(len(rows), entries))
            yield Part(x.to(device), truth.to(device))

    def mean_row(self, width: int) -> Tensor:
        if self.mean is None:
            sums = [part.x.cpu().double().sum(dim=0) for part in self.parts(width)]
            mean = torch.stack(sums).sum(dim=0) / len(self.rows)
            self.mean = mean.float().to(self.model.device)
        return self.mean

    def evaluate_all(
        self, saes: Sequence[SAE], hooks: Sequence[str], final: bool = False
    ) -> list[dict[str, Any]]:
        """`evaluate` of each; hooks: the only one there is."""
        return [self.evaluate(sae, hooks[0], final) for sae in saes]

    @torch.inference_mode()
    def evaluate(self, sae: SAE, hook_point: str, final: bool = False) -> dict[str, Any]:
        """Metrics by their wandb keys, and the density histogram, of one SAE.

        final: also s_n_dec and mdl, and `features`, as of a language model's SAE.
        """
        width = sae.d_sae + self.model.known.spec.features
        one = OneSAE(sae, self.mean_row(width))
        recovery = RecoverySums(sae.W_dec, torch.from_numpy(self.model.known.dictionary))
        n_true = 0
        for part in self.parts(width):
            one(part.x)
            recovery.add(sae.encode(part.x), part.truth)
            n_true += int((part.truth > 0).sum())
        counts, edges = density_histogram(one.features.frequency)
        return {
            **one.sums.result().metrics(),
            **one.features.metrics(),
            **recovery.result().metrics(),
            "ground_truth/l0": n_true / len(self.rows),
            "eval/n_tokens": len(self.rows),
            "plots/feature_density_line_chart": {"counts": counts, "edges": edges},
            "warnings": [],
            **(self.at_the_end(one, width) if final else {}),
        }

    def at_the_end(self, one: OneSAE, width: int) -> dict[str, Any]:
        """What takes a second pass: the bins of mdl are made of the largest activations."""
        length = DescriptionLength(one.features)
        sample: list[Tensor] = []
        for part in self.parts(width):
            length.add(one.sae.encode(part.x))
            left = PROJECTED_ROWS - sum(map(len, sample))
            sample.append(part.x[:left].clone())  # rows are independent: the first do
        rows = torch.cat(sample)
        return one.at_the_end(length, rows, rows)
