"""Has a sweep's parts measured on this machine, and makes of it how fast they will be.

See `saeray.cluster.calibration` for what the two processes do that are asked here.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from saeray.client.plan import CALIBRATION_SECONDS
from saeray.cluster.calibration import spread
from saeray.errors import ConfigError, SaerayError
from saeray.files import strict_json
from saeray.lm.hub import PACKAGE
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.fitted import Fitted
from saeray.spec.forecast import Speeds, Stretch
from saeray.spec.grid import SAE
from saeray.spec.plan import cut_packs, hook_points_of

LIMIT_SECONDS = 900.0  # of an answer: the model may have to be downloaded
MOST_SAES = 8  # of a pack, that are trained for it
SAMPLED_BATCHES = 8  # of activations
# What a start and an end come to, in multiples of what importing torch takes there, in two
# processes at once: sweeps/tiny.yaml on two cores. Most of both is the start of processes.
START_UP, END = 6.5, 3.4
TRIAL = 0.9  # the same of a trial's process, which has one core while the others train
# Cores that the rest of a sweep takes while it trains: roster, token server, buffer, Ray's own
# processes (13.5 CPU seconds of 57; harvesters, trainers and the trials' starts not counted).
REST_CORES = 0.24


class Calibration(NamedTuple):
    """What was measured, and in words."""

    speeds: Speeds
    said: list[str]
    seconds: float
    gpu_bytes: float = 0.0  # that the SAEs took of a GPU, at most
    two_harvesters: float | None = None  # how much faster they are than one; None: not measured


class Side:
    """One of the two processes."""

    def __init__(self, role: str) -> None:
        path = os.pathsep.join(p for p in (str(PACKAGE.parent), os.environ.get("PYTHONPATH")) if p)
        self.role = role
        self.began = time.time()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "saeray.cluster.calibration", role],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip

    def ask(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has died: `answer` says so
            self.process.stdin.write(strict_json.dumps({"do": do, "with": arguments}) + "\n")
            self.process.stdin.flush()

    def answer(self) -> Any:
        """Raises: ConfigError, SaerayError: what it could not do, and why."""
        assert self.process.stdout is not None
        timer = threading.Timer(LIMIT_SECONDS, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            code = self.process.wait()
            raise SaerayError(
                f"calibration: the process of its {self.role} part ended ({code}); out of memory? "
                "--tokens-per-s and --sae-tokens-per-s do without it."
            )
        said = strict_json.loads(line)
        if "wrong" in said:
            if said["bad_input"]:
                raise ConfigError(said["wrong"])
            raise SaerayError(f"calibration: {said['wrong']}")
        return said["ok"]

    def does(self, do: str, **arguments: Any) -> Any:
        self.ask(do, **arguments)
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what it was asked and has not read
                    pipe.close()


def calibrated(
    configs: Sequence[LanguageModelSAERunnerConfig],
    fitted: Fitted,
    seconds: float = CALIBRATION_SECONDS,
    apart: bool = False,
) -> Calibration:
    """How fast a stream and its SAEs are where this process runs.

    apart: harvesters and trainers will not share cores.

    Raises:
        ConfigError, SaerayError: it could not be measured.
    """
    began = time.time()
    harvester, trainer = Side("harvest"), Side("train")
    try:
        with tempfile.TemporaryDirectory() as folder:
            return measured(configs, fitted, harvester, trainer, folder, seconds, apart, began)
    finally:
        harvester.close()
        trainer.close()


def measured(
    configs: Sequence[LanguageModelSAERunnerConfig],
    fitted: Fitted,
    harvester: Side,
    trainer: Side,
    folder: str,
    seconds: float,
    apart: bool,
    began: float,
) -> Calibration:
    hooks = hook_points_of(configs)
    pack = max(cut_packs([SAE("", c) for c in configs], fitted.saes_per_trainer), key=len)
    some = [pack[i].config for i in spread(len(pack), MOST_SAES)]
    trainer.ask("load")
    opened = harvester.does("open", config=configs[0].to_dict(), hooks=hooks)
    trainer.answer()
    rows = SAMPLED_BATCHES * some[0].train_batch_size
    harvester.does("sample", folder=folder, n_rows=rows)
    trainer.does(
        "open", configs=[c.to_dict() for c in some], folder=folder, hooks=hooks,
        widths=opened["widths"], threads=fitted.threads,
    )  # fmt: skip
    short = seconds / 20
    alone = harvester.does("harvest", seconds=short)["tokens_per_s"]
    prepared = trainer.does("prepare", seconds=seconds / 8)

    def beside() -> tuple[float, float]:
        """How much longer a step, and a token, take beside each other."""
        if apart or fitted.harvesters == 0:
            return 1.0, 1.0
        by_itself = trainer.does("step", seconds=short)["step_s"]
        harvester.ask("harvest", seconds=2 * short)
        slowed = trainer.does("step", seconds=2 * short)["step_s"]
        rate = harvester.answer()["tokens_per_s"]
        return max(1.0, slowed / by_itself), max(1.0, alone / rate)

    when_dense = beside()
    rehearsal = trainer.does("rehearse", seconds=seconds * 0.45)
    when_sparse = beside()
    forward = harvester.does("evaluate", config=some[0].to_dict())["forward_s"]
    gpu_bytes = trainer.does("memory")["gpu_bytes"]
    imports = opened["imported"] - harvester.began
    cores = os.cpu_count() or 1
    speeds = speeds_of(
        rehearsal["at"], prepared, some[0].train_batch_size, 1 / alone, when_dense, when_sparse
    )._replace(
        dense_share=rehearsal["dense"],
        forward=forward,
        start_up=START_UP * imports + opened["load_s"] + opened["text_s"],
        trials=TRIAL * imports / cores,
        end=END * imports,
    )
    said = said_of(alone, speeds, rehearsal, when_sparse)
    two = None
    waits_for_model = 1 / alone > speeds.sparse.step * len(pack)
    if waits_for_model and not (apart or fitted.harvester_gpus) and cores > 1:
        two = gain_of_two(harvester, configs[0], hooks, alone, short)
        said.append(f"two harvesters at once {two:.2f} times as many tokens/s as one")
    if not (apart or fitted.trainer_gpus):
        speeds = beside_the_rest(speeds, cores)
    return Calibration(speeds, said, time.time() - began, gpu_bytes, two)


def beside_the_rest(speeds: Speeds, cores: int) -> Speeds:
    """Where trainer and language model have the cores that the rest of the sweep leaves them."""
    left = max(0.5, 1 - REST_CORES / cores)
    return speeds.with_stretches(step=1 / left, harvest=1 / left)


def gain_of_two(
    one: Side, config: LanguageModelSAERunnerConfig, hooks: list[str], alone: float, short: float
) -> float:
    """How much faster two harvesters are on this machine than one; alone: its tokens/s."""
    other = Side("harvest")
    try:
        other.does("open", config=config.to_dict(), hooks=hooks)
        for side in (one, other):
            side.ask("harvest", seconds=2 * short)
        both = sum(side.answer()["tokens_per_s"] for side in (one, other))
    finally:
        other.close()
    return max(1.0, both / alone)


def speeds_of(
    at: Sequence[Sequence[float]],
    prepared: dict[str, float],
    batch_rows: int,
    harvest: float,
    when_dense: tuple[float, float],
    when_sparse: tuple[float, float],
) -> Speeds:
    """at: share of the run, seconds of a step, share of SAEs that are dense there; ascending.

    when_dense, when_sparse: how much longer step and harvest take beside each other.
    """
    timed = prepared["rows"]
    more = 1.0  # of a whole batch's step, where fewer rows were timed
    if timed < batch_rows:
        per_row = max(0.0, at[0][1] - prepared["small_s"]) / max(
            1.0, timed - prepared["small_rows"]
        )
        more = 1 + per_row * (batch_rows - timed) / at[0][1]
    seconds = {"dense": 0.0, "sparse": 0.0}
    shares = {"dense": 0.0, "sparse": 0.0}
    for (a, s_a, d_a, *_), (b, s_b, d_b, *_) in pairwise(at):
        for s, dense in ((s_a, d_a), (s_b, d_b)):
            for name, weight in (("dense", dense), ("sparse", 1 - dense)):
                shares[name] += (b - a) / 2 * weight
                seconds[name] += (b - a) / 2 * weight * s
    whole = sum(shares.values()) or 1.0

    def stretch(name: str, other: str, slowed: tuple[float, float]) -> Stretch:
        of = name if shares[name] else other
        step = more * seconds[of] / shares[of] / (batch_rows * prepared["saes"])
        return Stretch(step, harvest, step * slowed[0], harvest * slowed[1])

    return Speeds(
        stretch("dense", "sparse", when_dense),
        stretch("sparse", "dense", when_sparse),
        shares["dense"] / whole,
    )


def said_of(
    alone: float, speeds: Speeds, rehearsal: dict[str, Any], beside: tuple[float, float]
) -> list[str]:
    """What was measured, in words."""
    last = rehearsal["at"][-1]
    how = f"in small, {rehearsal['steps']:,} of {rehearsal['of']:,} steps"
    if not rehearsal["rehearsed"]:
        how = "assumed: dense until warm-ups end, for so many steps in small take too long"
    said = [
        f"a harvester makes {alone:,.0f} tokens/s",
        f"dense steps {1 / speeds.dense.step:,.0f} SAE-tokens/s, sparse ones "
        f"{1 / speeds.sparse.step:,.0f}; {speeds.dense_share:.0%} of the steps are dense ({how}; "
        f"L0 {last[3]:.3g} at the end)",
    ]
    if beside != (1.0, 1.0):
        said.append(
            f"on the same cores at once: the step takes {beside[0]:.2f} times, the language model "
            f"{beside[1]:.2f} times as long"
        )
    return said
