"""Evaluation of SAEs on held-out windows: reconstruction, sparsity, and the loss it costs the LM.

docs/metrics.md defines every figure. Of the language model, per token of every held-out window:

    ce_loss_without_sae    next-token cross-entropy of the model as it is, nats
    ce_loss_with_sae       the same with x̂ in the place of x at the hook (of a transcoder, which
                           reads x at one hook: ŷ in the place of y at the other; all that is said
                           of x below is then said of y)
    …with_ablation         with zeros there; …with_mean_ablation: with x's mean over all tokens
    CE_loss_score          (ablation - with) / (ablation - without): 1 is perfect, 0 is no better
                           than zeros
    kl_div_with_sae, …     KL(model as it is ‖ with SAE), nats, and so on
    kl_div_score           (ablation - with) / ablation

SAEs that are evaluated together share the forward of the model as it is: S of them take 1 + S
forwards of every window. What no SAE changes takes three more and a part of one, once per hook.
The last evaluation takes one more that stops at the hook, for all of them (`final`).

Where SAEs do not see all rows of the windows (`saeray.spec.stream`), every figure is of those that
they see, and x̂ stands in their place alone; what is ablated is ablated everywhere, as in sae_lens.

Memory: of the windows, one part at a time is in the model, with its probabilities and the logits
that they are compared with; a part is one window, or as many as have `LOGITS_AT_ONCE` logits. Of an
SAE there are some blocks of `LATENTS_AT_ONCE` latents and a few numbers per feature, and at the end
`VALUE_BINS` counts of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saeray.lm.hooks import Replacement
from saeray.lm.model import LanguageModel
from saeray.sae.architectures.base import SAE
from saeray.sae.metrics import (
    DescriptionLength,
    FeatureSums,
    Reconstruction,
    ReconstructionSums,
    density_histogram,
    feature_table,
    nth_decoder_projection,
)

LOGITS_AT_ONCE = 1 << 20  # elements: 4 MB in float32, so it stays in cache
LATENTS_AT_ONCE = 1 << 22  # elements of a block of feature activations
PROJECTED_ROWS = 4096  # that s_n_dec is of, fewer in a wide SAE: see PROJECTIONS
PROJECTIONS = 1 << 24  # rows times features: 64 MB in float32
CHANCE_SHARE = 0.9  # of a uniform guess's cross-entropy, above which a model knows nothing
NO_EFFECT = 1e-6  # nats between two losses that rounding alone may put there


class Losses(NamedTuple):
    """Of the language model, with something in the place of a hook's activations: nats."""

    ce: float  # next-token cross-entropy: its sum over tokens, or its mean
    kl: float  # KL(model as it is ‖ this one), the same

    def __add__(self, other: Losses) -> Losses:  # type: ignore[override]
        return Losses(self.ce + other.ce, self.kl + other.kl)


class Part(NamedTuple):
    """Some of the windows."""

    tokens: Tensor  # int [n, context]
    at: Tensor | None  # int64, which of the n * context rows are served; None: all of them

    def of(self, rows: Tensor) -> Tensor:
        """Of rows [n * context, …] those that are served."""
        return rows if self.at is None else rows[self.at]

    def splice(self, f: Replacement) -> Replacement:
        """f in the place of the rows that are served, [n, context, D] -> the same; others stay."""
        at = self.at
        if at is None:
            return f

        def of_some(x: Tensor) -> Tensor:
            rows = x.flatten(0, 1).clone()
            rows[at] = f(rows[at]).to(rows.dtype)
            return rows.reshape(x.shape)

        return of_some


class Plain(NamedTuple):
    """The language model as it is, on a part of the windows."""

    p: Tensor  # [n, V] probabilities of next tokens, in the rows that are served
    following: Tensor  # int64 [n] what follows; -1 at a window's end
    ce: float  # sum over tokens, nats
    entropy: float  # of p, the same


class Ablated(NamedTuple):
    """What evaluating any SAE at a hook point compares it with."""

    zeros: Losses  # means, with zeros at the hook
    mean: Losses  # means, with the mean activation there
    activation: Tensor  # that mean, [D]


