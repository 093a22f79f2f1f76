"""`features:` of a config: at a sweep's end, pages of what makes the features of its SAEs fire.

Of those on the frontier, since these are the ones that somebody takes: `saeray features` makes them
of any other. One pass over text for all of them, on the Ray that the sweep ran on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from saeray.errors import SaerayError
from saeray.files import frontier
from saeray.files.storage import Folder
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.features import MOST_AT_END, Wanted, tokens_at_end
from saeray.spec.messages import DONE, STOPPED


def wanted_at_end(
    config: LanguageModelSAERunnerConfig, rows: Sequence[Mapping[str, Any]]
) -> Wanted | None:
    """What a sweep's config asks for, once all its SAEs have ended; None: nothing."""
    tokens = tokens_at_end(config.features)
    saes = those_with_pages(rows) if tokens is not None else []
    return Wanted(saes, tokens) if tokens is not None and saes else None


def those_with_pages(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The trained SAEs on a frontier, in the rows' order; of too many some, spread over their L0.

    Where nothing is judged (no held-out figures) all that are trained.
    """
    marks = frontier.marks(rows)
    chosen = [row for row, mark in zip(rows, marks, strict=True) if mark]
    chosen = chosen or [row for row in rows if row["status"] in (DONE, STOPPED)]
    if len(chosen) > MOST_AT_END:
        by_l0 = sorted(chosen, key=lambda row: row["l0"] or 0.0)
        last = len(by_l0) - 1
        chosen = [by_l0[round(i * last / (MOST_AT_END - 1))] for i in range(MOST_AT_END)]
    names = {row["trial"] for row in chosen}
    return [row["trial"] for row in rows if row["trial"] in names]


def left_at_end(
    place: Folder, config: LanguageModelSAERunnerConfig, rows: Sequence[Mapping[str, Any]]
) -> Wanted | None:
    """What a sweep that has ended still lacks of the pages it asks for; None: nothing."""
    wanted = wanted_at_end(config, rows)
    if wanted is None:
        return None
    from saeray.client.features import to_gather

    return wanted if to_gather(place, wanted).saes else None


def make_at_end(
    place: Folder,
    config: LanguageModelSAERunnerConfig,
    rows: Sequence[Mapping[str, Any]],
    say: Callable[[str], None],
) -> str | None:
    """Makes them, where the config asks for any; a warning if something prevents them.

    The SAEs are there, and pages of them are no reason to say that their sweep has failed.
    """
    wanted = wanted_at_end(config, rows)
    if wanted is None:
        return None
    from saeray.client.features import make

    try:
        make(place, wanted, say)
    except SaerayError as problem:
        return f"no pages of features: {problem} `saeray features {place.uri}` tries again."
    return None


def cost_at_end(config: LanguageModelSAERunnerConfig, n_saes: int, d_sae: int) -> str:
    """What the pages will cost at most, in words."""
    from saeray.sae.feature_contexts import state_bytes
    from saeray.spec.features import PER_BAND, TOP

    tokens = tokens_at_end(config.features) or 0
    n = min(n_saes, MOST_AT_END)
    states = (n + 2) * state_bytes(d_sae, config.context_size, TOP, PER_BAND)
    share = tokens / max(1, config.stream_tokens or config.training_tokens)
    return (
        f"features: pages of the SAEs on the frontier, {n} at most: {tokens:,} tokens read once "
        f"more ({share:.1%} of the text), up to {states / 1e9:.2g} GB of a harvester, "
        f"{n * d_sae * 11e3 / 1e6:,.0f} MB on disk"
    )
