"""The activation buffer's gauges on Ray's metrics, told every few seconds (`actors.gauges`)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from saeray.actors.gauges import Meter
from saeray.actors.names import tags_of
from saeray.spec.messages import Gauges

TELL_SECONDS = 2.0  # Ray sends them on less often


async def keep_telling(gauges: Callable[[], Awaitable[Gauges]], stream: str) -> None:
    """stream: its name, of which the buffer's is made; it ends with the buffer."""
    meter = Meter(**tags_of(f"{stream}/buffer"))
    while not meter.off:
        tell(meter, await gauges())
        await asyncio.sleep(TELL_SECONDS)


def tell(meter: Meter, now: Gauges) -> None:
    meter.tell(
        saeray_buffer_slots=now.slots,
        saeray_buffer_used_blocks=now.used,
        saeray_buffer_ready_blocks=now.ready,
        saeray_buffer_readers=len(now.readers),
        saeray_buffer_detached_readers=len(now.detached),
        saeray_harvesters=now.n_harvesters - now.n_down,
        saeray_harvested_tokens=now.harvested_tokens,
        saeray_cached_tokens=now.cached_tokens,
        saeray_resampling_tokens=now.resampling_tokens,
    )
