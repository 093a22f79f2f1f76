"""How many reports of SAEs a second the roster takes: packs that do nothing but report.

    python benchmarks/reports.py                    # 64 packs of 16 SAEs; a minute on 2 cores
    python benchmarks/reports.py --packs 8 --reports 400

Everything else is as in scale.py: the real roster, its logs and rows, and tasks that make the calls
of trials, 16 at a time. A pack sends its next report when the roster has answered the one before,
as `Pack` does, and on two cores the packs' own work is part of what is measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import ray
import scale

from saeray.actors import waiting
from saeray.files.metrics_log import read_lines
from saeray.spec.messages import DONE, NOTHING, ReaderGauges, Report

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Reporters(scale.FakeTrainers):
    """Packs of which each SAE is reported of as often as there are steps, and nothing else."""

    def run(self, pack: str, roster_handle: Any, limit: float) -> None:
        plan = waiting.poll(lambda: roster_handle.plan.remote(pack), limit, "roster")
        if plan.pack == NOTHING.pack:
            self.problems[pack] = None
            return
        steps = next(iter(plan.configs.values()))["training_tokens"] // scale.BLOCK_ROWS
        settled: dict[str, int] = {}
        began = time.time()
        for step in range(1, steps + 1):
            tokens = step * scale.BLOCK_ROWS
            metrics = scale.made_up(tokens) | {"reports/began": began, "reports/sent": time.time()}
            news = [Report(name, step, tokens, metrics) for name in plan.configs]
            if step == steps:
                weights = ray.put({"W": np.zeros(8, dtype=np.float32)})
                news = [
                    r._replace(state=DONE, snapshot=[weights], path=f"{r.name}/final") for r in news
                ]
            call = roster_handle.report.remote(pack, news, ReaderGauges(0.0, time.time() - began))
            settled = waiting.get(call, limit, "roster").settled
        while any(settled.get(name, 0) < steps for name in plan.configs):
            settled = waiting.poll(
                lambda: roster_handle.settled.remote(pack), limit, "roster"
            ).settled
        self.problems[pack] = None


class ReportedTo(scale.SimulatedRoster):
    """The roster, with such packs."""

    trainers = Reporters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packs", type=int, default=64)
    parser.add_argument("--saes", type=int, default=16, help="of a pack")
    parser.add_argument("--reports", type=int, default=100, help="of an SAE")
    args = parser.parse_args()
    saes = args.packs * args.saes
    size = scale.Size("reports", 8, 8, args.packs, 8, saes, False, 1, args.reports)
    with tempfile.TemporaryDirectory() as folder, scale.cluster():
        _, rows = scale.run(size, folder, ReportedTo)
        logs = [read_lines(scale.Folder.at(folder) / "reports/trials" / r["trial"]) for r in rows]
        files = sum(f.stat().st_size for f in Path(folder).rglob("metrics.jsonl"))
    done = Counter(r["status"] for r in rows)[DONE]
    n = sum(map(len, logs))
    began = min(log[0]["reports/began"] for log in logs)
    ended = max(log[-1]["reports/sent"] for log in logs)
    print(f"{args.packs} packs of {args.saes} SAEs, {args.reports} reports of each: {done} done")
    print(f"{n:,} reports, {files / 1e6:.0f} MB of logs, in {ended - began:.0f} s")
    print(f"{n / (ended - began):,.0f} reports a second")


if __name__ == "__main__":
    main()
