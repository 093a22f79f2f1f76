"""Reports: what comes back with an evaluation."""

import asyncio
from types import SimpleNamespace

from saeray.cluster.reports import Reports


def test_warnings_of_an_evaluation_reach_the_user_and_no_log():
    said = []

    async def evaluated(*_):
        return {"eval/n_tokens": 128, "metrics/l0": 3.0, "warnings": ["no better than chance"]}

    async def warn(text):
        said.append(text)

    harvester = SimpleNamespace(evaluate=SimpleNamespace(remote=evaluated))
    stream = SimpleNamespace(held_out="ref", harvesters=[harvester], ready=[0], evaluations=0)
    entry = SimpleNamespace(config=SimpleNamespace(resolved_hook_point="hook"))
    reports = SimpleNamespace(state=SimpleNamespace(warn=warn), evaluation_tokens=0)
    metrics = asyncio.run(Reports.evaluate(reports, entry, stream, "weights"))
    assert metrics == {"eval/n_tokens": 128, "metrics/l0": 3.0}
    assert said == ["no better than chance"]
    assert reports.evaluation_tokens == 128
