"""What an architecture says, and all that the training step knows of it.

An architecture is a file beside this one with two classes at most: the *SAE*, its weights and its
forward pass (`base`), and the *rule* it is trained by:

    x ─► h = (x - b_dec) W_enc + b_enc ─► select ─► latents f ─► x̂ ─► loss
                                          which h   of those     and back: df ─► dh = pull_back

A rule's functions take *entries*: h of a block, [R, L], or of the active ones alone, [n]. They are
written once and serve both, since all they do is elementwise; a parameter [L] reaches an entry
through `at`. The weights' gradient, ranks, Adam, checkpoints and reports know no architecture.

B rows, R rows of a block, n active entries, D = d_in, L = d_sae.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from saeray.sae.architectures.base import SAE
from saeray.sae.options import TrainingOptions


class Active(NamedTuple):
    """Entries on the way back: [R, L], or [n] of the active ones alone."""

    h: Tensor
    f: Tensor
    df: Tensor  # of the squared error
    at: Callable[[Tensor], Tensor]  # a parameter [L] at these entries
    row_l0: Callable[[], Tensor]  # how many features are active in each row, [R]
    of_row: Callable[[Tensor], Tensor]  # what belongs to rows, [R], at these entries
    df_gate: Tensor | None = None  # of the error of what `gate_latents` reconstruct


class Pulled(NamedTuple):
    """What `pull_back` hands back."""

    dh: Tensor  # like h
    sums: dict[str, Tensor]  # by the names in `Rule.SUMS`, like h: to be summed over rows


class StepContext(NamedTuple):
    """What the entries of one step have in common."""

    coefficient: float  # of the sparsity term, in this step
    per_row: Any  # the same over B, what one row adds to the loss: a float, or 0-d on a GPU
    norms: Tensor | None  # [L] of the decoder's rows, where they are free


class Rule:
    """How one architecture is trained. This one is for those that are relu(h) at heart."""

    EXTRA_STATE: ClassVar[tuple[str, ...]] = ()  # attributes, numbers, that a checkpoint holds
    SUMS: ClassVar[tuple[str, ...]] = ()  # [L] over rows that gradients of its own are made of
    always_sparse: ClassVar[bool] = False  # few are active from the first step on
    keeps_h: ClassVar[bool] = True  # whether the way back needs h
    sparsity_loss: ClassVar[str | None] = "l1_loss"  # what reports call the sparsity term
    is_steered: ClassVar[bool] = True  # whether target_l0 moves its coefficient
    has_thresholds: ClassVar[bool] = False  # or these (`steer`) and its penalty's target (`aim`)
    has_gate: ClassVar[bool] = False  # whether there are `gate_latents`
    gate_teaches_decoder = False  # whether W_dec and b_dec learn from what those reconstruct

    def __init__(self, sae: SAE, options: TrainingOptions) -> None:
        self.sae = sae
        self.options = options
        self.step: StepContext = StepContext(0.0, 0.0, None)

    @classmethod
    def starts(cls, name: str, options: Any) -> float:
        """Where one of the SAE's EXTRA parameters starts."""
        return 0.0

    # --- the step -------------------------------------------------------------------------

    @property
    def coefficient(self) -> float:
        """Of the sparsity term, before its warm-up."""
        return self.options.l1_coefficient

    @property
    def widths(self) -> tuple[int, ...]:
        """Reconstruction is from the first so many features, for each of these; the last is L."""
        return (self.sae.d_sae,)

    def begin_step(self, step: StepContext) -> None:
        self.step = step

    @property
    def penalty(self) -> float | Tensor | None:
        """What the sparsity term adds to every active entry's gradient, where that is a constant.

        A number, or [L]. Then f = relu(h), and the step takes shorter ways than these functions.
        """
        return None

    def weighted(self, values: Tensor, at: Callable[[Tensor], Tensor]) -> Tensor:
        """values times the norms of their features' decoder rows, where those are free."""
        return values if self.step.norms is None else values * at(self.step.norms)

    @property
    def remedy(self) -> str | None:
        """What brings dead features back, by its name in `pack_step.REMEDIES`; None: nothing."""
        return None

    # --- selection ------------------------------------------------------------------------

    def floor(self) -> Tensor | None:
        """[L]: entries with h at or below it have no part in the step; None: 0 for all."""
        return None

    @property
    def k(self) -> int | None:
        """How many of each row's largest h are selected; None: all above the floor."""
        return None

    def n_of_batch(self, n_rows: int) -> int | None:
        """How many of a whole batch's largest h are selected; None: all above the floor."""
        return None

    smallest = 0.0  # of those, in the last step that chose them; infinity: none was above 0

    def choose(self, smallest: float) -> None:
        """Of this step: what is at least as large is active."""
        self.smallest = smallest

    def selected_by(self) -> Tensor | None:
        """[L]: what h is multiplied by for `k` and `n_of_batch`; None: 1."""
        return None

    # --- entries --------------------------------------------------------------------------

    def latents(self, h: Tensor, at: Callable[[Tensor], Tensor]) -> Tensor:
        """f of selected entries h."""
        return torch.relu(h)

    def latents_of_block(self, h: Tensor, f: Tensor) -> None:
        """The same of a whole block, selection included: h, f [R, L]."""
        f.copy_(self.latents(h, whole))

    def gate_latents(self, h: Tensor) -> Tensor:
        """What a second reconstruction is made of, by the same decoder."""
        raise NotImplementedError

    def pull_back(self, active: Active) -> Pulled:
        """Gradient of the whole loss by h, and by what the rule has parameters of its own for."""
        raise NotImplementedError

    def pull_back_block(self, active: Active, extra: dict[str, Tensor]) -> None:
        """The same of a whole block: df becomes dh in place, sums are added to `extra` [L]."""
        pulled = self.pull_back(active)
        active.df.copy_(pulled.dh)
        for name, values in pulled.sums.items():
            extra[name].add_(values.sum(dim=0))

    def sparsity(self, active: Active) -> Tensor:
        """The sparsity term's value without its coefficient, summed over the entries; 0-d."""
        return self.weighted(active.f, active.at).sum()

    # --- the end of a step ----------------------------------------------------------------

    def finish_gradient(self, grad: Any) -> None:
        """Turns the step's sums (`Gradients`) into gradients: by default that of the norms."""
        norms = self.step.norms
        if norms is not None and "norm" in grad.extra:
            along = grad.extra["norm"] / norms.clamp_min(torch.finfo(norms.dtype).tiny)
            grad.W_dec.addcmul_(along.unsqueeze(1), self.sae.W_dec)

    def gradient_of(self, name: str, grad: Any) -> Tensor:
        """Of one of the SAE's EXTRA parameters, [L]."""
        return grad.extra[name]

    def after_step(self) -> None:
        """After Adam."""

    def aim(self, multiplier: float) -> None:
        """Before a step, where there are thresholds: divides the target of their penalty."""

    def steer(self, by: float) -> None:
        """After that, where there are thresholds: adds to their logarithms."""

    # --- what is reported, kept and published ---------------------------------------------

    def losses(self, sparsity: float, remedy: float) -> dict[str, float]:
        """The terms of the loss beside the squared error, by their wandb keys.

        sparsity: without its coefficient, a row; remedy: of the term for the dead.
        """
        found = {} if self.sparsity_loss is None else {f"losses/{self.sparsity_loss}": sparsity}
        if self.remedy is not None:
            found[f"losses/{self.remedy}_loss"] = remedy
        return found

    def published(self) -> SAE:
        """The SAE as it is used, of the SAE in training."""
        return self.sae

    def state(self) -> dict[str, Any]:
        """Plain numbers that a checkpoint holds."""
        return {name: getattr(self, name) for name in self.EXTRA_STATE}

    def restore(self, numbers: dict[str, Any]) -> None:
        for name in self.EXTRA_STATE:
            setattr(self, name, numbers[name])


def whole(parameter: Tensor) -> Tensor:
    """`at` of a whole block: [L] stands beside [R, L] as it is."""
    return parameter
