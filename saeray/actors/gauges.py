"""What a sweep's actors say of themselves to Prometheus, by way of Ray's metrics.

Each node's agent of Ray serves them at the node's `MetricsExportPort`, with `ray_` before each name
and, of counters, `_total` after it; docs/cluster.md says how they are looked at. A value is told in
microseconds, in this process; Ray sends it on in a thread of its own, every 10 s, and drops it
where there is no agent. Nothing of it ends a sweep.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import ray

logger = logging.getLogger(__name__)

GAUGE, COUNTER = "gauge", "counter"


class Metric(NamedTuple):
    """One figure, per combination of its tags."""

    kind: str
    tags: tuple[str, ...]
    words: str


OF_STREAM = ("sweep", "stream")
OF_HARVESTER = (*OF_STREAM, "harvester")
OF_PACK = ("sweep", "pack")

METRICS = {
    "saeray_buffer_slots": Metric(GAUGE, OF_STREAM, "Blocks that the buffer may hold."),
    "saeray_buffer_used_blocks": Metric(GAUGE, OF_STREAM, "Blocks held or under way."),
    "saeray_buffer_ready_blocks": Metric(GAUGE, OF_STREAM, "Blocks that readers can have."),
    "saeray_buffer_readers": Metric(GAUGE, OF_STREAM, "Ranks of packs that read the stream."),
    "saeray_buffer_detached_readers": Metric(
        GAUGE, OF_STREAM, "Readers too far behind, which are served on their own."
    ),
    "saeray_harvesters": Metric(GAUGE, OF_STREAM, "Language models that are up."),
    "saeray_harvested_tokens": Metric(COUNTER, OF_STREAM, "LM tokens computed for the buffer."),
    "saeray_cached_tokens": Metric(COUNTER, OF_STREAM, "LM tokens read from the cache instead."),
    "saeray_resampling_tokens": Metric(COUNTER, OF_STREAM, "LM tokens run to pick new features."),
    "saeray_harvester_tokens": Metric(COUNTER, OF_HARVESTER, "LM tokens this harvester computed."),
    "saeray_harvester_blocks": Metric(COUNTER, OF_HARVESTER, "Blocks this harvester has made."),
    "saeray_harvester_busy_seconds": Metric(COUNTER, OF_HARVESTER, "Seconds it took for them."),
    "saeray_pack_saes": Metric(GAUGE, OF_PACK, "SAEs that train in the pack."),
    "saeray_pack_trained_tokens": Metric(
        COUNTER, OF_PACK, "SAE-tokens: one for each token that one SAE was trained on."
    ),
    "saeray_pack_waiting_seconds": Metric(COUNTER, OF_PACK, "Seconds it waited for activations."),
    "saeray_pack_busy_seconds": Metric(COUNTER, OF_PACK, "Seconds it did anything with them."),
    "saeray_pack_step_seconds": Metric(COUNTER, OF_PACK, "Seconds of these in the SAEs' step."),
}


class Meter:
    """Tells the metrics of one actor. Without Ray it tells nobody."""

    def __init__(self, **tags: str) -> None:
        """tags: of all it tells; those that a metric does not have are left out. None: nobody's."""
        self.tags = tags
        self.known: dict[str, Any] = {}
        self.totals: dict[str, float] = {}  # of counters, as told last
        self.off = not tags or not ray.is_initialized()

    def tell(self, **values: float) -> None:
        """Gauges as they are, and counters as what they have come to in all, by their names."""
        if self.off:
            return
        try:
            for name, value in values.items():
                self.tell_one(name, value)
        except Exception:  # whatever it is: a figure less, and the sweep goes on
            self.off = True
            logger.exception("metrics are switched off for this process")

    def add(self, **more: float) -> None:
        """To counters."""
        self.tell(**{name: self.totals.get(name, 0.0) + by for name, by in more.items()})

    def tell_one(self, name: str, value: float) -> None:
        of = METRICS[name]
        if name not in self.known:
            from ray.util import metrics

            kind = metrics.Gauge if of.kind == GAUGE else metrics.Counter
            made = kind(name, description=of.words, tag_keys=of.tags)
            self.known[name] = made.set_default_tags({tag: self.tags[tag] for tag in of.tags})
        if of.kind == GAUGE:
            self.known[name].set(value)
            return
        more = value - self.totals.get(name, 0.0)
        if more > 0:
            self.known[name].inc(more)
            self.totals[name] = value
