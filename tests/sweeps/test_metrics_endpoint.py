"""A sweep's buffer, harvesters and packs at the endpoint that Prometheus reads."""

from collections import defaultdict

import pytest
from ray._private import state
from ray.core.generated import gcs_pb2
from support.scraped import scraping

import saeray
from saeray.actors.gauges import COUNTER, METRICS


def called(ray):
    """What Ray's dashboard calls the actors that there have been."""
    table = state.state._connect_and_get_accessor().get_actor_table(None, None)
    return {gcs_pb2.ActorTableData.FromString(of).repr_name for of in table}


@pytest.mark.slow
def test_prometheus_sees_a_sweep_while_it_runs(ray_instance, tiny, tmp_path):
    # 96 blocks of 16 * 64 tokens, 2 SAEs; 3 half buffers of 2 blocks.
    fields = tiny | dict(
        lr=[1e-3, 2e-3], training_tokens=96 * 1024, resources=dict(harvesters=2), wait_limit_s=120
    )
    with scraping() as seen:
        result = saeray.sweep(fields, name="scraped", storage_path=tmp_path, live=False)
    assert result.ok

    mine = [s for s in seen if s.tags.get("sweep") == "scraped"]
    values, series = defaultdict(list), defaultdict(set)
    for sample in mine:
        name = sample.name.removeprefix("ray_").removesuffix("_total")
        metric = METRICS[name]
        assert sample.kind == metric.kind
        assert (metric.kind == COUNTER) == sample.name.endswith("_total")
        assert set(metric.tags) <= sample.tags.keys()
        series[name].add(tuple(sample.tags[tag] for tag in metric.tags))
        values[name].append(sample.value)
    # These two count what this sweep does not do.
    assert values.keys() == METRICS.keys() - {"saeray_cached_tokens", "saeray_resampling_tokens"}

    (stream,) = {stream for _, stream in series["saeray_buffer_slots"]}
    assert series["saeray_harvester_tokens"] <= {
        ("scraped", stream, number) for number in ("0", "1")
    }
    assert series["saeray_pack_saes"] == {("scraped", "pack-001")}
    assert set(values["saeray_buffer_slots"]) == {6.0}
    assert 0 < max(values["saeray_buffer_used_blocks"]) <= 6
    assert max(values["saeray_buffer_ready_blocks"]) <= 6
    assert max(values["saeray_harvesters"]) == 2
    assert max(values["saeray_pack_saes"]) == 2
    assert 0 < max(values["saeray_harvested_tokens"]) <= 96 * 1024
    for name in ("saeray_harvester_tokens", "saeray_harvester_blocks"):
        assert max(values[name]) % {"saeray_harvester_tokens": 1024}.get(name, 1) == 0
    assert 0 < max(values["saeray_pack_trained_tokens"]) <= 2 * 96 * 1024
    step, busy = values["saeray_pack_step_seconds"], values["saeray_pack_busy_seconds"]
    assert 0 < max(step) <= max(busy)

    roles = ("roster", "token-server", "harvester-0", "harvester-1", "buffer", "trial")
    there = called(ray_instance)
    assert {f"scraped: {role}" for role in roles} <= there
    assert any(name.startswith("scraped: pack-001-") for name in there)
