"""How fast a sweep's parts are on this machine: measured in some twenty seconds, at its own shapes.

Two processes of the sizes that the sweep's will have: one with the language model, on one thread as
each harvester is, and one that trains some of the SAEs on as many threads as a pack has. Each is
measured by itself and beside the other. How many steps will be dense and how sparse the others is
not known before a run; the SAEs are trained for it in small, on few rows at a time and with their
schedules as they are (or compressed, where that would take too long), and whole steps are timed on
the way.

    python -m saeray.cluster.calibration ROLE     reads a line of JSON for each thing to do

`saeray.client.calibrate` starts the two and asks.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from saeray.files import strict_json
from saeray.spec.config import LanguageModelSAERunnerConfig

SAMPLED_BYTES = 1 << 28  # of activations, at most, that the SAEs are trained on
SAMPLED_SECONDS = 3.0
SMALL_ROWS = 256  # of a batch in small
FEWER_ABOVE = 4.0  # times the time there is for a timed step
FEWEST_STEPS = 50  # in small: with fewer the SAEs get nowhere
HIGHEST_LR = 0.02  # of fewer steps than the run has
WARM = (0.0, 0.04, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.4, 0.55, 0.75, 1.0)  # when steps are timed
EVALUATED_TOKENS = 1024  # of held-out text
L0_ASSUMED = 50.0  # where nothing says how sparse the SAEs will be


class HarvestSide:
    """The language model, as a harvester has it."""

    def open(self, config: dict[str, Any], hooks: list[str]) -> dict[str, Any]:
        """Loads it and its text."""
        import torch

        from saeray.stream.check import open_model, open_text

        torch.set_num_threads(1)
        imported = time.time()
        self.config = LanguageModelSAERunnerConfig.from_dict(config)
        self.hooks = hooks
        self.model = open_model(self.config, hooks)
        loaded = time.time()
        self.text = open_text(self.config, lambda _: None)
        n = self.config.store_batch_size
        windows = self.text.train_within(60.0, 0, n)
        self.windows = self.text.evaluation()[:n] if windows is None else windows
        return {
            "imported": imported,
            "load_s": loaded - imported,
            "text_s": time.time() - loaded,
            "widths": self.model.facts.d_in,
        }

    def block(self, windows: Any) -> list[Any]:
        """As a harvester makes it."""
        import torch

        from saeray.stream.arrays import to_array

        activations = self.model.activations(torch.from_numpy(windows.copy()))
        return [to_array(activations[h]) for h in self.hooks]

    def sample(self, folder: str, n_rows: int) -> dict[str, float]:
        """Writes activations of the text's beginning to a folder, an array for each hook point."""
        import numpy as np

        wide = sum(self.model.facts.d_in.values()) * 4
        n_rows = max(SMALL_ROWS, min(n_rows, SAMPLED_BYTES // wide))
        per_block = self.windows.size
        blocks, at = [self.block(self.windows)], self.config.store_batch_size
        began = time.perf_counter()
        while len(blocks) * per_block < n_rows and time.perf_counter() - began < SAMPLED_SECONDS:
            more = self.text.train_within(5.0, at, self.config.store_batch_size)
            if more is None:
                break
            blocks.append(self.block(more))
            at += self.config.store_batch_size
        for i, of_hook in enumerate(zip(*blocks, strict=True)):
            np.save(Path(folder) / f"{i}.npy", np.concatenate(of_hook))
        return {"rows": float(len(blocks) * per_block)}

    def harvest(self, seconds: float) -> dict[str, float]:
        """Tokens/s, by the median of its blocks."""
        return {
            "tokens_per_s": self.windows.size / median(lambda: self.block(self.windows), seconds)
        }

    def evaluate(self, config: dict[str, Any]) -> dict[str, float]:
        """Seconds of a token of a whole forward, with an SAE like this in it."""
        import torch

        from saeray.cluster.options import options_of
        from saeray.sae.architectures import ARCHITECTURES
        from saeray.sae.initial import initial_sae
        from saeray.spec.transcoder import d_out
        from saeray.stream.harvester import evaluator_of

        c = LanguageModelSAERunnerConfig.from_dict(config)
        widths = self.model.facts.d_in
        d_in = widths[c.hooks_read[0]]
        n = max(1, EVALUATED_TOKENS // c.context_size)
        windows = torch.from_numpy(self.text.evaluation()[:n].copy())
        out = None if c.hook_point_out is None else torch.zeros(d_out(c, widths))
        sae = initial_sae(
            d_in, c.d_sae(d_in), seed=0, b_dec=torch.zeros(d_in), dtype=getattr(torch, c.dtype),
            encoder_init="decoder_transpose", architecture=ARCHITECTURES[c.architecture],
            options=options_of(c, self.model.device, d_in), b_dec_out=out, skip=c.skip_connection,
        ).to(self.model.device)  # fmt: skip
        evaluator = evaluator_of(self.model, windows)
        evaluator.evaluate_all([sae], c.hooks_read)
        began = time.perf_counter()
        evaluator.evaluate_all([sae], c.hooks_read)
        return {"forward_s": (time.perf_counter() - began) / (2 * windows.numel())}


class TrainSide:
    """Some SAEs of a pack, as a trainer has them."""

    def load(self) -> dict[str, float]:
        """Imports what it needs."""
        import saeray.cluster.start  # noqa: F401
        from saeray.cluster.warm_up import warm_up
        from saeray.sae import sparse_step

        warm_up()
        if sparse_step.available():
            from saeray.sae import numba_kernels

            numba_kernels.warm_up()
        return {}

    def open(
        self,
        configs: list[dict[str, Any]],
        folder: str,
        hooks: list[str],
        widths: dict[str, int],
        threads: int,
    ) -> dict[str, Any]:
        """Starts them, on activations that lie in a folder."""
        import numpy as np
        import torch

        from saeray.lm.load import choose_device
        from saeray.sae.pack_step import PackStep
        from saeray.spec.order import permutation
        from saeray.stream.arrays import to_tensor

        self.configs = [LanguageModelSAERunnerConfig.from_dict(c) for c in configs]
        first = self.configs[0]
        self.hooks, self.widths = hooks, widths
        self.device = choose_device(first.device)
        arrays = [np.load(Path(folder) / f"{i}.npy") for i in range(len(hooks))]
        mixed = permutation(len(arrays[0]), 0, 0, salt=0)  # as rows of the stream are
        dtype = getattr(torch, first.activation_dtype)
        self.rows = [to_tensor(array[mixed], dtype) for array in arrays]
        self.step_all = PackStep(threads if self.device.type == "cpu" else 1)
        self.at = 0
        self.timed_rows = self.batch_rows
        self.trainers = [self.started(c, 1.0) for c in self.configs]
        return {"rows": len(self.rows[0])}

    def started(self, config: LanguageModelSAERunnerConfig, shortened: float) -> Any:
        """A new SAE. shortened: what its schedule is multiplied by."""
        from saeray.cluster.options import options_of
        from saeray.cluster.start import Start
        from saeray.sae.sample_statistics import statistic_of
        from saeray.sae.trainer import SAETrainer
        from saeray.spec.messages import NOTHING

        of_hook = dict(zip(self.hooks, self.rows, strict=True))

        class Sampled(Start):
            def statistic(self, hook_point: str, name: str) -> Any:
                return statistic_of(of_hook[hook_point][: self.config.b_dec_init_rows], name)

        plan = replace(NOTHING, hook_points=self.hooks, widths=self.widths)
        options = options_of(config, self.device, self.widths[config.hooks_read[0]])
        if shortened < 1.0:
            options = compressed(options, shortened)
        # The steps that are timed are beside those of the run.
        options = replace(options, total_steps=options.total_steps + 2 * len(WARM))
        start = Sampled(config, plan, 0.0)
        scales = [start.scale_at(hook) for hook in (start.read, start.written)]
        sae = start.sae(options, *scales)
        return SAETrainer(sae.to(self.device), options, *scales)

    def batch(self, n: int) -> list[tuple[Any, ...]]:
        """The next rows, for each SAE at its hook points; from the beginning where they end."""
        import torch

        there = len(self.rows[0])
        index = (torch.arange(n) + self.at) % there
        self.at = (self.at + n) % there
        xs = [x[index].to(self.device) for x in self.rows]
        places = [tuple(self.hooks.index(h) for h in c.hooks_read) for c in self.configs]
        return [tuple(xs[i] for i in of) for of in places]

    def timed(self, n_rows: int) -> float:
        """Seconds of a step of all SAEs on so many rows."""
        xs = self.batch(n_rows)
        self.settled()
        began = time.perf_counter()
        self.step_all.step(self.trainers, xs)
        self.settled()
        return time.perf_counter() - began

    def settled(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()

    @property
    def batch_rows(self) -> int:
        return self.configs[0].train_batch_size

    def step(self, seconds: float) -> dict[str, float]:
        """Seconds of a step as the SAEs are now, by the median over a time."""
        return {"step_s": median(lambda: self.timed(self.timed_rows), seconds)}

    def prepare(self, seconds: float) -> dict[str, float]:
        """As many rows for each timed step, and as many SAEs, as so many seconds have room for.

        step_s: of the first, dense steps on that many rows, and of small ones.
        """
        from saeray.sae.gradients import LANE_ROWS

        self.timed(min(SMALL_ROWS, self.batch_rows))
        small = self.timed(min(SMALL_ROWS, self.batch_rows))
        per_row = small / min(SMALL_ROWS, self.batch_rows)
        each = seconds / len(WARM)
        if self.device.type != "cuda":
            fewest = min(LANE_ROWS, self.batch_rows)
            most = max(1, self.step_all.threads)
            # Fewer SAEs are another mixture of sparse and dense ones: only where there is no time.
            if per_row * fewest > FEWER_ABOVE * each and len(self.trainers) > most:
                keep = spread(len(self.trainers), most)
                per_row *= most / len(self.trainers)
                self.trainers = [self.trainers[i] for i in keep]
                self.configs = [self.configs[i] for i in keep]
            lanes = int(each / per_row) // LANE_ROWS * LANE_ROWS
            self.timed_rows = max(fewest, min(self.batch_rows, lanes))
        else:
            self.timed_rows = self.batch_rows
        return {
            "rows": float(self.timed_rows),
            "saes": float(len(self.trainers)),
            "small_rows": float(min(SMALL_ROWS, self.batch_rows)),
            "small_s": self.timed(min(SMALL_ROWS, self.batch_rows)),
        }

    def rehearse(self, seconds: float) -> dict[str, Any]:
        """Trains the SAEs in small; whole steps timed on the way, and how sparse they were.

        at: [share of the run, seconds of the step, share of SAEs that are dense, mean L0].
        dense: the share of all steps that is.
        """
        n_rows = min(SMALL_ROWS, self.batch_rows)
        steps = max(c.steps for c in self.configs)
        small = min(self.timed(n_rows) for _ in range(2))
        n = min(steps, int(seconds / small))
        if n < FEWEST_STEPS:
            return self.assumed()
        self.trainers = [self.started(c, n / steps) for c in self.configs]
        moments = sorted({round(share * n) for share in WARM})
        at: list[list[float]] = []
        dense: list[float] = []
        deadline, step = time.perf_counter() + 2 * seconds, 0
        for step in range(n + 1):
            if step in moments or time.perf_counter() > deadline:
                # On a GPU the third is replayed from a CUDA graph, as most of a run's are.
                often = 3 if self.device.type == "cuda" else 2 if step else 1
                one = min(self.timed(self.timed_rows) for _ in range(often))
                at.append([step / n, one, *self.sparsity()])
                if time.perf_counter() > deadline:
                    break
            self.step_all.step(self.trainers, self.batch(n_rows))
            dense.append(self.sparsity()[0])
        if at[-1][0] < 1.0:  # it took too long: from here on as it was last
            at.append([1.0, *at[-1][1:]])
        share = (sum(dense) + at[-1][2] * (n + 1 - len(dense))) / (n + 1)
        return {"at": at, "dense": share, "steps": step, "of": steps, "rehearsed": True}

    def sparsity(self) -> tuple[float, float]:
        """The share of SAEs whose steps are dense, and their mean L0."""
        dense = sum(not t.sparse for t in self.trainers) / len(self.trainers)
        l0 = sum(t.active_share * t.sae.d_sae for t in self.trainers) / len(self.trainers)
        return dense, l0

    def assumed(self) -> dict[str, Any]:
        """Where even that takes too long: dense until warm-ups end, then of a likely L0."""
        dense_s = self.timed(self.timed_rows)
        dense = self.sparsity()[0]
        c = self.configs[0]
        x = self.batch(min(SMALL_ROWS, self.batch_rows))
        for t, read in zip(self.trainers, x, strict=True):
            silence(t, read[0], t.options.k or t.options.target_l0 or L0_ASSUMED)
            t.active_share, t.step = 0.0, 0  # so the next step is a sparse one
            t.options = replace(t.options, lr=0.0)
        sparse_s = self.timed(self.timed_rows)
        warm = max(c.l1_warm_up_steps or 0, c.lr_warm_up_steps or 0) / c.steps
        at = [[0.0, dense_s, dense, 0.0], [warm, dense_s, dense, 0.0]]
        at += [[warm, sparse_s, 0.0, L0_ASSUMED], [1.0, sparse_s, 0.0, L0_ASSUMED]]
        return {"at": at, "dense": dense * warm, "steps": 0, "of": c.steps, "rehearsed": False}

    def memory(self) -> dict[str, float]:
        """Of the GPU, at most so far."""
        import torch

        on_gpu = self.device.type == "cuda"
        return {"gpu_bytes": float(torch.cuda.max_memory_reserved()) if on_gpu else 0.0}


def median(do: Callable[[], Any], seconds: float) -> float:
    """Seconds that something takes, which is done once at least, and for so long."""
    times: list[float] = []
    while not times or sum(times) < seconds:
        began = time.perf_counter()
        do()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def compressed(options: Any, by: float) -> Any:
    """A run's options with its schedule in fewer steps, in which Adam comes as far."""
    names = (
        "total_steps", "lr_warm_up_steps", "l1_warm_up_steps", "lr_decay_steps",
        "dead_feature_window", "feature_sampling_window", "p_anneal_start_step",
    )  # fmt: skip
    steps = {name: max(1, round(getattr(options, name) * by)) for name in names}
    return replace(options, lr=min(options.lr / by, max(options.lr, HIGHEST_LR)), **steps)


def silence(trainer: Any, x: Any, l0: float) -> None:
    """Sets an SAE's encoder bias so that it has about this L0 on x [B, D]."""
    import torch

    sae = trainer.sae
    if "b_enc" not in sae.tensors or trainer.rule.always_sparse:
        return
    with torch.no_grad():
        h = ((x.to(sae.W_enc.dtype) * trainer.activation_scale - sae.b_dec) @ sae.W_enc).flatten()
        at = min(len(h), max(1, round(len(x) * l0)))
        sae.b_enc.fill_(-float(torch.topk(h, at).values[-1]))


def spread(n: int, some: int) -> list[int]:
    """Places of some of n, from the first to the last, as even as can be."""
    if some >= n:
        return list(range(n))
    return sorted({round(i * (n - 1) / max(1, some - 1)) for i in range(some)})


def serve(role: str, lines: Sequence[str] | Any, say: Callable[[dict[str, Any]], None]) -> None:
    """Does what each line asks of a role, and says what came of it."""
    from saeray.errors import SaerayError

    side: Any = {"harvest": HarvestSide, "train": TrainSide}[role]()
    for line in lines:
        asked = strict_json.loads(line)
        try:
            say({"ok": getattr(side, asked["do"])(**asked["with"])})
        except SaerayError as error:
            say({"wrong": str(error), "bad_input": type(error).__name__ == "ConfigError"})
        except Exception as error:
            say({"wrong": f"{type(error).__name__}: {error}", "bad_input": False})


def main() -> None:
    # What libraries print goes to stderr; answers alone go where the asker reads.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(strict_json.dumps(answer) + "\n")
        answers.flush()

    serve(sys.argv[1], sys.stdin, say)


if __name__ == "__main__":
    main()
