"""The pack loop: what each Ray Train worker runs. One reader, one batch at a time, every SAE steps.

A pack is a set of SAEs trained together: each batch is read and moved to the device once, at every
hook point that one of them wants. SAEs of a pack share the stream and the batch size and may differ
in everything else. An SAE that fails or is withdrawn leaves; the others do not notice.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from ray import train
from ray.exceptions import ActorUnavailableError

from saeray.actors import waiting
from saeray.actors.head_folder import seen_from_here
from saeray.actors.nodes import own_node
from saeray.cluster.checkpoint_writer import CheckpointWriter, ToWrite, checkpoint_steps
from saeray.cluster.held import Decisions, Held, held_state
from saeray.cluster.member import Member, snapshot_of, taken_of
from saeray.cluster.options import options_of
from saeray.cluster.pack_gauges import PackMeter
from saeray.cluster.preemption import NodeTakenAway, Notice
from saeray.cluster.resampling import resample
from saeray.cluster.silenced import Silenced
from saeray.cluster.start import started
from saeray.cluster.warm_up import warm_up
from saeray.errors import SaerayError
from saeray.files.checkpoint import (
    delete_others,
    newest_checkpoint,
    save_checkpoint,
    save_final,
)
from saeray.lm.load import choose_device
from saeray.sae import sparse_step
from saeray.sae.pack_step import PackStep, StepMetrics
from saeray.sae.ranks import Ranks
from saeray.spec.architectures import SPARSITY
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import (
    DONE,
    ENDS,
    FAILED,
    STOPPED,
    Answer,
    PackPlan,
    Report,
    reader_name,
)
from saeray.stream.reader import Place, Reader


def train_pack(settings: dict[str, Any]) -> None:
    """Trains the pack's SAEs to their end; runs in each Ray Train worker."""
    roster, pack = settings["roster"], settings["pack"]
    limit = settings["wait_limit_s"]
    warm_up()
    plan = waiting.poll(lambda: roster.plan.remote(pack), limit, "roster")
    if not plan.configs:
        return
    place = train.get_context()
    ranks = Ranks(place.get_world_rank(), place.get_world_size())
    try:
        Pack(plan, roster, ranks).train()
    except SaerayError as error:  # on purpose: Ray Train need not try it again
        problem = str(error)
        waiting.ask(lambda: roster.broken.remote(pack, problem), limit, "roster")