class Evaluator:
    """Evaluates SAEs of one model on one set of windows; what no SAE changes is computed once.

    Everything else is a sum over parts of the windows: memory does not grow with their number.
    """

    def __init__(self, model: LanguageModel, windows: Tensor, served: Tensor | None = None) -> None:
        """windows: int [n, context]. served: bool [n, context]; None: all rows are."""
        self.model = model
        if served is not None:
            some = served.any(dim=1)
            windows, served = windows[some], served[some]
        counted = torch.ones_like(windows, dtype=torch.bool) if served is None else served
        self.n_tokens = int(counted.sum())
        self.n_predicted = max(1, int(counted[:, :-1].sum()))
        at_once = max(1, LOGITS_AT_ONCE // (windows.shape[1] * model.facts.d_vocab))
        self.parts = [
            Part(
                tokens, None if served is None else rows.flatten().nonzero()[:, 0].to(model.device)
            )
            for tokens, rows in zip(windows.split(at_once), counted.split(at_once), strict=True)
        ]
        self.clean_ce: float | None = None
        self.at_hooks: dict[str, Ablated] = {}

    def evaluate(self, sae: SAE, *hooks: str, final: bool = False) -> dict[str, Any]:
        """`evaluate_all` of one SAE."""
        return self.evaluate_all([sae], hooks, final)[0]

    @torch.inference_mode()
    def evaluate_all(
        self, saes: Sequence[SAE], hooks: Sequence[str], final: bool = False
    ) -> list[dict[str, Any]]:
        """Metrics by their wandb keys, and the density histogram, of each SAE.

        hooks: what they read; of transcoders also what they reconstruct, later in the forward.

        A figure that has no meaning here is None, and `warnings` says why. What an SAE's figures
        are depends on no other one.

        final: also s_n_dec and mdl, and `features`, {column: [L]} on the CPU; as costly as
        evaluating twice where few SAEs are evaluated together.
        """
        read, written = hooks[0], hooks[-1]
        ablated = self.ablated(written)
        of_saes = [OneSAE(sae, ablated.activation) for sae in saes]
        for part in self.parts:
            plain = self.plain(part)
            for one in of_saes:
                splice: dict[str, Any] = {written: part.splice(one)}
                if read != written:
                    splice[read] = part.splice(one.read)
                one.losses += self.losses(part, plain, splice)
        if final:
            self.add_final(of_saes, read, written)
        return [self.figures(one, ablated, written) for one in of_saes]

    def figures(self, one: OneSAE, ablated: Ablated, hook_point: str) -> dict[str, Any]:
        quality, clean, found = one.sums.result(), self.clean(), self.means(one.losses)
        counts, edges = density_histogram(one.features.frequency)
        score = ce_loss_score(clean, found.ce, ablated.zeros.ce)
        return {
            **quality.metrics(),
            **one.features.metrics(),
            "metrics/ce_loss_without_sae": clean,
            "metrics/ce_loss_with_sae": found.ce,
            "metrics/ce_loss_with_ablation": ablated.zeros.ce,
            "metrics/ce_loss_with_mean_ablation": ablated.mean.ce,
            "metrics/CE_loss_score": score,
            "metrics/CE_loss_score_mean_ablation": ce_loss_score(clean, found.ce, ablated.mean.ce),
            "metrics/kl_div_with_sae": found.kl,
            "metrics/kl_div_with_ablation": ablated.zeros.kl,
            "metrics/kl_div_with_mean_ablation": ablated.mean.kl,
            "metrics/kl_div_score": kl_div_score(found.kl, ablated.zeros.kl),
            "metrics/kl_div_score_mean_ablation": kl_div_score(found.kl, ablated.mean.kl),
            "eval/n_tokens": self.n_tokens,
            "plots/feature_density_line_chart": {"counts": counts, "edges": edges},
            "warnings": [*self.warnings(), *reservations(hook_point, score, quality)],
            **one.final,
        }

    def add_final(self, of_saes: Sequence[OneSAE], read: str, written: str) -> None:
        """What is left for the end, on a second pass: bins are made of the largest activations."""
        lengths = [DescriptionLength(one.features) for one in of_saes]
        every = -(-self.n_tokens // PROJECTED_ROWS)
        sample: list[tuple[Tensor, Tensor]] = []
        seen = 0
        for part in self.parts:
            activations = self.model.activations(part.tokens)
            x, y = part.of(activations[read]), part.of(activations[written])
            for one, length in zip(of_saes, lengths, strict=True):
                for rows in one.blocks(x):
                    length.add(one.sae.encode(rows))
            some = slice(-seen % every, None, every)
            sample.append((x[some].clone(), y[some].clone()))
            seen += len(x)
        rows, wanted = (torch.cat(each) for each in zip(*sample, strict=True))
        for one, length in zip(of_saes, lengths, strict=True):
            one.final = one.at_the_end(length, rows, wanted)

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

    @torch.inference_mode()
    def clean(self) -> float:
        """Mean next-token cross-entropy of the model as it is, nats."""
        if self.clean_ce is None:
            self.clean_ce = sum(self.plain(part).ce for part in self.parts) / self.n_predicted
        return self.clean_ce

    @torch.inference_mode()
    def ablated(self, hook_point: str) -> Ablated:
        """With zeros, and with the mean, at the hook; the model's own loss on the way."""
        if hook_point not in self.at_hooks:
            activation = self.mean_activation(hook_point)
            splices: list[Mapping[str, Any]] = [
                {hook_point: torch.zeros_like},
                {hook_point: lambda x: activation.to(x.dtype).expand_as(x)},
            ]
            sums, clean = [Losses(0.0, 0.0) for _ in splices], 0.0
            for part in self.parts:
                plain = self.plain(part)
                clean += plain.ce
                for i, splice in enumerate(splices):
                    sums[i] += self.losses(part, plain, splice)
            self.clean_ce = clean / self.n_predicted
            zeros, mean = map(self.means, sums)
            self.at_hooks[hook_point] = Ablated(zeros, mean, activation)
        return self.at_hooks[hook_point]

    def mean_activation(self, hook_point: str) -> Tensor:
        """Of all held-out tokens: float32 [D] on the model's device."""
        summed = torch.zeros(1, dtype=torch.float64)
        for part in self.parts:
            x = part.of(self.model.activations(part.tokens)[hook_point])
            summed = summed + x.float().sum(dim=0).cpu().double()
        return (summed / self.n_tokens).float().to(self.model.device)

    def losses(self, part: Part, plain: Plain, splice: Mapping[str, Any]) -> Losses:
        """Of the model with something in a hook's place, summed over a part."""
        return losses(plain, part.of(self.model.logits(part.tokens, splice).flatten(0, 1)))

    def plain(self, part: Part) -> Plain:
        """The model as it is on a part."""
        p = part.of(self.model.logits(part.tokens).flatten(0, 1))
        following = part.of(next_tokens(part.tokens, p.device))
        blocks = row_blocks(p)
        ce, entropy = 0.0, 0.0
        for rows, after in zip(blocks, following.split(len(blocks[0])), strict=True):
            log_p = rows.log_softmax(dim=-1)
            rows.copy_(log_p).exp_()
            ce += cross_entropy(log_p, after)
            entropy -= total(torch.linalg.vecdot(rows, log_p))
        return Plain(p, following, ce, entropy)

    def means(self, sums: Losses) -> Losses:
        return Losses(sums.ce / self.n_predicted, sums.kl / self.n_tokens)


class OneSAE:
    """An SAE while it is evaluated. Called with x, it gives x̂ and adds up what it has seen.

    A transcoder is called with y, after it has `read` x.
    """

    def __init__(self, sae: SAE, mean: Tensor) -> None:
        """mean [D] of all x, of a transcoder [O] of all y, that it will be given."""
        self.sae = sae
        self.x: Tensor | None = None  # where that is not what it is called with
        self.losses = Losses(0.0, 0.0)
        self.sums = ReconstructionSums(mean)
        self.features = FeatureSums(sae.d_sae, sae.W_enc.device)
        self.final: dict[str, Any] = {}

    def blocks(self, x: Tensor) -> Iterator[Tensor]:
        """Rows of x [..., D], so many that their latents are `LATENTS_AT_ONCE` at most."""
        flat = x.reshape(-1, x.shape[-1]).to(self.sae.W_enc.dtype)
        yield from flat.split(max(1, LATENTS_AT_ONCE // self.sae.d_sae))

    def read(self, x: Tensor) -> Tensor:
        """Keeps what a transcoder reads, and leaves it as it is."""
        self.x = x
        return x

    def __call__(self, y: Tensor) -> Tensor:
        x, self.x = y if self.x is None else self.x, None
        parts = []
        for rows, wanted in zip(self.blocks(x), self.blocks(y), strict=True):
            f = self.sae.encode(rows)
            y_hat = self.sae.reconstruct(rows, f)
            self.features.add(f)
            self.sums.add(wanted.float(), (y_hat - wanted).float())
            parts.append(y_hat)
        return torch.cat(parts).reshape(y.shape)

    def at_the_end(self, length: DescriptionLength, x: Tensor, y: Tensor) -> dict[str, Any]:
        """s_n_dec of some rows x [B, D] (of a transcoder of y [B, O]), mdl, a table of features."""
        sae = self.sae
        every = -(-len(x) // max(1, PROJECTIONS // sae.d_sae))
        some = torch.arange(0, len(x), every, device=x.device)
        y = y[some].to(sae.W_dec.dtype)
        if sae.W_skip is not None:  # what is left for the decoder
            y = y - x[some].to(sae.W_skip.dtype) @ sae.W_skip
        s_n_dec = nth_decoder_projection(y, sae.W_dec, sae.b_out, max(1, sae.d_sae // 4))
        return {
            "metrics/s_n_dec": s_n_dec,
            "metrics/mdl": length.bits(),
            "features": feature_table(self.features, sae.W_dec),
        }


def reservations(hook_point: str, score: float | None, quality: Reconstruction) -> list[str]:
    """Which figures this hook point has none of, and why: the same for all its SAEs."""
    said = []
    if score is None:
        said.append(
            f"{hook_point}: the model's loss is the same with zeros in its place, so it has "
            "no CE loss score. Does it reach the logits?"
        )
    if quality.explained_variance is None:
        said.append(
            f"{hook_point}: all held-out activations are equal, so there is no variance to explain."
        )
    return said


def ce_loss_score(clean: float, with_sae: float, ablated: float) -> float | None:
    """(ablated - with) / (ablated - clean), as the module defines it; None: nothing to divide by.

    Where a hook does not reach the logits, zeros in its place change nothing.
    """
    if abs(ablated - clean) <= NO_EFFECT:
        return None
    return (ablated - with_sae) / (ablated - clean)


def kl_div_score(with_sae: float, ablated: float) -> float | None:
    """(ablated - with) / ablated; None where the ablation changes nothing."""
    return None if abs(ablated) <= NO_EFFECT else (ablated - with_sae) / ablated


def total(values: Tensor) -> float:
    """Their sum, in float64 on the CPU: not every device has it."""
    return float(values.cpu().double().sum())


def row_blocks(x: Tensor) -> tuple[Tensor, ...]:
    """Views of blocks of rows of x [rows, V], of `LOGITS_AT_ONCE` elements at most (or one row)."""
    return x.split(max(1, LOGITS_AT_ONCE // x.shape[1]))


def next_tokens(tokens: Tensor, device: torch.device) -> Tensor:
    """tokens [n, context] -> what follows each of them: int64 [n * context]; -1 after the last."""
    following = tokens.new_full(tokens.shape, -1)
    following[:, :-1] = tokens[:, 1:]
    return following.flatten().to(device, torch.int64)


def cross_entropy(log_p: Tensor, following: Tensor) -> float:
    """Summed over rows of log_p [rows, V] that are followed by a token, nats."""
    of_next = log_p.gather(1, following.clamp_min(0).unsqueeze(1)).squeeze(1)
    return -total(of_next[following >= 0])


def losses(plain: Plain, logits: Tensor) -> Losses:
    """Sums over tokens of the model with something in a hook's place: logits [n, V].

    KL(p ‖ q) is Σ p log p - Σ p log q; the first is of the model as it is, and computed once.
    """
    found = Losses(0.0, -plain.entropy)
    blocks = row_blocks(plain.p)
    others = row_blocks(logits)
    following = plain.following.split(len(blocks[0]))
    for p, other, after in zip(blocks, others, following, strict=True):
        log_q = other.log_softmax(dim=-1)
        found += Losses(cross_entropy(log_q, after), -total(torch.linalg.vecdot(p, log_q)))
    return found
