"""A pack's gauges on Ray's metrics, told whenever it reports (`actors.gauges`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from saeray.actors.gauges import Meter
from saeray.spec.messages import ReaderGauges


class PackMeter:
    """Of the first rank of a pack."""

    def __init__(self, sweep: str, pack: str, members: Sequence[Any]) -> None:
        """pack: its name; what tells its launch from others is left out. members: its SAEs."""
        self.meter = Meter(sweep=sweep, pack=pack.rpartition("-")[0] or pack)
        self.members = members
        self.gone: set[str] = set()
        self.before = self.tokens()  # those of earlier sessions

    def tokens(self) -> int:
        return sum(m.n_training_tokens for m in self.members)

    def tell(self, now: ReaderGauges, gone: Collection[str]) -> None:
        """gone: SAEs that leave it."""
        self.gone.update(gone)
        self.meter.tell(
            saeray_pack_saes=len(self.members) - len(self.gone),
            saeray_pack_trained_tokens=self.tokens() - self.before,
            saeray_pack_waiting_seconds=now.waited_seconds,
            saeray_pack_busy_seconds=now.busy_seconds,
            saeray_pack_step_seconds=now.step_seconds,
        )
