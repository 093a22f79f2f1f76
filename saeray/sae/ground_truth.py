"""How much of a known dictionary an SAE has found.  B rows, D d_in, L d_sae, F features.

Latents and features are matched one to one so that the sum of |cos| between decoder rows and
features is the largest (Hungarian). A latent's activation counts times the norm of its decoder row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saeray.sae.assignment import best_assignment
from saeray.sae.stability import directions

FOUND = 0.9  # |cos| above which a feature counts as found


class Matching(NamedTuple):
    """The latent that stands for each feature."""

    latent: Tensor  # int64 [F]; -1: none, as there are fewer latents
    cosine: Tensor  # float64 [F], |cos| of the two; 0 where there is none


class Recovery(NamedTuple):
    """Of all rows. Where there is nothing to divide by: None."""

    mcc: float  # mean |cos| over the matched pairs
    features_found: float  # share of the F features with |cos| > 0.9
    # Of the features that fire at all, the mean; a feature without a latent has 0 of each, and a
    # latent that never fires has precision 0.
    firing_precision: float | None  # of the rows where the latent fires: the feature does
    firing_recall: float | None  # of the rows where the feature fires: the latent does
    firing_f1: float | None  # their harmonic mean, of each feature
    # 1 - Σ latent / Σ feature over entries where both fire, of the features that are found
    shrinkage: float | None

    def metrics(self) -> dict[str, float | None]:
        """By their wandb keys."""
        return {f"ground_truth/{name}": value for name, value in self._asdict().items()}


def matched(W_dec: Tensor, features: Tensor) -> Matching:
    """W_dec [L, D], features [F, D]."""
    cosines = (directions(features) @ directions(W_dec).T).abs()  # [F, L]
    n_features, n_latents = cosines.shape
    latent = torch.full((n_features,), -1)
    if n_features <= n_latents:
        latent = torch.from_numpy(best_assignment(cosines.numpy()))
    else:
        latent[torch.from_numpy(best_assignment(cosines.T.numpy()))] = torch.arange(n_latents)
    cosine = cosines[torch.arange(n_features), latent.clamp_min(0)]
    return Matching(latent, torch.where(latent >= 0, cosine, 0.0))


class RecoverySums:
    """`Recovery` of any number of batches: counts and sums per feature."""

    def __init__(self, W_dec: Tensor, features: Tensor) -> None:
        """W_dec [L, D], features [F, D]."""
        self.matching = matched(W_dec, features)
        self.norms = torch.linalg.vector_norm(W_dec.detach(), dim=1)
        shape = (5, len(features))
        # Rows where the feature, its latent, both fire; sums of both where both do.
        self.truth, self.latent, self.both, self.sum_truth, self.sum_latent = torch.zeros(
            shape, dtype=torch.float64
        )

    def add(self, f: Tensor, truth: Tensor) -> None:
        """f [B, L] latents, truth [B, F] magnitudes, 0 where a feature does not fire."""
        at = self.matching.latent.clamp_min(0).to(f.device)
        matched = (self.matching.latent >= 0).to(f.device)
        mine = torch.where(matched, f[:, at] * self.norms[at], 0.0)
        fires, fired = truth > 0, mine > 0
        both = fires & fired
        self.truth += fires.sum(dim=0).cpu()
        self.latent += fired.sum(dim=0).cpu()
        self.both += both.sum(dim=0).cpu()
        self.sum_truth += torch.where(both, truth, 0.0).cpu().double().sum(dim=0)
        self.sum_latent += torch.where(both, mine, 0.0).cpu().double().sum(dim=0)

    def result(self) -> Recovery:
        cosine = self.matching.cosine
        n_pairs = int((self.matching.latent >= 0).sum())
        found = cosine > FOUND
        fires = self.truth > 0
        precision = self.both / self.latent.clamp_min(1)
        recall = self.both / self.truth.clamp_min(1)
        f1 = 2 * self.both / (self.truth + self.latent).clamp_min(1)
        total = float(self.sum_truth[found].sum())

        def mean(of_feature: Tensor) -> float | None:
            return float(of_feature[fires].mean()) if fires.any() else None

        return Recovery(
            float(cosine.sum()) / n_pairs,
            float(found.double().mean()),
            mean(precision),
            mean(recall),
            mean(f1),
            1 - float(self.sum_latent[found].sum()) / total if total else None,
        )
