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
from typing import Any

import torch
from torch import Tensor

from saeray.lm.model import LanguageModel
from saeray.sae.metrics import density_histogram, log10_frequency, reconstruction
from saeray.sae.standard import StandardSAE

CHANCE_SHARE = 0.9  # of a uniform guess's cross-entropy, above which a model knows nothing
LOGITS_AT_ONCE = 1 << 20  # elements: 4 MB in float32, so it stays in cache


class Evaluator:
    """Evaluates SAEs of one model on one set of windows; what no SAE changes is computed once."""

    def __init__(self, model: LanguageModel, windows: Tensor) -> None:
        """windows: int [n, context]."""
        self.model = model
        per_window = windows.shape[1] * model.facts.d_vocab
        self.parts = windows.split(max(1, LOGITS_AT_ONCE // per_window))
        self.clean_ce: float | None = None
        self.ablated_ce: dict[str, float] = {}

    def evaluate(self, sae: StandardSAE, hook_point: str) -> dict[str, Any]:
        """Metrics by their wandb keys, and the density histogram, of one SAE."""
        clean, ablated = self.clean(), self.ablated(hook_point)
        total = {"ce": 0.0, "kl": 0.0, "tokens": 0, "predicted": 0}
        fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_enc.device)
        rows: list[tuple[Tensor, ...]] = []
        for tokens in self.parts:
            seen: dict[str, Tensor] = {}

            def splice(x: Tensor, seen: dict[str, Tensor] = seen) -> Tensor:
                flat = x.reshape(-1, x.shape[-1]).to(sae.W_enc.dtype)
                f = sae.encode(flat)
                x_hat = sae.decode(f)
                seen["x"], seen["error"] = flat, x_hat - flat
                seen["active"] = f > 0
                return x_hat.reshape(x.shape)

            spliced = self.model.logits(tokens, {hook_point: splice})[:, :-1].log_softmax(dim=-1)
            plain = self.model.logits(tokens)[:, :-1].log_softmax(dim=-1)
            total["ce"] += sum_of(next_token_losses(spliced, tokens))
            total["kl"] += sum_of(kl_divergence(plain, spliced))
            total["predicted"] += tokens[:, 1:].numel()
            total["tokens"] += tokens.numel()
            fired += seen["active"].sum(dim=0)
            rows.append((seen["x"], seen["error"]))
        x, error = (torch.cat(parts) for parts in zip(*rows, strict=True))
        quality = reconstruction(x.float(), error.float())
        frequency = fired.cpu().double() / total["tokens"]
        counts, edges = density_histogram(frequency)
        with_sae = total["ce"] / total["predicted"]
        return {
            "metrics/explained_variance": float(quality.explained_variance),
            "metrics/explained_variance_std": float(quality.explained_variance_std),
            "metrics/l0": sum_of(fired) / total["tokens"],
            "metrics/l2_norm": float(quality.l2_norm),
            "metrics/l2_ratio": float(quality.l2_ratio),
            "metrics/mean_log10_feature_sparsity": float(log10_frequency(frequency).mean()),
            "metrics/ce_loss_without_sae": clean,
            "metrics/ce_loss_with_sae": with_sae,
            "metrics/ce_loss_with_ablation": ablated,
            "metrics/CE_loss_score": ce_loss_score(clean, with_sae, ablated),
            "metrics/kl_div_with_sae": total["kl"] / total["predicted"],
            "eval/n_tokens": total["tokens"],
            "eval/features_never_fired": int((fired == 0).sum()),
            "plots/feature_density_line_chart": {"counts": counts, "edges": edges},
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

    def clean(self) -> float:
        if self.clean_ce is None:
            self.clean_ce = mean_loss(self.model, self.parts, {})
        return self.clean_ce

    def ablated(self, hook_point: str) -> float:
        if hook_point not in self.ablated_ce:
            self.ablated_ce[hook_point] = mean_loss(
                self.model, self.parts, {hook_point: torch.zeros_like}
            )
        return self.ablated_ce[hook_point]


def sum_of(x: Tensor) -> float:
    """The sum in float64, which not every device has: on the CPU."""
    return float(x.cpu().double().sum())


def ce_loss_score(clean: float, with_sae: float, ablated: float) -> float:
    """(ablated - with) / (ablated - clean); see the module's definitions."""
    return (ablated - with_sae) / (ablated - clean)


def next_token_losses(log_p: Tensor, tokens: Tensor) -> Tensor:
    """log_p [n, context - 1, V], tokens [n, context] -> cross-entropy [n, context - 1], nats."""
    target = tokens[:, 1:].to(log_p.device, torch.int64)
    return -log_p.gather(2, target.unsqueeze(2)).squeeze(2)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) [n, context - 1] of next-token log-probabilities [n, context - 1, V], nats."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def mean_loss(model: LanguageModel, parts: Iterable[Tensor], splice: Mapping[str, Any]) -> float:
    """Mean next-token cross-entropy with `splice` in force, nats."""
    total, n = 0.0, 0
    for tokens in parts:
        log_p = model.logits(tokens, splice)[:, :-1].log_softmax(dim=-1)
        losses = next_token_losses(log_p, tokens)
        total, n = total + sum_of(losses), n + losses.numel()
    return total / n
