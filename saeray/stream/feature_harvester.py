"""FeatureHarvester: a harvester that also gathers which contexts make each SAE's features fire.

What it has gathered is a function of the parts of the text it was given, in whatever order, so any
number of harvesters can share a pass (`FeatureContexts.merge`) and one that was saved goes on.

Memory, beside the language model and the SAEs: `state_bytes` of `saeray.sae.feature_contexts` for
each SAE, the latents of one window, and at the end one more state, while two are joined.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from saeray.actors.head_folder import seen_from_here
from saeray.errors import SaerayError
from saeray.files import feature_data, strict_json
from saeray.files.storage import Folder
from saeray.stream.harvester import Harvester

if TYPE_CHECKING:
    from torch import Tensor

    from saeray.sae.architectures.base import SAE
    from saeray.sae.feature_contexts import FeatureContexts

PARTS = "parts.json"  # written last: of which parts of the text a saved state is
NEIGHBOURS = 5
LOGITS = 10  # tokens at either end
LOGITS_SAID = (
    "decoder row times the unembedding, with the final norm's scale (and centring) folded in and "
    "the mean over the vocabulary taken off, not divided by what the norm divides by: as "
    "SAEDashboard has them"
)
PART_WINDOWS = 1 << 14  # windows are numbered by part, with so many numbers for each
MOST_PARTS = 1 << 18
ROWS_AT_ONCE = 256  # features whose contexts are written down at a time


class Wanted(NamedTuple):
    """One SAE of a pass."""

    folder: str  # of its weights
    hook_point: str  # where it reads
    writes_to: str  # the hook point that its decoder's rows are of
    d_sae: int


class FeatureJob(NamedTuple):
    """What a pass gathers."""

    saes: dict[str, Wanted]
    context: int
    top: int
    bands: int
    per_band: int
    sweep: str  # its folder
    place: str  # the folder of states that are saved on the way


class FeatureHarvester(Harvester):
    """One language model, and the contexts of the features of several SAEs."""

    job: FeatureJob | None = None

    def begin(self, job: FeatureJob, name: str, saved: list[str]) -> list[int]:
        """Starts anew from states that were saved; the parts of the text that are in them.

        name: that it saves its own under.
        """
        import torch

        from saeray.files.checkpoint import load_sae
        from saeray.sae.feature_contexts import FeatureContexts

        model = self.open()
        # float64 is wanted for exact bins, which mps does not have.
        self.at = model.device if model.device.type == "cuda" else torch.device("cpu")
        self.saes: dict[str, SAE] = {}
        self.states: dict[str, FeatureContexts] = {}
        for sae, wanted in job.saes.items():
            self.saes[sae] = load_sae(seen_from_here(wanted.folder)).to(self.at)
            d_sae = self.saes[sae].d_sae
            self.states[sae] = FeatureContexts(d_sae, job.context, job.top, job.per_band, self.at)
        self.parts: set[int] = set()
        self.job, self.name = job, name
        self.loaded = list(saved)
        for folder in saved:
            self.take_up(seen_from_here(job.place) / folder)
        return sorted(self.parts)

    def take_up(self, folder: Folder) -> None:
        """Merges a saved state into this one's."""
        from safetensors.torch import load

        for i, sae in enumerate(self.states):
            self.merge(sae, load(folder.read(f"{i}.safetensors")))
        self.parts |= set(strict_json.loads(folder.read(PARTS)))

    def merge(self, sae: str, tensors: Mapping[str, Tensor]) -> None:
        from saeray.sae.feature_contexts import FeatureContexts

        assert self.job is not None
        of = self.states[sae]
        if not self.parts and bool((of.key == -1).all()):
            of.load(dict(tensors))
            return
        other = FeatureContexts(len(of.key), of.context, of.top, of.per_band, self.at)
        other.load(dict(tensors))
        of.merge(other)

    def collect(self, part: int, tokens: np.ndarray) -> int:
        """Gathers from a part of the text: int32 [n, context]."""
        import torch

        if self.job is None:
            raise SaerayError("a harvester that was started again has not begun yet")
        with torch.inference_mode():
            activations = self.open().activations(torch.from_numpy(tokens.copy()))
            seen = torch.ones(tokens.shape, dtype=torch.bool)
            if self.served is not None:
                seen = torch.from_numpy(self.served.mask(tokens))
            seen = seen.to(self.at)
            for sae, wanted in self.job.saes.items():
                x = activations[wanted.hook_point].to(self.at)
                windows = x.view(len(tokens), -1, x.shape[-1])
                for i, of_window in enumerate(windows):
                    f = self.saes[sae].encode(of_window) * seen[i].unsqueeze(1)
                    self.states[sae].add(part * PART_WINDOWS + i, f)
        self.parts.add(part)
        return part

    def save(self) -> list[int]:
        """Writes down what was gathered, and deletes what that was written down of before."""
        from safetensors.torch import save

        assert self.job is not None
        place = seen_from_here(self.job.place)
        name = f"{self.name}-{uuid.uuid4().hex[:8]}"  # never over one that is there
        folder = place / name
        for i, of in enumerate(self.states.values()):
            tensors = {n: t.cpu().contiguous() for n, t in of.tensors.items()}
            folder.write(f"{i}.safetensors", save(tensors))
        folder.write(PARTS, strict_json.dumps(sorted(self.parts)).encode())
        for earlier in self.loaded:
            (place / earlier).delete()
        self.loaded = [name]
        return sorted(self.parts)

    def state(self, sae: str) -> dict[str, np.ndarray]:
        """What was gathered of an SAE, for another harvester to `absorb`."""
        return {n: t.cpu().numpy() for n, t in self.states[sae].tensors.items()}

    def absorb(self, sae: str, state: dict[str, np.ndarray]) -> None:
        """Adds what another harvester has gathered of other parts."""
        import torch

        self.merge(sae, {n: torch.from_numpy(a) for n, a in state.items()})

    def finish(
        self, sae: str, tokens: np.ndarray, firsts: list[int], about: dict[str, Any]
    ) -> None:
        """Writes the features of an SAE down.

        tokens: all windows, int32 [n, context]. firsts: by part, which of them is its first.
        about: what is said of the SAE.
        """
        from saeray.lm.hub import load_tokenizer
        from saeray.lm.token_texts import token_texts

        assert self.job is not None
        arrays = self.arrays(sae)
        arrays["window"] = by_place(arrays["window"], np.array(firsts))
        ids = feature_data.used_tokens(tokens, arrays)
        texts = token_texts(load_tokenizer(self.config), ids)
        seen = tokens.size if self.served is None else self.served.mask(tokens).sum()
        about = about | {"n_tokens": int(seen)}
        data = feature_data.FeatureData(about, arrays, tokens)
        no_logits = f"none: {self.job.saes[sae].writes_to} is not in the residual stream"
        data.about |= {
            "d_sae": len(data),
            "n_dead": int((data.fired == 0).sum()),
            "n_dense": int((data.density > feature_data.DENSE).sum()),
            "logits": LOGITS_SAID if data.has_logits else no_logits,
            "texts": {str(i): text for i, text in texts.items()},
        }
        feature_data.write(seen_from_here(self.job.sweep) / feature_data.PLACE / sae, data)

    def arrays(self, sae: str) -> dict[str, np.ndarray]:
        """By the names of `FeatureData`."""
        import torch

        from saeray.sae.feature_directions import logit_effects, nearest_features

        assert self.job is not None
        with torch.inference_mode():
            found = self.states[sae].found(self.job.bands)
            W_dec = self.saes[sae].W_dec.float()
            near = nearest_features(W_dec, NEIGHBOURS)
            arrays = {
                "histogram": found.histogram.int(),
                "bin_width": found.bin_width,
                "largest": found.largest,
                "band_edges": found.band_edges,
                "band_tokens": found.band_tokens.int(),
                "neighbour": near.feature.int(),
                "cosine": near.cosine,
                "decoder_norm": torch.linalg.vector_norm(W_dec, dim=1).cpu(),
            }
            unembedding = self.unembedding(self.job.saes[sae].writes_to)
            if unembedding is not None and unembedding.shape[1] == W_dec.shape[1]:
                effects = logit_effects(W_dec.to(unembedding.device), unembedding, LOGITS)
                arrays |= {
                    "top_token": effects.top_token.int(),
                    "top_logit": effects.top_logit,
                    "bottom_token": effects.bottom_token.int(),
                    "bottom_logit": effects.bottom_logit,
                    "logit_histogram": effects.histogram.int(),
                    "logit_range": effects.range,
                }
            window = torch.cat([found.top_window, found.band_window.flatten(1)], dim=1)
            slot = torch.cat([found.top_slot, found.band_slot.flatten(1)], dim=1)
            arrays |= written_down(self.states[sae], window, slot)
        return {name: t.numpy() for name, t in arrays.items()}

    def unembedding(self, hook_point: str) -> Tensor | None:
        from saeray.lm.model import LanguageModel
        from saeray.lm.unembedding import folded_unembedding, reaches_logits

        model = self.open()
        if not isinstance(model, LanguageModel) or not reaches_logits(hook_point):
            return None
        return folded_unembedding(model)