class Pack:
    """A pack in training."""

    def __init__(self, plan: PackPlan, roster: Any, ranks: Ranks) -> None:
        self.plan = plan
        self.folder = seen_from_here(plan.folder, plan.marker)
        self.ranks = ranks
        self.roster = roster
        self.configs = {
            name: LanguageModelSAERunnerConfig.from_dict(c) for name, c in plan.configs.items()
        }
        self.shared = next(iter(self.configs.values()))  # for what is equal in all of them
        self.widths = [plan.widths[h] for h in plan.hook_points]
        self.device = choose_device(self.shared.device)
        self.limit = self.shared.wait_limit_s
        self.members = [self.enrol(name, config) for name, config in self.configs.items()]
        self.step_all = PackStep(plan.threads if self.device.type == "cpu" else 1, ranks)
        self.reports: list[Report] = []  # not settled yet, in their order
        self.call: Any = None  # the roster's answer to the last reports, on its way
        self.incarnation: str | None = None  # of the roster that was told all of them
        self.withdrawn: set[str] = set()
        self.unevaluated: set[str] = set()  # whose next report shall be evaluated
        self.tune = Decisions(roster, plan.pack, self.limit, self.warn)
        self.started = 0.0  # when the first batch was asked for
        self.writer = CheckpointWriter(roster, plan.pack, self.limit, plan.special)
        self.stepped = 0.0  # seconds in the SAEs' step
        self.saved = time.monotonic()  # when the last checkpoint was due
        self.silenced = Silenced(self.warn)
        self.meter = PackMeter(self.folder.name, plan.pack, self.members)

    def enrol(self, name: str, config: LanguageModelSAERunnerConfig) -> Member:
        """A new SAE, or one that goes on from its newest valid checkpoint."""
        folder = self.folder / "trials" / name
        options = options_of(config, self.device, self.plan.widths[config.resolved_hook_point])
        found, damaged = newest_checkpoint(folder / "checkpoints")
        for reason in damaged:
            self.warn(f"{name}: checkpoint passed over: {reason}")
        if found is not None:
            trainer = found.trainer(options, self.device)
        else:
            trainer = started(config, options, self.plan, self.device, self.limit)
        hooks = tuple(self.plan.hook_points.index(h) for h in config.hooks_read)
        return Member(name, config, folder, trainer, checkpoint_steps(config), hooks)

    def train(self) -> None:
        active = list(self.members)
        first = min(m.trainer.step for m in active)
        last = max(m.config.steps for m in active)
        place = Place(
            name=reader_name(self.plan.pack, self.ranks.rank),
            widths={h: self.widths[h] for m in active for h in m.hooks},
            order=self.plan.order,
            dtype=getattr(torch, self.shared.activation_dtype),
            batch_rows=self.shared.train_batch_size,
        )
        reader = Reader(
            self.plan.buffer,
            place,
            first_batch=first,
            n_batches=last - first,
            device=self.device,
            wait_limit_s=self.limit,
        )
        nodes = {*self.ranks.gathered(own_node())}
        notice = Notice(nodes if self.ranks.is_first else set())
        self.started = time.perf_counter()
        try:
            for step, x in enumerate(reader, start=first + 1):
                # One that was resumed from a later checkpoint waits until the others are there.
                due = [m for m in active if m.trainer.step == step - 1]
                wants = any(m.config.logs_at(step) for m in due)
                began = time.perf_counter()
                xs = [tuple(x[h] for h in m.hooks) for m in due]
                metrics = self.step_all.step([m.trainer for m in due], xs, want_metrics=wants)
                self.stepped += time.perf_counter() - began
                resample(due, self.plan, self.ranks, self.limit, self.snapshot)

                if step == first + 1:
                    if self.device.type == "cpu":
                        sparse_step.prepare()  # beside the first steps, which are dense
                    if self.ranks.is_first:
                        self.tell([], reader)  # that the training has begun
                leaves = False
                if wants:
                    gone, leaves = self.ranks.first_says(
                        (self.report(due, metrics, step, reader, x), notice.given)
                        if self.ranks.is_first
                        else None
                    )
                    active = [m for m in active if m.name not in gone]
                    if not active:
                        break
                    reader.wanted = {h for m in active for h in m.hooks}
                if self.ranks.is_first:
                    self.save([m for m in due if m in active], step, leaves)
                if leaves:
                    self.leave()
            self.wait_until_settled()
            self.writer.wait()
        finally:
            notice.close()
            reader.close()

    def leave(self) -> None:
        """Ends these workers once all is written; Ray Train starts them again on other nodes."""
        if self.ranks.is_first:
            self.wait_until_settled()
            self.writer.wait()
            self.warn(f"{self.plan.pack} is saved and leaves its node, about to be taken away.")
        self.ranks.first_says(None)  # what the others wait for
        raise NodeTakenAway(f"{self.plan.pack} is saved; its node is about to be taken away")

    def save(self, due: list[Member], step: int, leaves: bool = False) -> None:
        """The checkpoints of this step: those `n_checkpoints` wants, and all when time is up.

        leaves: all, and at once.

        All at the same step, so that SAEs that go on from them go on together. They are copied
        here, and written while the training goes on, which time alone does not hold up.
        """
        every = self.shared.checkpoint_every_s
        time_is_up = every is not None and time.monotonic() - self.saved > every
        time_is_up = time_is_up and not self.writer.busy
        if self.tune.held:  # whose copies of this step are there
            time_is_up = time_is_up and all(m.config.logs_at(step) for m in due)
        time_is_up |= leaves
        wanted = due if time_is_up else [m for m in due if step in m.checkpoints]
        if wanted:
            self.wait_until_saved()
            self.writer.write(
                [ToWrite(m.checkpoints_at, m.config, taken_of(m), m.kept) for m in wanted],
                {r.name: r.step for r in self.reports},
            )
        if time_is_up:
            self.saved = time.monotonic()

    def wait_until_saved(self) -> None:
        """Until the checkpoints that are being written are."""
        if self.writer.busy:
            self.wait_until_settled()  # they wait for that, and a new roster must be told
        self.writer.wait()

    # --- telling the roster -----------------------------------------------------------------

    def report(
        self,
        due: list[Member],
        metrics: list[StepMetrics | None],
        step: int,
        reader: Reader,
        x: Any,
    ) -> set[str]:
        """Sends what is due at this step (x: its batch); names the SAEs that leave with it."""
        reports, gone = [], set()
        self.take_answer()
        self.tune.wait(self.take)
        withdrawn = self.withdrawn
        for m, of_step in zip(due, metrics, strict=True):
            finished = step == m.config.steps
            if not (m.config.logs_at(step) or m.name in withdrawn):
                continue
            assert of_step is not None
            if m.name in withdrawn and m.held is not None:
                reports.append(self.publish(m, m.held.report, STOPPED))
                gone.add(m.name)
                continue
            self.silenced.look(m.config, step, float(of_step.l0), x[m.hooks[-1]])
            report = self.report_of(m, of_step, step)
            if report.state != FAILED:
                if finished or m.name in withdrawn:
                    report = self.publish(m, report, DONE if finished else STOPPED)
                elif m.config.evaluates_at(step) or m.name in self.unevaluated:
                    report = report._replace(snapshot=[self.snapshot(m)])
            if report.state in (DONE, STOPPED, FAILED):
                gone.add(m.name)
            elif m.name in self.tune.held:
                self.wait_until_saved()  # one copy of an SAE at a time is what is planned for
                m.held = Held(report._replace(snapshot=None), held_state(m.trainer))
            else:
                m.held = None  # a roster that was started again knows of none for a moment
            reports.append(report)
        self.tell(reports, reader)
        return gone

    def tell(self, reports: list[Report], reader: Reader) -> None:
        """Sends reports; they are kept until they are settled."""
        self.reports += reports
        gauges = reader.gauges()._replace(step_seconds=self.stepped)
        self.call = self.roster.report.remote(self.plan.pack, reports, gauges)
        self.meter.tell(gauges, {r.name for r in reports if r.state in (DONE, STOPPED, FAILED)})

    def take_answer(self) -> set[str]:
        """SAEs that their trials have withdrawn, as of the last report.

        A roster that died may not have written down what it was told: the one that comes after it
        is told again all that is not settled.
        """
        if self.call is None:
            return self.withdrawn
        call, self.call = self.call, None
        try:
            self.take(waiting.get(call, self.limit, "roster"))
        except ActorUnavailableError:
            self.tell_again()
        return self.withdrawn

    def take(self, answer: Answer) -> None:
        if self.incarnation not in (None, answer.incarnation):
            self.tell_again()
            return
        self.incarnation = answer.incarnation
        self.withdrawn = set(answer.withdrawn)
        self.unevaluated = set(answer.unevaluated)
        self.tune.take(answer)
        self.reports = [r for r in self.reports if not self.is_settled(r, answer)]

    def is_settled(self, report: Report, answer: Answer) -> bool:
        """An SAE's end is of the step of its last report before, when Tune has stopped it there."""
        upto = answer.ended if report.state in ENDS else answer.settled
        return report.step <= upto.get(report.name, 0)

    def tell_again(self) -> None:
        answer = waiting.ask(
            lambda: self.roster.report.remote(self.plan.pack, self.reports, None),
            self.limit,
            "roster",
        )
        self.incarnation = answer.incarnation
        self.withdrawn = set(answer.withdrawn)
        self.unevaluated = set(answer.unevaluated)

    def wait_until_settled(self) -> None:
        """Until everything is evaluated and written: then this process may go."""
        self.take_answer()
        while self.reports:
            answer = waiting.poll(
                lambda: self.roster.settled.remote(self.plan.pack), self.limit, "roster"
            )
            before = len(self.reports)
            self.take(answer)
            if len(self.reports) == before:
                time.sleep(0.1)

    def report_of(self, m: Member, of_step: StepMetrics, step: int) -> Report:
        metrics: dict[str, Any] = {
            "losses/mse_loss": float(of_step.mse),
            **m.trainer.rule.losses(float(of_step.l1), float(of_step.ghost)),
            "losses/overall_loss": float(of_step.overall),
            **of_step.reconstruction.metrics(),
            "metrics/l0": float(of_step.l0),
            "details/current_learning_rate": m.trainer.adam.param_groups[0]["lr"],
            "details/n_training_tokens": m.n_training_tokens,
            "details/training_seconds": time.perf_counter() - self.started,
            **m.trainer.feature_metrics(),
        }
        report = Report(m.name, step, m.n_training_tokens, metrics)
        if math.isfinite(metrics["losses/overall_loss"]):
            return report
        named = ("architecture", *SPARSITY, "lr", "dtype", "seed")
        settings = {k: v for k in named if (v := getattr(m.config, k)) is not None}
        return report._replace(
            state=FAILED,
            error=f"{m.name}: the loss is {metrics['losses/overall_loss']} at step {step} "
            f"({m.n_training_tokens:,} tokens); {settings}. A lower lr is the usual remedy.",
        )

    def publish(self, m: Member, report: Report, state: str) -> Report:
        self.wait_until_saved()
        there = m.trainer if m.held is None or state == DONE else m.held.state
        m.held = None
        if state == STOPPED:  # a paused trial may come back to it
            self.wait_until_settled()
            tokens = report.n_training_tokens
            save_checkpoint(m.checkpoints_at / str(tokens), m.config, there, self.plan.special)
            delete_others(m.checkpoints_at, m.kept | {tokens})
        final = m.folder / "final"
        save_final(final, m.config, there, self.plan.special)
        if state == DONE:
            delete_others(m.checkpoints_at, m.kept)
        return report._replace(state=state, snapshot=[snapshot_of(there.published)], path=final.uri)

    def snapshot(self, m: Member) -> Any:
        return snapshot_of(m.trainer.published)

    def warn(self, text: str) -> None:
        self.roster.warn.remote(text)
