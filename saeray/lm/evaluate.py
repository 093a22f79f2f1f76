"""Evaluation of SAEs on held-out windows: reconstruction, sparsity, and the loss it costs the LM.

Definitions (per token of every held-out window, the first token of a window not predicted):

    ce_loss_without_sae    next-token cross-entropy of the model as it is, nats
    ce_loss_with_sae       the same with x̂ in the place of x at the hook
    ce_loss_with_ablation  the same with zeros in its place
    CE_loss_score          (ablation - with) / (ablation - without): 1 is perfect, 0 is no better
                           than zeros
    kl_div_with_sae        KL(model as it is ‖ with SAE), nats
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saeray.lm.model import LanguageModel
from saeray.sae.architectures.base import SAE
from saeray.sae.metrics import (
    Reconstruction,
    ReconstructionSums,
    density_histogram,
    log10_frequency,
)

LOGITS_AT_ONCE = 1 << 20  # elements: 4 MB in float32, so it stays in cache
CHANCE_SHARE = 0.9  # of a uniform guess's cross-entropy, above which a model knows nothing
NO_EFFECT = 1e-6  # nats between two losses that rounding alone may put there


class Ablated(NamedTuple):
    """What evaluating any SAE at a hook point compares it with."""

    ce: float  # mean next-token cross-entropy with zeros at the hook, nats
    mean: Tensor  # [D] of the hook's activations


class Evaluator:
    """Evaluates SAEs of one model on one set of windows; what no SAE changes is computed once.

    Everything else is a sum over parts of the windows: memory does not grow with their number.
    """

    def __init__(self, model: LanguageModel, windows: Tensor) -> None:
        """windows: int [n, context]."""
        self.model = model
        per_window = windows.shape[1] * model.facts.d_vocab
        self.parts = windows.split(max(1, LOGITS_AT_ONCE // per_window))
        self.clean_ce: float | None = None
        self.at_hooks: dict[tuple[str, torch.dtype], Ablated] = {}

    def evaluate(self, sae: SAE, hook_point: str) -> dict[str, Any]:
        """Metrics by their wandb keys, and the density histogram, of one SAE.

        A figure that has no meaning here is None, and `warnings` says why.
        """
        clean, ablated = self.clean(), self.ablated(hook_point, sae.W_enc.dtype)
        ce, kl, n_tokens, n_predicted = 0.0, 0.0, 0, 0
        fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_enc.device)
        sums = ReconstructionSums(ablated.mean)

        def splice(x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1]).to(sae.W_enc.dtype)
            f = sae.encode(flat)
            x_hat = sae.decode(f)
            fired.add_((f > 0).sum(dim=0))
            sums.add(flat.float(), (x_hat - flat).float())
            return x_hat.reshape(x.shape)

        for tokens in self.parts:
            spliced = self.model.logits(tokens, {hook_point: splice})[:, :-1].log_softmax(dim=-1)
            plain = self.model.logits(tokens)[:, :-1].log_softmax(dim=-1)
            ce += total(next_token_losses(spliced, tokens))
            kl += total(kl_divergence(plain, spliced))
            n_predicted += tokens[:, 1:].numel()
            n_tokens += tokens.numel()
        quality = sums.result()
        frequency = fired.cpu().double() / n_tokens
        counts, edges = density_histogram(frequency)
        with_sae = ce / n_predicted
        score = ce_loss_score(clean, with_sae, ablated.ce)
        return {
            **quality.metrics(),
            "metrics/l0": int(fired.sum()) / n_tokens,
            "metrics/mean_log10_feature_sparsity": float(log10_frequency(frequency).mean()),
            "metrics/ce_loss_without_sae": clean,
            "metrics/ce_loss_with_sae": with_sae,
            "metrics/ce_loss_with_ablation": ablated.ce,
            "metrics/CE_loss_score": score,
            "metrics/kl_div_with_sae": kl / n_predicted,
            "eval/n_tokens": n_tokens,
            "eval/features_never_fired": int((fired == 0).sum()),
            "plots/feature_density_line_chart": {"counts": counts, "edges": edges},
            "warnings": [*self.warnings(), *self.reservations(hook_point, score, quality)],
        }

    def warnings(self) -> list[str]:
        """Of a model that does no better on this text than one that knows nothing."""
        chance = math.log(self.model.facts.d_vocab)
        if self.clean() <= CHANCE_SHARE * chance:
            return []
        return [
            f"{self.model.config.model_name} predicts the held-out text hardly better than chance: "
            f"a cross-entropy of {self.clean():.2f} nats, where chance is {chance:.2f}. Were its "
            "token ids made with this model's tokenizer, and are these its weights?"
        ]

    def reservations(
        self, hook_point: str, score: float | None, quality: Reconstruction
    ) -> list[str]:
        """Which figures this hook point has none of, and why: the same for all its SAEs."""
        said = []
        if score is None:
            said.append(
                f"{hook_point}: the model's loss is the same with zeros in its place, so it has "
                "no CE loss score. Does it reach the logits?"
            )
        if quality.explained_variance is None:
            said.append(
                f"{hook_point}: all held-out activations are equal, so there is no variance to "
                "explain."
            )
        return said

    def clean(self) -> float:
        if self.clean_ce is None:
            self.clean_ce = mean_loss(self.model, self.parts, {})
        return self.clean_ce

    def ablated(self, hook_point: str, dtype: torch.dtype) -> Ablated:
        """One pass with zeros at the hook; dtype: of the SAEs, which see activations in it."""
        if (hook_point, dtype) not in self.at_hooks:
            summed: Any = 0.0
            n_rows = 0

            def zeros(x: Tensor) -> Tensor:
                nonlocal summed, n_rows
                flat = x.reshape(-1, x.shape[-1]).to(dtype).float()
                summed = summed + flat.sum(dim=0).cpu().double()
                n_rows += len(flat)
                return torch.zeros_like(x)

            ce = mean_loss(self.model, self.parts, {hook_point: zeros})
            mean = (summed / n_rows).float().to(self.model.device)
            self.at_hooks[hook_point, dtype] = Ablated(ce, mean)
        return self.at_hooks[hook_point, dtype]


def ce_loss_score(clean: float, with_sae: float, ablated: float) -> float | None:
    """(ablated - with) / (ablated - clean), as the module defines it; None: nothing to divide by.

    Where a hook does not reach the logits, zeros in its place change nothing.
    """
    if abs(ablated - clean) <= NO_EFFECT:
        return None
    return (ablated - with_sae) / (ablated - clean)


def total(values: Tensor) -> float:
    """Their sum, in float64 on the CPU: not every device has it."""
    return float(values.cpu().double().sum())


def next_token_losses(log_p: Tensor, tokens: Tensor) -> Tensor:
    """log_p [n, context - 1, V], tokens [n, context] -> cross-entropy [n, context - 1], nats."""
    target = tokens[:, 1:].to(log_p.device, torch.int64)
    return -log_p.gather(2, target.unsqueeze(2)).squeeze(2)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) [n, context - 1] of next-token log-probabilities [n, context - 1, V], nats."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def mean_loss(model: LanguageModel, parts: Iterable[Tensor], splice: Mapping[str, Any]) -> float:
    """Mean next-token cross-entropy with `splice` in force, nats."""
    summed, n = 0.0, 0
    for tokens in parts:
        log_p = model.logits(tokens, splice)[:, :-1].log_softmax(dim=-1)
        losses = next_token_losses(log_p, tokens)
        summed, n = summed + total(losses), n + losses.numel()
    return summed / n