def by_place(window: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """Numbers of windows, as contexts have them, to their places in the text; -1 stays."""
    part, within = np.divmod(np.maximum(window, 0).astype(np.int64), PART_WINDOWS)
    return np.where(window < 0, -1, firsts[part] + within).astype(np.int32)


def written_down(of: FeatureContexts, window: Tensor, slot: Tensor) -> dict[str, Tensor]:
    """The contexts in these slots [L, S], with the tokens on which their feature is active."""
    import torch

    there = slot >= 0
    at = slot.clamp_min(0).to(of.key.device)
    counts, positions, shares = [], [], []
    for rows in torch.arange(len(slot)).split(ROWS_AT_ONCE):
        share = of.share[rows.to(at.device).unsqueeze(1), at[rows]].cpu()  # [n, S, C]
        share = torch.where(there[rows].unsqueeze(2), share, 0)
        active = share > 0
        counts.append(active.sum(dim=2).flatten())
        positions.append(active.nonzero()[:, 2].to(torch.int16))
        shares.append(share[active])
    ends = torch.cat(counts).cumsum(0)
    return {
        "window": window,
        "position": torch.where(there, of.position.gather(1, at).cpu(), -1).to(torch.int16),
        "peak": torch.where(there, of.peak.gather(1, at).cpu(), 0.0),
        "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), ends]),
        "active_position": torch.cat(positions),
        "active_share": torch.cat(shares),
    }
