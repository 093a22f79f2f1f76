"""Which contexts make each feature fire, gathered over any number of them in bounded memory.

Of every feature are kept

    top        the `top` contexts with its largest activations; a context counts once, by its peak
    bands      of all other contexts in which it fires, per band of activation a uniform sample of
               `per_band`: those with the largest of pseudo-random numbers that belong to (feature,
               context)
    histogram  of its activations above zero, one per token, in `HISTOGRAM_BINS` bins

Bands and bins have equal widths, from 0 to the power of two above the largest activation so far;
where that grows they are joined by twos, which is exact. So all of it is a function of the set of
contexts alone: neither their order, nor who has seen which (`merge`), nor how they came in blocks
changes a bit.

Memory: of each feature `top + BANDS * per_band` contexts of 14 + 2 * context bytes, and
4 * HISTOGRAM_BINS + 4 (`state_bytes`); no more, however many contexts there are. What features have
no context for is never touched.

C context, L = d_sae, T slots of contexts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BANDS = 16  # that samples are kept of
HISTOGRAM_BINS = 64
FULL = 32767  # what a context's peak is kept as; its other activations are a share of it
EMPTY = -1  # the key of a slot without a context
NONE_YET = -(1 << 20)  # the exponent of a feature that has not fired
LOW = 0xFFFFFFFF  # of a key: its context's number, counted down
MOST_WINDOWS = LOW - 1

Share = Callable[[Tensor], Tensor]  # a mask of entries -> their activations, int16 [n, C]


class Found(NamedTuple):
    """What was gathered of every feature, on the CPU. -1 stands where there is no context."""

    histogram: Tensor  # int64 [L, HISTOGRAM_BINS] tokens; the bins begin at 0 …
    bin_width: Tensor  # float32 [L] … and are so wide; 0: the feature never fired
    largest: Tensor  # float32 [L]
    top_window: Tensor  # int64 [L, top], the largest peak first
    top_slot: Tensor  # int64 [L, top]: where `FeatureContexts` has the rest of it
    band_edges: Tensor  # float32 [L, bands + 1], from 0 to the largest activation
    band_tokens: Tensor  # int64 [L, bands]: tokens on which the activation is in the band
    band_window: Tensor  # int64 [L, bands, per_band], the highest band first
    band_slot: Tensor  # int64, likewise


class FeatureContexts:
    """The contexts of one SAE's features."""

    def __init__(
        self,
        d_sae: int,
        context: int,
        top: int = 20,
        per_band: int = 5,
        device: torch.device | str = "cpu",
    ) -> None:
        self.context, self.top, self.per_band = context, top, per_band
        slots = top + BANDS * per_band

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)  # pages that nobody touches yet

        # By what a slot's context is kept: the larger wins. Its low half is the window.
        self.key = empty(d_sae, slots, dtype=torch.int64).fill_(EMPTY)
        self.peak = empty(d_sae, slots, dtype=torch.float32)
        self.position = empty(d_sae, slots, dtype=torch.int16)  # of the peak
        self.share = empty(d_sae, slots, context, dtype=torch.int16)  # of the peak, FULL is 1
        self.histogram = empty(d_sae, HISTOGRAM_BINS, dtype=torch.int32)
        # Bands and bins reach from 0 to 2 ** exponent, which is above every activation.
        self.exponent = empty(d_sae, dtype=torch.int32).fill_(NONE_YET)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of its state, by name."""
        names = ("key", "peak", "position", "share", "histogram", "exponent")
        return {name: getattr(self, name) for name in names}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from the state of another one of this shape."""
        for name, own in self.tensors.items():
            own.copy_(tensors[name])

    # --- gathering --------------------------------------------------------------------------

    def add(self, window: int, f: Tensor) -> None:
        """One context, by a number that no other one has: its latents f [C, L], none negative."""
        f = f.float()
        largest, at = f.max(dim=0)
        feature = (largest > 0).nonzero().squeeze(1)
        if not len(feature):
            return
        peak, position = largest[feature], at[feature].to(torch.int16)
        self.grow(feature, exponent_of(peak))
        self.count(f)

        def share(which: Tensor) -> Tensor:
            values = f[:, feature[which]].t() / peak[which].unsqueeze(1)
            return (values * FULL).round_().to(torch.int16)

        self.enter(feature, torch.full_like(feature, window), peak, position, share)

    def merge(self, other: FeatureContexts) -> None:
        """What another one has gathered of other contexts; the other one is changed, too."""
        both = torch.maximum(self.exponent, other.exponent)
        every = torch.arange(len(both), device=both.device)
        for one in (self, other):
            fired = both > NONE_YET
            one.grow(every[fired], both[fired])
        self.histogram += other.histogram
        for slot in range(other.key.shape[1]):
            feature = (other.key[:, slot] != EMPTY).nonzero().squeeze(1)
            if not len(feature):
                continue

            def share(which: Tensor, feature: Tensor = feature, slot: int = slot) -> Tensor:
                return other.share[feature[which], slot]

            take = self.enter if slot < self.top else self.offer
            take(
                feature,
                window_of(other.key[feature, slot]),
                other.peak[feature, slot],
                other.position[feature, slot],
                share,
            )

    def enter(
        self, feature: Tensor, window: Tensor, peak: Tensor, position: Tensor, share: Share
    ) -> None:
        """One context of each of these features (all different): to the top, or to its band.

        What has to leave the top for it goes to its band.
        """
        key = (peak.contiguous().view(torch.int32).long() << 32) | (LOW - window)
        worst, slot = self.key[feature, : self.top].min(dim=1)
        wins = key > worst
        left = wins & (worst != EMPTY)
        gone, out = feature[left], slot[left]
        evicted = (
            window_of(worst[left]),
            self.peak[gone, out],
            self.position[gone, out],
            self.share[gone, out],
        )
        self.put(feature, slot, key, peak, position, share, wins)
        if len(gone):
            shares = evicted[3]
            self.offer(gone, *evicted[:3], lambda which: shares[which])
        loses = ~wins
        if bool(loses.any()):
            at = loses.nonzero().squeeze(1)

            def of_losers(which: Tensor) -> Tensor:
                mask = torch.zeros_like(wins)
                mask[at[which]] = True
                return share(mask)

            self.offer(feature[at], window[at], peak[at], position[at], of_losers)

    def offer(
        self, feature: Tensor, window: Tensor, peak: Tensor, position: Tensor, share: Share
    ) -> None:
        """One context of each of these features for the sample of its band."""
        band = self.into(peak, feature, BANDS)
        first = self.top + band * self.per_band
        slots = first.unsqueeze(1) + torch.arange(self.per_band, device=first.device)
        key = (chance(feature, window) << 32) | (LOW - window)
        worst, which = self.key[feature.unsqueeze(1), slots].min(dim=1)
        self.put(feature, first + which, key, peak, position, share, key > worst)

    def put(
        self,
        feature: Tensor,
        slot: Tensor,
        key: Tensor,
        peak: Tensor,
        position: Tensor,
        share: Share,
        which: Tensor,
    ) -> None:
        """Writes those of the contexts that `which` marks into their slots."""
        at = feature[which], slot[which]
        if not len(at[0]):
            return
        self.key[at] = key[which]
        self.peak[at] = peak[which]
        self.position[at] = position[which]
        self.share[at] = share(which)

    def count(self, f: Tensor) -> None:
        """Adds the activations above zero of f [C, L] to the histograms."""
        active = (f > 0).nonzero()
        feature = active[:, 1]
        into = self.into(f[active[:, 0], feature], feature, HISTOGRAM_BINS)
        one = torch.ones_like(into, dtype=torch.int32)
        self.histogram.view(-1).scatter_add_(0, feature * HISTOGRAM_BINS + into, one)

    def into(self, value: Tensor, feature: Tensor, parts: int) -> Tensor:
        """Which of `parts` equal parts of its feature's range a value is in: int64."""
        # By a power of two, so nothing is rounded.
        scaled = value.double() * power_of_two(parts.bit_length() - 1 - self.exponent[feature])
        return scaled.long().clamp_(0, parts - 1)

    def grow(self, feature: Tensor, exponent: Tensor) -> None:
        """Lets the range of these features reach 2 ** exponent at least."""
        more = exponent > self.exponent[feature]
        feature, exponent = feature[more], exponent[more]
        if not len(feature):
            return
        old = self.exponent[feature]
        doublings = (exponent - old).clamp_max(HISTOGRAM_BINS.bit_length())
        doublings[old == NONE_YET] = 0
        self.exponent[feature] = exponent
        while len(feature := feature[doublings > 0]):
            doublings = doublings[doublings > 0] - 1
            self.join_bins(feature)
            self.join_bands(feature)

    def join_bins(self, feature: Tensor) -> None:
        old = self.histogram[feature]
        joined = torch.zeros_like(old)
        joined[:, : HISTOGRAM_BINS // 2] = old.view(len(old), -1, 2).sum(dim=2)
        self.histogram[feature] = joined

    def join_bands(self, feature: Tensor) -> None:
        m, first = self.per_band, self.top
        key = self.key[feature, first:].view(len(feature), BANDS // 2, 2 * m)
        if bool((key == EMPTY).all()):
            return
        kept = key.topk(m, dim=2).indices  # [n, BANDS / 2, m]
        pair = torch.arange(BANDS // 2, device=kept.device).view(1, -1, 1)
        source = (kept + pair * 2 * m + first).flatten(1)  # the slots of the joined ones
        into = slice(first, first + source.shape[1])
        rows = feature.unsqueeze(1)
        for t in (self.peak, self.position, self.share):
            t[feature, into] = t[rows, source]
        self.key[feature, into] = self.key[rows, source]
        self.key[feature, into.stop :] = EMPTY

    # --- what came of it --------------------------------------------------------------------

    def found(self, bands: int = 5) -> Found:
        """The top, and the samples of `bands` bands of about the same width below the largest.

        A band is made of whole ones of those that were gathered, so its sample is uniform.
        """
        if not 1 <= bands <= BANDS // 2:
            raise ValueError(f"bands: 1 to {BANDS // 2}, not {bands}")
        key, order = self.key[:, : self.top].sort(dim=1, descending=True)
        top_window = torch.where(key == EMPTY, -1, window_of(key))
        largest = torch.where(key[:, 0] == EMPTY, 0.0, self.peak.gather(1, order[:, :1]).squeeze(1))
        fired = self.exponent > NONE_YET
        every = torch.arange(len(fired), device=fired.device)
        used = torch.where(fired, self.into(largest, every, BANDS) + 1, 0)  # of BANDS
        # Edges in units of BANDS: [L, bands + 1].
        edges = (used.unsqueeze(1) * torch.arange(bands + 1, device=used.device) / bands).round()
        edges = edges.long()
        of_bands = self.histogram.long().view(len(used), BANDS, -1).sum(dim=2).cumsum(dim=1)
        below = torch.cat([torch.zeros_like(of_bands[:, :1]), of_bands], dim=1).gather(1, edges)
        windows, slots = [], []
        for i in reversed(range(bands)):
            window, slot = self.sample(edges[:, i], edges[:, i + 1])
            windows.append(window)
            slots.append(slot)
        width = torch.where(fired, power_of_two(self.exponent), 0.0)
        values = edges * (width / BANDS).unsqueeze(1)
        values[:, -1] = largest
        return Found(
            *(
                t.cpu()
                for t in (
                    self.histogram.long(),
                    (width / HISTOGRAM_BINS).float(),
                    largest,
                    top_window,
                    torch.where(key == EMPTY, -1, order),
                    values.float(),
                    below.diff(dim=1).flip(1),
                    torch.stack(windows, dim=1),
                    torch.stack(slots, dim=1),
                )
            )
        )

    def sample(self, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """(windows, slots) [L, per_band] of the sample of bands begin … end - 1, largest first."""
        band = torch.arange(BANDS, device=begin.device).repeat_interleave(self.per_band)
        inside = (band >= begin.unsqueeze(1)) & (band < end.unsqueeze(1))
        key = torch.where(inside, self.key[:, self.top :], EMPTY)
        key, slot = key.topk(self.per_band, dim=1)
        slot = slot + self.top
        there = key != EMPTY
        peak = torch.where(there, self.peak.gather(1, slot), -1.0)
        order = peak.sort(dim=1, descending=True, stable=True).indices
        window = torch.where(there, window_of(key), -1).gather(1, order)
        return window, torch.where(there, slot, -1).gather(1, order)


def state_bytes(d_sae: int, context: int, top: int, per_band: int) -> int:
    """What a `FeatureContexts` holds at most."""
    return d_sae * ((top + BANDS * per_band) * (8 + 4 + 2 + 2 * context) + 4 * HISTOGRAM_BINS + 4)


def exponent_of(value: Tensor) -> Tensor:
    """int32: the least e with value < 2 ** e, of values above zero."""
    return torch.frexp(value).exponent


def power_of_two(exponent: Tensor) -> Tensor:
    """2 ** exponent, exactly: float64."""
    return ((exponent.long().clamp(-1022, 1023) + 1023) << 52).view(torch.float64)


def window_of(key: Tensor) -> Tensor:
    return LOW - (key & LOW)


def chance(feature: Tensor, window: Tensor) -> Tensor:
    """31 pseudo-random bits that belong to each (feature, window): int64.

    splitmix64's finish (Steele, Lea and Flood 2014) of feature * 2³² + window.
    """
    z = (feature << 32) + window + signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ shifted(z, shift)) * signed(factor)
    return shifted(z ^ shifted(z, 31), 33)


def shifted(z: Tensor, bits: int) -> Tensor:
    """z >> bits of the same 64 bits without a sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def signed(word: int) -> int:
    """64 bits as a signed number has them."""
    return word - (1 << 64) if word >> 63 else word
