"""How large a sweep the control plane holds: a fake language model, fake trainers, the rest real.

    python benchmarks/scale.py                       # both sizes, about 10 minutes on 2 cores
    python benchmarks/scale.py --sizes large         # or one of them
    python benchmarks/scale.py --sizes large --readers 64 --blocks 2048

Real: Roster, SAETrial (size `processes`), ActivationBuffer, their calls, references and folders, on
a `cluster_utils.Cluster` of a head and four nodes. Fake: harvesters that return the same array at
once, a token server that makes up tokens, and trainers that ask for windows as `Reader` does, get
the blocks, and report as `Pack` does, without computing anything. So what is left is the overhead.

Size `processes` has a process for each harvester, reader and trial. Size `large` has more of them
than processes: several harvester handles are one actor, readers are threads, and trials are tasks
that make the calls of `SAETrial`. Size `turns` has as many SAEs as `large`, each a real trial of
Ray Tune, which come in turns. `docs/scale.md` says what each figure means and extrapolates.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("WANDB_MODE", "disabled")

import numpy as np
import psutil
import ray

from saeray.actors import waiting
from saeray.actors.names import roster_name
from saeray.actors.waiting import NotYet
from saeray.cluster import dispatch
from saeray.cluster.launcher import AboutPack, Ended
from saeray.cluster.roster import Roster
from saeray.errors import SaerayError
from saeray.files.metrics_log import read_lines
from saeray.files.storage import Folder
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.grid import expand
from saeray.spec.memory import TRIALS_AT_ONCE
from saeray.spec.messages import DONE, ENDS, NOTHING, ReaderGauges, Report, reader_name
from saeray.stream import launch
from saeray.stream.harvester import Harvested

# A worker process can't import this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

CONTEXT, CONTEXTS, D_IN = 64, 16, 32
BLOCK_ROWS = CONTEXT * CONTEXTS
BLOCK_BYTES = BLOCK_ROWS * D_IN * 4  # 128 KiB: above 100 KiB, so it goes through the object store
HOOK = "blocks.0.hook_resid_pre"
NODES, NODE_CPUS = 4, 2
SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class Size:
    """One run."""

    name: str
    harvesters: int
    harvester_processes: int
    readers: int  # packs of one rank each
    reader_processes: int
    saes: int
    trial_processes: bool  # a real SAETrial for each SAE, under Tune
    group_blocks: int  # half a buffer
    blocks: int


SIZES = {
    "processes": Size("processes", 32, 32, 16, 16, 48, True, 64, 4096),
    "large": Size("large", 256, 8, 128, 8, 1024, False, 256, 4096),
    "turns": Size("turns", 32, 8, 128, 8, 1024, True, 64, 1024),
}


# --- fakes ----------------------------------------------------------------------------------


class FakeTokens:
    """A token server without text."""

    def __init__(self, config: dict[str, Any], environment: Any = None) -> None:
        pass

    def check(self) -> None:
        pass

    def block(self, index: int) -> np.ndarray:
        return np.full((CONTEXTS, CONTEXT), index, dtype=np.int32)

    def held_out(self) -> np.ndarray:
        return np.zeros((1, CONTEXT), dtype=np.int32)

    def counts(self) -> Any:
        return SimpleNamespace(epochs=1, skipped_rows=0, warnings=[])


class FakeModel:
    """A harvester without a model: every block is the same array."""

    def __init__(self, config: dict[str, Any], hook_points: list[str], environment: Any = None):
        self.array = np.zeros((BLOCK_ROWS, D_IN), dtype=np.float32)

    def check(self, configs: list[dict[str, Any]]) -> Any:
        return SimpleNamespace(
            d_in={HOOK: D_IN}, d_vocab=1, device="cpu", warnings=(), parameter_bytes=0
        )

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def harvest(self, index: int, tokens: np.ndarray, cache: Any = None) -> tuple[Any, ...]:
        return Harvested(index, tokens.size, 0.0), self.array

    def evaluate(
        self, hook_point: str, held_out: np.ndarray, final: bool, *weights: Any
    ) -> list[dict[str, Any]]:
        figures = {"metrics/CE_loss_score": 0.9, "metrics/l0": 30.0}
        return [{"eval/n_tokens": held_out.size, **figures} for _ in weights]


class FakeTrainers:
    """Stands for the launchers and trainers of some packs; each pack is a thread here."""

    def __init__(self) -> None:
        self.problems: dict[str, str | None] = {}
        self.threads: dict[str, threading.Thread] = {}

    def start(self, about: AboutPack, roster_handle: Any, limit: float) -> None:
        thread = threading.Thread(target=self.run, args=(about.name, roster_handle, limit))
        self.threads[about.name] = thread
        thread.start()

    def run(self, pack: str, roster_handle: Any, limit: float) -> None:
        try:
            train(pack, roster_handle, limit)
            self.problems[pack] = None
        except Exception as error:
            self.problems[pack] = f"{type(error).__name__}: {error}"

    def outcome(self, pack: str) -> tuple[str | None] | NotYet:
        if self.threads[pack].is_alive():
            return NotYet(pack)
        return (self.problems[pack],)


def train(pack: str, roster_handle: Any, limit: float) -> None:
    """One rank's share of `train_pack`: every window in turn, a report of every SAE after each."""
    plan = waiting.poll(lambda: roster_handle.plan.remote(pack), limit, "roster")
    if plan.pack == NOTHING.pack:
        return
    configs = {n: LanguageModelSAERunnerConfig.from_dict(c) for n, c in plan.configs.items()}
    order, name = plan.order, reader_name(pack, 0)
    reports: list[Report] = []
    call = None
    asks = not_yet = 0
    waited = longest = 0.0
    kept: list[Any] = []
    started = time.perf_counter()
    for window in range(order.n_windows):
        asked = time.perf_counter()
        answer = NotYet("")
        while isinstance(answer, NotYet):
            if time.perf_counter() - asked > limit:
                raise SaerayError(f"window {window} of {pack}: {answer.late} for {limit:g} s")
            answer = waiting.ask(
                lambda w=window: plan.buffer.window.remote(name, w, [], len(kept)),  # noqa: B023
                limit,
                "buffer",
            )
            if isinstance(answer, NotYet) and answer.let_go:
                kept.clear()
            asks += 1
            not_yet += isinstance(answer, NotYet)
        refs = [of_block[0] for of_block in answer.refs]
        arrays = waiting.get(refs, limit, "object store")
        arrays = [*kept, *arrays]
        assert len(arrays) == len(order.blocks_of(window))
        kept = arrays[-len(order.group(window)) :]
        longest = max(longest, time.perf_counter() - asked)
        waited += time.perf_counter() - asked
        del arrays, refs, answer  # as Reader does before it asks for the next one
        if call is not None:  # Pack.take_answer
            settled = waiting.get(call, limit, "roster").settled
            reports = [r for r in reports if r.step > settled.get(r.name, 0)]
        tokens = order.window_start(window + 1)
        news = []
        for sae, config in configs.items():
            metrics = made_up(tokens) | {
                "scale/asks": asks,
                "scale/not_yet": not_yet,
                "scale/longest_wait": longest,
            }
            step = min(tokens // config.train_batch_size, config.steps)
            report = Report(sae, step, tokens, metrics)
            if window == order.n_windows - 1:
                weights = ray.put({"W": np.zeros(8, dtype=np.float32)})
                report = report._replace(state=DONE, snapshot=[weights], path=f"{sae}/final")
            news.append(report)
        reports += news
        gauges = ReaderGauges(waited, time.perf_counter() - started - waited)
        call = roster_handle.report.remote(pack, news, gauges)
    while reports:  # Pack.wait_until_settled
        answer = waiting.poll(lambda: roster_handle.settled.remote(pack), limit, "roster")
        reports = [r for r in reports if r.step > answer.settled.get(r.name, 0)]
    waiting.ask(lambda: plan.buffer.leave.remote(name), limit, "buffer")


def made_up(tokens: int) -> dict[str, Any]:
    """As many metrics as a pack reports of an SAE."""
    named = ("losses/overall_loss", "metrics/l0", "metrics/explained_variance")
    return {
        **dict.fromkeys(named, 1.0),
        **{f"metrics/other_{i}": float(i) for i in range(16)},
        "details/n_training_tokens": tokens,
        "plots/feature_density_line_chart": {"counts": [1] * 60, "edges": [0.1] * 61},
    }


class FakeTrials:
    """Tasks that make the calls of as many `SAETrial`s, in turns as those come."""

    async def run(self, handle: Any, configs: dict[str, dict[str, Any]]) -> None:
        places = asyncio.Semaphore(TRIALS_AT_ONCE)

        async def in_turn(name: str, config: dict[str, Any]) -> None:
            async with places:
                await self.one(handle, name, config)

        await asyncio.gather(*(in_turn(name, c) for name, c in configs.items()))

    async def one(self, handle: Any, name: str, config: dict[str, Any]) -> None:
        await handle.enlist.remote(name, config)
        number, state = 0, ""
        while state not in ENDS:
            result = await handle.next_result.remote(name, number)
            if not isinstance(result, NotYet):
                number, state = result.number, result.state
        await handle.withdraw.remote(name)


class SimulatedRoster(Roster):
    """The roster, which starts fakes instead of language models, text and trainers."""

    trainers = FakeTrainers

    def __init__(self, sweep: str, folder: str, environment: dict[str, str], size: Size) -> None:
        self.hosts: dict[str, Any] = {}  # pack -> the actor that trains it
        self.size = size
        launch.Harvester, launch.TokenServer = FakeModel, FakeTokens
        launch.actor = shared_harvesters(launch.actor, size.harvester_processes)
        dispatch.start_launcher = self.start_fake
        super().__init__(sweep, folder, environment)
        self.dispatch.end_of = self.end_of

    def start_fake(
        self, name: str, about: AboutPack, handle: Any, storage_path: str, limit: float
    ) -> Any:
        n = len(self.hosts)
        if n < self.size.reader_processes:
            host = launch.actor(
                self.trainers, name, max_restarts=0, max_concurrency=64,
                scheduling_strategy="SPREAD",
            ).remote()  # fmt: skip
        else:
            host = list(self.hosts.values())[n % self.size.reader_processes]
        self.hosts[about.name] = host
        host.start.remote(about, handle, limit)
        return host

    async def end_of(self, pack: Any, limit: float) -> Ended:
        """As `Dispatch` does, without killing a process that others still use."""
        host = self.hosts[pack.about.name]
        while isinstance(outcome := await host.outcome.remote(pack.about.name), NotYet):
            await asyncio.sleep(1.0)
        return Ended(outcome[0])


def shared_harvesters(real: Any, n_processes: int) -> Any:
    """`launch.actor`, but that only the first `n_processes` harvesters are actors of their own."""
    made: list[Any] = []

    def actor(cls: type, name: str, **options: Any) -> Any:
        made_before = len(made)
        if cls is not FakeModel:
            return real(cls, name, **options)
        if made_before >= n_processes:
            made.append(made[made_before % n_processes])
            return SimpleNamespace(remote=lambda *_: made[made_before])

        def remote(*args: Any) -> Any:
            made.append(real(cls, name, **options).remote(*args))
            return made[-1]

        return SimpleNamespace(remote=remote)

    return actor


# --- measuring ------------------------------------------------------------------------------


@dataclass
class Sample:
    """The processes at one moment."""

    at: float
    blocks: int  # harvested
    cpu: dict[str, float]  # seconds by role
    busiest: float  # of the buffer's threads
    memory: dict[str, tuple[int, int]]  # by role: (RSS, PSS without shared memory), the largest
    spent: float = 0.0


@dataclass
class Watch:
    """Samples a run from a thread of the driver."""

    handle: Any
    samples: list[Sample] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    trial_pss: list[int] = field(default_factory=list)

    def run(self) -> None:
        buffer = None
        while not self.stop.wait(SAMPLE_SECONDS):
            try:
                buffer = buffer or buffer_handle()
                if buffer is not None:
                    gauges = ray.get(buffer.gauges.remote(), timeout=60)
                    self.samples.append(self.sample(gauges.harvested_tokens // BLOCK_ROWS))
            except (ray.exceptions.RayError, psutil.Error, OSError):
                continue  # at the end, or while something starts

    def sample(self, blocks: int) -> Sample:
        cpu: Counter[str] = Counter()
        memory: dict[str, tuple[int, int]] = {}
        busiest, trials = 0.0, []
        roles = roles_by_pid()
        for process in psutil.process_iter(["pid", "name"]):
            pid, name = process.info["pid"], process.info["name"]
            role = roles.get(pid) or ({"raylet": "raylets", "gcs_server": "GCS"}.get(name))
            if pid == os.getpid():
                role = "driver"
            if role is None:
                continue
            times = process.cpu_times()
            cpu[role] += times.user + times.system
            if role in ("buffer", "roster", "trial"):
                memory[role] = max(memory.get(role, (0, 0)), memory_of(pid))
            if role == "trial":
                trials.append(memory_of(pid)[1])
            if role == "buffer":
                busiest = max(t.user_time + t.system_time for t in process.threads())
        if len(trials) >= len(self.trial_pss):
            self.trial_pss = trials
        return Sample(time.monotonic(), blocks, dict(cpu), busiest, memory)

    def steady(self, size: Size) -> tuple[Sample, Sample]:
        """From when the buffer was full for the first time to the last block but a few."""
        inside = [s for s in self.samples if 3 * size.group_blocks <= s.blocks < size.blocks]
        if len(inside) < 2:
            raise SystemExit("too short a run to measure; take more --blocks")
        return inside[0], inside[-1]

    def most(self, role: str) -> tuple[int, int]:
        found = [s.memory[role] for s in self.samples if role in s.memory]
        return max((r for r, _ in found), default=0), max((p for _, p in found), default=0)


ROLES = {
    "ActivationBuffer": "buffer",
    "SimulatedRoster": "roster",
    "FakeModel": "harvesters",
    "FakeTokens": "token server",
    "FakeTrainers": "readers",
    "FakeTrials": "trials (tasks)",
    "SAETrial": "trial",
}


def roles_by_pid() -> dict[int, str]:
    from ray._private.state import actors

    kinds = {int(a["Pid"]): a["ActorClassName"].split(".")[-1] for a in actors().values()}
    return {pid: ROLES[kind] for pid, kind in kinds.items() if kind in ROLES and pid}


def buffer_handle() -> Any:
    for a in ray.util.list_named_actors(all_namespaces=True):
        if a["name"].endswith("/buffer"):
            return ray.get_actor(a["name"], a["namespace"])
    return None


def memory_of(pid: int) -> tuple[int, int]:
    """(RSS, PSS of what is no shared memory: its share of libraries, and all that is its own)."""
    found = Counter()
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, _, rest = line.partition(":")
        found[key] = int(rest.split()[0]) * 1024
    return found["Rss"], found["Pss"] - found["Pss_Shmem"]


# --- running --------------------------------------------------------------------------------


@contextmanager
def cluster() -> Iterator[str]:
    """A head without CPUs and some nodes, all of them here; this process is its driver."""
    from ray.cluster_utils import Cluster

    from saeray.client.connect import all_ended, start_ray

    os.environ["RAY_task_events_report_interval_ms"] = "0"  # noqa: SIM112 (as `start_ray` does)
    # What its trainers and trials would take is counted before the start; fakes take next to none.
    store = dict(object_store_memory=300_000_000, memory=10**12)
    made = Cluster(
        initialize_head=True,
        head_node_args=dict(num_cpus=0, include_dashboard=False, **store),
    )
    try:
        for _ in range(NODES):
            made.add_node(num_cpus=NODE_CPUS, **store)
        start_ray(made.address)
        yield made.address
    finally:
        with all_ended(made.list_all_nodes()):
            ray.shutdown()
            made.shutdown()


def config_of(size: Size, folder: str) -> LanguageModelSAERunnerConfig:
    """The sweep: as many SAEs as wanted, on a stream of as many blocks."""
    cpus = NODES * NODE_CPUS
    return LanguageModelSAERunnerConfig(
        model_name="fake",
        hook_point=HOOK,
        dataset_path="fake",
        context_size=CONTEXT,
        store_batch_size=CONTEXTS,
        n_batches_in_buffer=2 * size.group_blocks,
        training_tokens=size.blocks * BLOCK_ROWS,
        train_batch_size=BLOCK_ROWS,
        l1_coefficient=[1e-3 * (1 + i) for i in range(size.saes)],
        lr=1e-3,
        log_to_wandb=False,
        device="cpu",
        resources={
            "harvesters": size.harvesters,
            "harvester_cpus": round(0.8 * cpus / size.harvesters, 3),
            "saes_per_trainer": size.saes // size.readers,
            "trainer_cpus": 0.01,
        },
        name=size.name,
        storage_path=folder,
    )


def run(
    size: Size, folder: str, kind: type[SimulatedRoster] = SimulatedRoster
) -> tuple[Watch, list[dict[str, Any]]]:
    """One sweep of this size on the cluster that is there; its results, row by row."""
    import saeray
    from saeray.files.sweep_folder import SweepFolder

    config = config_of(size, folder)
    place = Folder.at(folder) / size.name
    handle = launch.actor(
        kind,
        roster_name(size.name, place.uri),
        max_concurrency=1000,
        **launch.on_head(),
    ).remote(size.name, place.uri, {}, size)
    watch = Watch(handle)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        if size.trial_processes:
            saeray.sweep(config, live=False)
        else:
            configs = {s.name: s.config.to_dict() for s in expand(config)}
            limit = config.wait_limit_s
            assert waiting.ask(lambda: handle.begin.remote(configs, {}), limit, "roster")
            trials = ray.remote(FakeTrials).options(num_cpus=0, max_concurrency=2).remote()
            ended = trials.run.remote(handle, configs)
            while not ray.wait([ended], timeout=1.0)[0]:
                waiting.ask(handle.status.remote, limit, "roster")  # as the live view does
            ray.get(ended)
            ray.get(handle.close.remote())
    finally:
        watch.stop.set()
        thread.join(timeout=60)
    return watch, SweepFolder(place, size.name).read_rows()


def measured(size: Size) -> dict[str, str]:
    """One size's column of the table."""
    with tempfile.TemporaryDirectory() as folder:
        with cluster():
            started = time.monotonic()
            watch, rows = run(size, folder)
            took = time.monotonic() - started
        trials = Folder.at(folder) / size.name / "trials"
        last = [read_lines(trials / row["trial"])[-1] for row in rows]
    done = [row for row in rows if row["status"] == DONE]
    asks = {x["scale/asks"] for x in last}
    a, b = watch.steady(size)
    n = b.blocks - a.blocks

    def per_block(role: str) -> float:
        return 1e3 * (b.cpu.get(role, 0.0) - a.cpu.get(role, 0.0)) / n

    refs = size.readers * n / (b.at - a.at)
    trials = watch.trial_pss
    column = {
        "harvesters (processes)": f"{size.harvesters} ({size.harvester_processes})",
        "readers (processes)": f"{size.readers} ({size.reader_processes})",
        "SAEs (trial processes)": f"{size.saes} ({len(trials)})",
        "blocks; of them a window": f"{size.blocks}; {2 * size.group_blocks}",
        "SAEs done": f"{len(done)}",
        "waits that timed out": f"{sum('wait_limit_s' in (r['error'] or '') for r in rows)}",
        "“not yet” among all answers": (
            f"{max(x['scale/not_yet'] for x in last)} of {max(asks)} (the worst reader)"
        ),
        "longest wait for a window": f"{max(x['scale/longest_wait'] for x in last):.1f} s",
        "seconds, start to end": f"{took:.0f}",
        "wall ms per block": f"{1e3 * (b.at - a.at) / n:.2f}",
        "references handed out per s": f"{refs:,.0f}",
        "buffer, CPU ms per block": f"{per_block('buffer'):.2f}",
        "… of its busiest thread": f"{1e3 * (b.busiest - a.busiest) / n:.2f}",
    }
    for role in sorted(set(b.cpu) - {"buffer", "driver"}):
        column[f"{role}, CPU ms per block"] = f"{per_block(role):.2f}"
    for role in ("buffer", "roster"):
        rss, pss = watch.most(role)
        column[f"{role}, RSS (PSS) MB"] = f"{rss / 1e6:.0f} ({pss / 1e6:.0f})"
    if trials:
        column["trials, PSS MB: sum (mean)"] = (
            f"{sum(trials) / 1e6:,.0f} ({np.mean(trials) / 1e6:.0f})"
        )
    return column


def table(columns: dict[str, dict[str, str]]) -> str:
    """Markdown: a row per figure, a column per size."""
    rows = list(dict.fromkeys(key for c in columns.values() for key in c))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    lines += [
        f"| {row} | " + " | ".join(c.get(row, "–") for c in columns.values()) + " |" for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    changes = ("harvesters", "harvester_processes", "readers", "reader_processes", "saes",
               "group_blocks", "blocks")  # fmt: skip
    for name in changes:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in changes if getattr(args, name) is not None}
    columns = {}
    for name in args.sizes:
        columns[name] = measured(replace(SIZES[name], **given))
        print(table({name: columns[name]}), "\n", flush=True)
    if len(columns) > 1:
        print(table(columns))


if __name__ == "__main__":
    main()
