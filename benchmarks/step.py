"""One SAE's training step on one CPU core: dense, in float32 and bfloat16, and from active entries.

    python benchmarks/step.py                      # some minutes; only torch and numba are needed
    python benchmarks/step.py --shapes 128x4096 --l0 8 32
    python benchmarks/step.py --share              # how much of a step is not inside a kernel

Whole optimizer steps of `PackStep` (gradient, firing counts, Adam, unit rows) on batches of 1,024
rows. The SAE has the L0 that is asked for: its encoder's bias is set to that quantile of its
pre-activations, and lr is 0. Ways are timed in turns; the table has the fastest round of each, and
how many features the product in eight bits names for each that is active. Rows are random.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from numba.core.dispatcher import Dispatcher
from torch.utils._python_dispatch import TorchDispatchMode

from saeray.sae import numba_kernels, numba_screening
from saeray.sae.architectures.standard import StandardSAE
from saeray.sae.entries import Entries, Selection
from saeray.sae.initial import initial_sae
from saeray.sae.options import TrainingOptions
from saeray.sae.pack_step import PackStep
from saeray.sae.screening import Screen
from saeray.sae.trainer import SAETrainer

ROWS = 1024
SHAPES = ["128x1024", "128x4096", "768x24576"]
L0 = [8, 32, 128, 256]
WAYS = [("float32", False), ("bfloat16", False), ("float32", True)]  # whether sparse


def sae_with(d_in: int, d_sae: int, l0: float, x: torch.Tensor) -> StandardSAE:
    sae = initial_sae(
        d_in, d_sae, seed=0, b_dec=torch.zeros(d_in), dtype=torch.float32,
        encoder_init="decoder_transpose",
    )  # fmt: skip
    rows = x[:256]
    h = ((rows - sae.b_dec) @ sae.W_enc).flatten()
    at = max(1, round(len(rows) * l0))
    sae.b_enc.fill_(-float(torch.topk(h, at).values[-1]))
    return sae


def measure(d_in: int, d_sae: int, l0: float, rounds: int) -> dict[tuple[str, bool], float]:
    """Milliseconds of a step, by way."""
    x = torch.randn(ROWS, d_in, generator=torch.Generator().manual_seed(1))
    times: dict[tuple[str, bool], list[float]] = {way: [] for way in WAYS}
    steps = {}
    for compute_dtype, sparse in WAYS:
        options = TrainingOptions(
            lr=0.0, l1_coefficient=1e-3, total_steps=10**6, compute_dtype=compute_dtype
        )
        one = SAETrainer(sae_with(d_in, d_sae, l0, x), options)
        step = PackStep(1, sparse=sparse)
        steps[compute_dtype, sparse] = (step, one)
        one.active_share = 0.0  # so it begins with the sparse step, and ends before the next look
        step.step([one], x)
    for _ in range(rounds):
        for way, (step, one) in steps.items():
            began = time.perf_counter()
            step.step([one], x)
            times[way].append((time.perf_counter() - began) * 1e3)
    return {way: min(t) for way, t in times.items()}


def products(d_in: int, d_sae: int) -> list[float]:
    """Milliseconds of the encoder's product: in float32, bfloat16 and whole numbers of 8 bits."""
    x, w = torch.randn(ROWS, d_in), torch.randn(d_in, d_sae)
    narrow_x, narrow_w = x.bfloat16(), w.bfloat16()
    q, p = ((30 * t).clamp(-127, 127).to(torch.int8) for t in (x, w.t()))
    ways = (
        lambda: x @ w,
        lambda: narrow_x @ narrow_w,
        lambda: torch._int_mm(q, p.t()),
    )
    found = []
    for way in ways:
        times = []
        for _ in range(20):
            began = time.perf_counter()
            way()
            times.append((time.perf_counter() - began) * 1e3)
        found.append(min(times))
    return found


def named(d_in: int, d_sae: int, l0: float) -> float:
    """Features that might be active, by the product in eight bits, for each that is."""
    x = torch.randn(ROWS, d_in, generator=torch.Generator().manual_seed(1))
    sae = sae_with(d_in, d_sae, l0, x)
    screen = Screen(sae, ROWS, int8=True).set(sae, x, map)
    entries, selection = Entries(sae, ROWS, screen), Selection(sae, screen, x)
    selection.look(slice(0, ROWS), entries)
    might = len(entries)
    selection.find(slice(0, ROWS), entries)
    return might / len(entries)


class Inside(TorchDispatchMode):
    """Seconds that torch's operations and Numba's loops take while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        for module in (numba_kernels, numba_screening):
            for name, function in list(vars(module).items()):
                if isinstance(function, Dispatcher):
                    setattr(module, name, self.timed(function))

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **more)
            self.seconds += time.perf_counter() - began
            return result

        return call

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), more: Any = None
    ) -> Any:
        return self.timed(function)(*arguments, **(more or {}))


def share(d_in: int, d_sae: int, n_rows: int, l0: float, inside: Inside) -> tuple[float, float]:
    """Of a sparse and of a dense step: the part of its time that it spends inside those."""
    x = torch.randn(n_rows, d_in, generator=torch.Generator().manual_seed(1))
    options = TrainingOptions(lr=0.0, l1_coefficient=1e-3, total_steps=10**6)
    found = []
    for sparse in (True, False):
        one, pack = SAETrainer(sae_with(d_in, d_sae, l0, x), options), PackStep(1, sparse=sparse)
        one.active_share = 0.0

        def seconds(pack: PackStep = pack, one: SAETrainer = one, n: int = 8) -> float:
            began = time.perf_counter()
            for _ in range(n):
                pack.step([one], x)
                one.step = 1  # before the next decision on how
            return (time.perf_counter() - began) / n

        seconds()
        within, plain = [], []
        for _ in range(7):  # in turns: taking the time takes some itself
            inside.seconds = 0.0
            with inside:
                seconds()
            within.append(inside.seconds / 8)
            plain.append(seconds())
        found.append(min(1.0, statistics.median(within) / statistics.median(plain)))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="d_in x d_sae")
    parser.add_argument("--l0", nargs="+", type=float, default=L0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--share", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.share:
        inside = Inside()
        for n_rows in (1024, 4096):
            for l0 in (8, 32, 128):
                sparse, dense = share(128, 4096, n_rows, l0, inside)
                print(f"{n_rows} rows, L0 {l0}: sparse {sparse:.0%}, dense {dense:.0%} in kernels")
        return
    for shape in arguments.shapes:
        ms = [f"{x:.2f}" for x in products(*map(int, shape.split("x")))]
        print(
            f"encoder's product, {shape}: float32 {ms[0]} ms, bfloat16 {ms[1]}, eight bits {ms[2]}"
        )
    columns = ["float32 dense", "bfloat16 dense", "sparse", "float32 dense / sparse",
               "bfloat16 dense / sparse", "named / active"]  # fmt: skip
    print("| d_in, d_sae | L0 | " + " | ".join(columns) + " |")
    print("|" + "---|" * (len(columns) + 2))
    for shape in arguments.shapes:
        d_in, d_sae = map(int, shape.split("x"))
        for l0 in arguments.l0:
            ms = measure(d_in, d_sae, l0, arguments.rounds)
            dense, narrow, sparse = (ms[way] for way in WAYS)
            figures = [f"{ms[way]:.1f}" for way in WAYS]
            ratios = (dense / sparse, narrow / sparse, named(d_in, d_sae, l0))
            figures += [f"{x:.2f}" for x in ratios]
            print(f"| {d_in}, {d_sae} | {l0:g} | " + " | ".join(figures) + " |", flush=True)


if __name__ == "__main__":
    main()
