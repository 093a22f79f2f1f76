"""Launcher: the actor that runs one pack's Ray Train run to its end, `<roster>/<pack>` by name.

It belongs to no process, like the actors of streams: a roster that was started again finds it.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayActorError, RayError

from saeray.actors.environment import TRIED_WITH, quieten_train
from saeray.actors.make import actor, end_at_sigterm
from saeray.actors.nodes import namespace, on_head
from saeray.actors.waiting import POLL_SECONDS, NotYet, steadily
from saeray.spec.fitted import Fitted
from saeray.stream.launch import Stream, running_stream

RESTARTS = 3  # of a pack's worker group, by Ray Train


class AboutPack(NamedTuple):
    """What its launcher knows of a pack, in plain data."""

    name: str  # never used twice: Ray Train would take the second for the first, resumed
    stream: str
    configs: dict[str, dict[str, Any]]  # by SAE
    fitted: Fitted
    tries: int = 0  # before this one, in which nothing new was saved


class Ended(NamedTuple):
    """How a pack's trainer has ended."""

    problem: str | None  # why it failed, if it did
    killed: bool = False  # its processes died; it did not fail by itself


class Launcher:
    """The actor that runs one pack's trainer to its end."""

    def __init__(self, about: AboutPack, roster: Any, storage_path: str, wait_limit_s: float):
        self.about = about
        self.ended = threading.Event()
        self.how = Ended(None)
        self.thread = threading.Thread(
            target=self.run, args=(roster, storage_path, wait_limit_s), daemon=True
        )
        self.thread.start()

    def describe(self) -> AboutPack:
        return self.about

    def outcome(self) -> Ended | NotYet:
        """How the trainer ended, once it has."""
        if self.ended.wait(POLL_SECONDS):
            return self.how
        return NotYet(f"the trainer of {self.about.name}")

    def run(self, roster: Any, storage_path: str, wait_limit_s: float) -> None:
        try:
            fit_pack(self.about, roster, storage_path, wait_limit_s)
        except Exception as error:
            self.how = ended_by(error)
        finally:
            self.ended.set()


def ended_by(error: BaseException) -> Ended:
    """How a trainer ended that raised this."""
    if isinstance(error, RayActorError):
        return Ended("Ray Train's controller died", killed=True)
    failures = getattr(error, "worker_failures", {})
    if failures and all(isinstance(e, RayActorError) for e in failures.values()):
        return Ended(f"its workers died {RESTARTS + 1} times", killed=True)
    return Ended(str(error))


def start_launcher(
    name: str, about: AboutPack, roster: Any, storage_path: str, wait_limit_s: float
) -> Any:
    # Not started again by Ray: a trainer goes with its launcher, and the roster sees to both.
    return actor(Launcher, name, max_restarts=0, max_concurrency=4, **on_head()).remote(
        about, roster, storage_path, wait_limit_s
    )


def fit_pack(about: AboutPack, roster: Any, storage_path: str, wait_limit_s: float) -> None:
    """Runs one pack's trainer to its end."""
    quieten_train()
    from ray import train

    fitted = about.fitted
    per_worker = dict(fitted.trainer.resources)
    trainer_class(fitted.num_workers)(
        in_each_worker,
        train_loop_config={"roster": roster, "pack": about.name, "wait_limit_s": wait_limit_s},
        scaling_config=train.ScalingConfig(
            num_workers=fitted.num_workers,
            use_gpu=fitted.trainer_gpus > 0,
            resources_per_worker=per_worker,
            label_selector=dict(fitted.trainer_labels) or None,
        ),
        run_config=train.RunConfig(
            name=about.name,
            storage_path=storage_path,
            failure_config=train.FailureConfig(max_failures=RESTARTS),
            callbacks=[ends_at_sigterm()],
        ),
    ).fit()


def ends_at_sigterm() -> Any:
    """A callback of Ray Train that has its controller end at SIGTERM, as all our actors do."""
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class EndsAtSigterm(ControllerCallback):
        def after_controller_start(self, *_: Any, **__: Any) -> None:
            end_at_sigterm()

    return EndsAtSigterm()


def trainer_class(n_ranks: int) -> Any:
    """Ray Train's, for a pack of so many ranks.

    One rank has no process group, and so no need of `TorchTrainer`: that imports torch here and in
    Ray Train's controller, where nobody else does, before any worker starts.
    """
    if n_ranks > 1:
        from ray.train.torch import TorchTrainer as Trainer
    else:
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer as Trainer
    if ray.__version__.startswith(TRIED_WITH):
        from saeray.cluster.lean_trainer import lean

        return lean(Trainer)
    return Trainer


def in_each_worker(settings: dict[str, Any]) -> None:
    """What Ray Train runs. The pack's loop needs torch, which the launcher does without."""
    end_at_sigterm()
    from saeray.cluster.pack import train_pack

    train_pack(settings)


async def found_again(roster: str) -> tuple[list[Stream], list[tuple[AboutPack, Any]]]:
    """The streams and packs of a roster that was started again.

    Halves of a stream are ended, and so are packs whose stream is not there. Streams that it shares
    with other sweeps are those that its packs read.
    """
    prefix = f"{roster}/"
    listed = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
    names = [
        a["name"] for a in listed if a["namespace"] == namespace() and a["name"].startswith(prefix)
    ]
    handles = {}
    for name in names:
        try:
            handles[name] = ray.get_actor(name, namespace())
        except ValueError:
            continue  # just gone
    packs = []
    for name, handle in handles.items():
        if name.count("/") == prefix.count("/"):
            try:
                packs.append((await steadily(handle.describe.remote), handle))
            except RayError:
                continue  # it has died
    wanted = {n.removesuffix("/buffer") for n in handles if n.endswith("/buffer")}
    wanted |= {about.stream for about, _ in packs}
    found = [await running_stream(name) for name in sorted(wanted)]
    streams = [stream for stream in found if stream is not None]
    whole = {s.about.name for s in streams}
    for name, handle in handles.items():
        if name.count("/") > prefix.count("/") and name.rpartition("/")[0] not in whole:
            ray.kill(handle)
    for about, handle in packs:
        if about.stream not in whole:
            ray.kill(handle)  # its processes go with it, and its SAEs are launched again
    return streams, [(about, handle) for about, handle in packs if about.stream in whole]
