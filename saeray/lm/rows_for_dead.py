"""The rows that dead features may take the place of: one of each context of an LM batch.

What is picked, and by which weight, stands in `saeray.sae.resampling`. All of it is a function of
the tokens, the SAE's weights and the numbers it is drawn by, whichever harvester computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saeray.lm.evaluate import LATENTS_AT_ONCE, LOGITS_AT_ONCE, next_tokens, row_blocks
from saeray.lm.model import LanguageModel
from saeray.lm.synthetic import SyntheticModel
from saeray.sae.architectures.base import SAE
from saeray.sae.resampling import pick_tokens
from saeray.spec.messages import RowsFor


class Picked(NamedTuple):
    """A token of each context."""

    rows: Tensor  # [n, D] activations, float32 on the CPU
    weights: Tensor  # [n] float64; 0 where a context has none to give


class Spliced:
    """An SAE in a hook's place. Called with x, it gives x̂ and keeps both."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.x = self.x_hat = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(self.sae.W_enc.dtype)
        blocks = flat.split(max(1, LATENTS_AT_ONCE // self.sae.d_sae))
        self.x, self.x_hat = flat, torch.cat([self.sae(rows) for rows in blocks])
        return self.x_hat.reshape(x.shape)


@torch.inference_mode()
def rows_for_dead(
    model: LanguageModel | SyntheticModel,
    tokens: Tensor,
    block: int,
    saes: Sequence[tuple[RowsFor, SAE]],
    served: Tensor | None = None,
) -> list[Picked]:
    """For each SAE a row of every context of tokens [n, context], the LM batch of that index.

    served: bool [n, context], the tokens that may be picked; None: all of them.
    """
    may = torch.ones(tokens.shape, dtype=torch.bool) if served is None else served
    found: list[list[Picked]] = [[] for _ in saes]
    of_loss = [i for i, (wanted, _) in enumerate(saes) if wanted.method == "anthropic"]
    rest = [i for i in range(len(saes)) if i not in of_loss]
    if of_loss:
        assert isinstance(model, LanguageModel) or not isinstance(model, SyntheticModel)
        n = max(1, LOGITS_AT_ONCE // (tokens.shape[1] * model.facts.d_vocab))
        for at, (part, of_part) in enumerate(zip(tokens.split(n), may.split(n), strict=True)):
            clean = token_losses(model.logits(part), part)
            for i in of_loss:
                wanted, sae = saes[i]
                spliced = Spliced(sae)
                logits = model.logits(part, {wanted.hook_point: spliced})
                more = (token_losses(logits, part) - clean) * of_part
                found[i].append(picked(spliced.x, more, wanted, block, at))
    if rest:
        x = model.activations(tokens)
        for i in rest:
            wanted, sae = saes[i]
            spliced = Spliced(sae)
            spliced(x[wanted.hook_point])
            errors = (spliced.x_hat - spliced.x).square().sum(dim=1).reshape(tokens.shape)
            found[i].append(picked(spliced.x, errors.cpu() * may, wanted, block, 0))
    return [Picked(*map(torch.cat, zip(*parts, strict=True))) for parts in found]


def picked(x: Tensor, weights: Tensor, wanted: RowsFor, block: int, part: int) -> Picked:
    """x [n * context, D], weights [n, context] -> a row of each context."""
    at, weight = pick_tokens(weights, wanted.seed, wanted.step, block, part)
    context = weights.shape[1]
    places = torch.arange(len(at)) * context + at
    return Picked(x[places.to(x.device)].float().cpu(), weight)


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """logits [n, context, V] -> nats of cross-entropy of what follows each token: [n, context].

    0 for a context's last token, after which nothing is known; float64 on the CPU.
    """
    flat = logits.flatten(0, 1)
    following = next_tokens(tokens, flat.device)
    blocks, losses = row_blocks(flat), []
    for rows, after in zip(blocks, following.split(len(blocks[0])), strict=True):
        log_p = rows.log_softmax(dim=-1)
        of_next = log_p.gather(1, after.clamp_min(0).unsqueeze(1)).squeeze(1)
        losses.append(torch.where(after >= 0, -of_next, 0.0))
    return torch.cat(losses).reshape(tokens.shape).cpu().double()
