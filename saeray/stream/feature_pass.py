"""One pass over text for the features of all chosen SAEs of a stream, by harvesters, in Ray.

The text is cut into parts of store_batch_size windows: those held out from training first, then the
training's own from its beginning. Parts go to whichever harvester is free; what comes of them does
not depend on who had which. Every `checkpoint_every_s` the harvesters save what they have; one that
dies goes on from there, and so does a pass that was interrupted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.exceptions import RayActorError

from saeray.actors.make import passed_on, placed
from saeray.actors.nodes import cluster_now, on_head
from saeray.actors.waiting import ask, get, poll
from saeray.errors import ConfigError, Late, SaerayError, bad_value
from saeray.files import strict_json
from saeray.files.storage import Folder
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.placement import wants_gpu
from saeray.spec.room import Need
from saeray.stream.feature_harvester import MOST_PARTS, PARTS, FeatureHarvester, FeatureJob
from saeray.stream.token_server import TokenBlock, TokenServer

IN_FLIGHT = 2  # parts per harvester: one running, one waiting at its door
DEATHS = 5  # of harvesters without a part done in between
SAY_EVERY_S = 10.0
RETRIES = 20  # of a call that may be repeated, when its actor dies under it
FINISH_SECONDS = 3600.0  # to write down one SAE


class Text(NamedTuple):
    """Which windows a pass reads."""

    held_out: np.ndarray  # int32 [n, context]
    n_parts: int
    size: int  # windows of a part

    @property
    def held_parts(self) -> int:
        return -(-len(self.held_out) // self.size)


class FeaturePass:
    """A pass under way."""

    def __init__(
        self,
        config: LanguageModelSAERunnerConfig,
        hook_points: list[str],
        job: FeatureJob,
        place: Folder,
        n_harvesters: int,
        say: Callable[[str], None],
    ) -> None:
        """place: the folder `job.place` as this process sees it. say: is told how far it is."""
        self.config, self.job, self.place, self.say = config, job, place, say
        self.limit_s = config.wait_limit_s
        environment = passed_on()
        self.token_server = (
            ray.remote(TokenServer)
            .options(num_cpus=0, max_restarts=-1, max_task_retries=RETRIES, **on_head())
            .remote(config.to_dict(), environment)
        )
        options = placed(needed(config))
        self.harvesters = [
            ray.remote(FeatureHarvester)
            .options(max_restarts=-1, **options)
            .remote(config.to_dict(), hook_points, environment)
            for _ in range(n_harvesters)
        ]
        self.has: list[set[int]] = [set() for _ in self.harvesters]  # parts gathered, by harvester
        self.deaths = 0

    def run(self, tokens: int, about: Mapping[str, dict[str, Any]]) -> None:
        """Gathers from so many tokens, and writes down the SAEs' features.

        about: by SAE, what stands in its about.json beside what only the pass knows.

        Raises:
            ConfigError: the model or the text can't be used. Late: nothing came in time.
            SaerayError: harvesters die again and again.
        """
        try:
            self.check()
            self.text = self.text_of(tokens)
            for left in reversed(range(DEATHS)):
                try:
                    self.begin_all()
                    self.gather()
                    self.join([self.tokens(part) for part in range(self.text.n_parts)], about)
                    return
                except RayActorError as error:  # while nobody else could take its place
                    if not left:
                        raise SaerayError(f"{too_many_deaths(DEATHS)} ({error})") from None
                    self.say("! a harvester died; all go on from what was saved.")
        finally:
            for a in (self.token_server, *self.harvesters):
                ray.kill(a)

    def check(self) -> None:
        self.check_memory()
        data = [self.config.to_dict()]
        facts = self.ask(lambda: self.harvesters[0].check.remote(data), "a harvester")
        for text in facts.warnings:
            self.say(f"! {text}")
        self.ask(lambda: self.token_server.check.remote(), "the token server")

    def check_memory(self) -> None:
        """Says what a harvester will hold, and refuses what no node can."""
        from saeray.sae.feature_contexts import state_bytes

        job = self.job
        states = [
            state_bytes(one.d_sae, job.context, job.top, job.per_band) for one in job.saes.values()
        ]
        most = sum(states) + 2 * max(states)  # two more while those of two harvesters are joined
        there = max(n.resources.get("memory", 0.0) for n in cluster_now().nodes)
        if most > there:
            raise ConfigError(
                f"the features of {len(states)} SAEs take up to {most / 1e9:.1f} GB of a harvester "
                f"beside the language model, and the largest node has {there / 1e9:.1f} GB: fewer "
                "SAEs at a time (SWEEP/SAE), or a smaller --top."
            )
        self.say(f"each harvester gathers into {sum(states) / 1e6:,.0f} MB at most")

    def text_of(self, tokens: int) -> Text:
        """At least `tokens` tokens, in whole parts; fewer only where less is held out."""
        held = self.ask(lambda: self.token_server.held_out.remote(), "the token server")
        size, context = self.config.store_batch_size, self.config.context_size
        n_windows = -(-tokens // context)
        held = held[:n_windows]
        more = -(-(n_windows - len(held)) // size)
        n_parts = -(-len(held) // size) + more
        if n_parts > MOST_PARTS:
            most = MOST_PARTS * size * context
            raise bad_value("--tokens", tokens, f"at most {most:,} with this store_batch_size.")
        return Text(held, n_parts, size)

    def tokens(self, part: int) -> np.ndarray:
        text = self.text
        if part < text.held_parts:
            return text.held_out[part * text.size : (part + 1) * text.size]
        block = part - text.held_parts
        got = poll(lambda: self.token_server.block.remote(block), self.limit_s, "the token server")
        return got.tokens if isinstance(got, TokenBlock) else got

    # --- harvesters and what they have ------------------------------------------------------

    def begin_all(self) -> None:
        """Every harvester with its share of what an earlier session has saved."""
        saved = list(saved_states(self.place))
        shares = [saved[i :: len(self.harvesters)] for i in range(len(self.harvesters))]
        calls = [
            h.begin.options(max_task_retries=RETRIES).remote(self.job, f"harvester-{i}", share)
            for i, (h, share) in enumerate(zip(self.harvesters, shares, strict=True))
        ]
        for i, call in enumerate(calls):
            self.has[i] = set(get(call, self.limit_s, f"harvester {i}"))
        done = sum(map(len, self.has))
        if done:
            self.say(f"going on with {done:,} of {self.text.n_parts:,} parts that were saved")

    def begin_again(self, i: int) -> None:
        """A harvester that was started again, with what it saved last."""
        self.deaths += 1
        if self.deaths >= DEATHS:
            raise SaerayError(too_many_deaths(self.deaths))
        self.say(f"! harvester {i} died; what it had not saved is gathered again.")
        theirs = set().union(*(has for j, has in enumerate(self.has) if j != i))
        mine = [s for s, of in saved_states(self.place).items() if theirs.isdisjoint(of)]
        begin = self.harvesters[i].begin.options(max_task_retries=RETRIES)
        name = f"harvester-{i}"
        self.has[i] = set(self.ask(lambda: begin.remote(self.job, name, mine), name))

    def gather(self) -> None:
        pending: dict[Any, tuple[int, int]] = {}  # call -> (harvester, part)
        saved_at = said_at = time.monotonic()
        todo = self.missing(pending)
        while todo or pending:
            for i in self.free(pending):
                if todo:
                    part = todo.popleft()
                    call = self.harvesters[i].collect.remote(part, self.tokens(part))
                    pending[call] = (i, part)
            done, _ = ray.wait(list(pending), timeout=self.limit_s)
            if not done:
                i, part = next(iter(pending.values()))
                raise Late(
                    f"harvester {i} took more than {self.limit_s:g} s over part {part} of the text "
                    "(wait_limit_s)."
                )
            i, part = pending.pop(done[0])
            try:
                ray.get(done[0])
            except RayActorError:
                pending = {c: at for c, at in pending.items() if at[0] != i}
                self.begin_again(i)
                todo = self.missing(pending)
                continue
            self.has[i].add(part)
            self.deaths = 0
            now = time.monotonic()
            if now > said_at + SAY_EVERY_S:
                said_at = now
                self.say(self.how_far())
            every = self.config.checkpoint_every_s
            if every is not None and now > saved_at + every:
                self.save(pending)
                saved_at = time.monotonic()
                todo = self.missing(pending)

    def missing(self, pending: dict[Any, tuple[int, int]]) -> deque[int]:
        under_way = {part for _, part in pending.values()}
        gathered = set().union(*self.has) | under_way
        return deque(p for p in range(self.text.n_parts) if p not in gathered)

    def free(self, pending: dict[Any, tuple[int, int]]) -> Sequence[int]:
        """Harvesters that may be given a part, those with the least to do first."""
        load = [0] * len(self.harvesters)
        for i, _ in pending.values():
            load[i] += 1
        places = [(n, i) for i, busy in enumerate(load) for n in range(busy, IN_FLIGHT)]
        return [i for _, i in sorted(places)]

    def save(self, pending: dict[Any, tuple[int, int]]) -> None:
        """What was gathered, and on which harvester, survives this session."""
        calls = [(i, h.save.remote()) for i, h in enumerate(self.harvesters)]
        for i, call in calls:
            try:
                # What was under way is in it, too: calls to an actor come one after the other.
                self.has[i] = set(get(call, self.limit_s, f"harvester {i}"))
                for ref in [c for c, at in pending.items() if at[0] == i]:
                    del pending[ref]
            except RayActorError:
                for ref in [c for c, at in pending.items() if at[0] == i]:
                    del pending[ref]
                self.begin_again(i)

    def how_far(self) -> str:
        done = sum(map(len, self.has))
        per_part = self.text.size * self.config.context_size
        return f"{done * per_part:,} of {self.text.n_parts * per_part:,} tokens"

    def join(self, parts: list[np.ndarray], about: Mapping[str, dict[str, Any]]) -> None:
        """All of it on the first harvester, which writes it down, one SAE after the other."""
        first, *others = self.harvesters
        windows = np.concatenate(parts)
        firsts = [0, *np.cumsum([len(part) for part in parts])[:-1].tolist()]
        shown = ray.put(windows)
        of_text = {"held_out_windows": len(self.text.held_out), "windows": len(windows)}
        for sae in self.job.saes:
            for h in others:
                state = h.state.remote(sae)
                get(first.absorb.remote(sae, state), self.limit_s, "a harvester")
                del state
            finished = first.finish.remote(sae, shown, firsts, of_text | about[sae])
            get(finished, FINISH_SECONDS, "a harvester")

    def ask(self, call: Callable[[], Any], who: str) -> Any:
        return ask(call, self.limit_s, who)


def too_many_deaths(n: int) -> str:
    return (
        f"{n} harvesters died one after the other; out of memory? Fewer SAEs at a time, or a "
        "smaller --top."
    )


def needed(config: LanguageModelSAERunnerConfig) -> Need:
    """What a harvester of a pass asks of its node."""
    r = config.resources
    gpu = wants_gpu(config, cluster_now())
    cpus = r.harvester_cpus if isinstance(r.harvester_cpus, (int, float)) else 1.0
    gpus = r.harvester_gpus if isinstance(r.harvester_gpus, (int, float)) else float(gpu)
    amounts = {"CPU": cpus, "GPU": gpus, **r.harvester_resources}
    return Need({name: n for name, n in amounts.items() if n}, r.harvester_labels)


def saved_states(place: Folder) -> dict[str, set[int]]:
    """Saved states by name, with their parts of the text: no two share one. The largest first."""
    found = []
    for name in place.names():
        try:
            found.append((set(strict_json.loads((place / name).read(PARTS))), name))
        except (OSError, ValueError):
            continue  # it was being written
    kept: dict[str, set[int]] = {}
    for parts, name in sorted(found, key=lambda of: (-len(of[0]), of[1])):
        if all(parts.isdisjoint(other) for other in kept.values()):
            kept[name] = parts
    return kept
