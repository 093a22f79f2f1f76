"""The training step of a standard SAE on one GPU: how long, how much memory, and where it goes.

    python benchmarks/gpu.py             # a checkout, torch and triton: under five minutes
    python benchmarks/gpu.py --quick     # tiny, on the CPU in Triton's interpreter: does it run

Prints, as Markdown: whether the sparse step agrees with a dense one in float32; a table of the
dense steps in three precisions, the sparse one, and what the peers do (autograd under bfloat16
autocast, fused Adam); and the sparse step by part, with its encoder made in several ways.

Features fire as rarely as an L0 asks for: rows of x are Gaussian, encoder rows have norm 1, and
b_enc_j is the quantile of feature j's frequency; frequencies fall with the feature's rank as in
trained SAEs, from 1/2 down. lr is 0, so that L0 stays.  B rows, D = d_in, L = d_sae.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
if "--quick" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from saeray.sae.architectures.base import PARAMETERS
from saeray.sae.architectures.standard import StandardSAE
from saeray.sae.gpu import sparse_step as gpu_step
from saeray.sae.gpu.adam import HalfWeights, adam_rates, fused_adam_rows
from saeray.sae.gpu.sparse_step import CudaSpace, product_precision, sparse_gradients
from saeray.sae.gradients import Batch, Gradients
from saeray.sae.options import TrainingOptions
from saeray.sae.pack_step import PackStep
from saeray.sae.trainer import SAETrainer

L1_COEFFICIENT = 1e-3
NORMALIZATION = "sum"
MARKS = ("cast", "encoder", "select", "lists", "evaluate", "decode", "gradients", "b_dec", "adam")


@dataclasses.dataclass(frozen=True)
class Sizes:
    d_in: int
    n_rows: int
    widths: tuple[int, ...]
    l0: tuple[int, ...]
    n_saes: tuple[int, ...]
    seconds: float  # of timing, for each line of the table


FULL = Sizes(768, 4096, (24_576, 49_152), (32, 128, 512), (1, 16), 0.5)
QUICK = Sizes(8, 16, (20,), (3,), (1, 2), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--budget", type=float, default=270.0, help="seconds; then it ends")
    arguments = parser.parse_args()
    sizes, device = (QUICK, "cpu") if arguments.quick else (FULL, "cuda")
    if arguments.quick:
        gpu_step.N_WORKERS = 2  # each is a loop in Python
    elif not torch.cuda.is_available():
        sys.exit("no GPU that torch can use; --quick shows whether the script runs")
    ends = time.monotonic() + arguments.budget
    import triton

    name = "CPU, interpreted" if arguments.quick else torch.cuda.get_device_name()
    print(f"{name}; torch {torch.__version__}, triton {triton.__version__}", end="; ")
    print(f"d_in {sizes.d_in}, batches of {sizes.n_rows} rows\n")
    x = torch.randn(sizes.n_rows, sizes.d_in, generator=torch.Generator().manual_seed(0))
    batch = Batch.of(x.to(device), NORMALIZATION)
    check(batch, sizes, device)
    by_part(batch, sizes, device)
    table(batch, sizes, device, ends)


def an_sae(sizes: Sizes, d_sae: int, l0: int, seed: int, device: str) -> StandardSAE:
    """Both weights a row per feature in memory; about l0 features active in a row of x."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.randn(d_sae, sizes.d_in, generator=generator, device=device)
    rows /= rows.norm(dim=1, keepdim=True)
    ranks = torch.randperm(d_sae, generator=generator, device=device).double() + 1
    frequency = ranks**-0.7
    for _ in range(20):  # what the limit cuts off, the others get
        frequency = (frequency * (l0 / frequency.sum())).clamp(max=0.5)
    b_enc = torch.special.ndtri(frequency).float()
    W_dec = torch.randn(d_sae, sizes.d_in, generator=generator, device=device)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return StandardSAE(rows.t(), W_dec, b_enc, torch.zeros(sizes.d_in, device=device))


# The steps: each takes SAEs and gives a function that advances all of them by one step.


class SparseStep:
    """The sparse step without a trainer's counters, told of its parts."""

    def __init__(self, saes: list[StandardSAE], batch: Batch, dtype: str, **more: object) -> None:
        self.saes, self.batch = saes, batch
        self.space = CudaSpace(saes[0], len(batch.x), dtype, **more)  # type: ignore[arg-type]
        self.out, self.errors = Gradients(saes[0]), torch.empty_like(batch.x)
        self.moments = [
            {k: (torch.zeros_like(p), torch.zeros_like(p)) for k, p in sae.named_parameters()}
            for sae in saes
        ]
        self.halves = [HalfWeights(sae) if dtype == "bfloat16" else None for sae in saes]
        device = batch.x.device
        self.penalty = torch.tensor(L1_COEFFICIENT / len(batch.x), device=device)
        self.rates = torch.tensor(adam_rates(0.0, 0.9, 0.999, 1), device=device)

    def gradients(self, i: int) -> None:
        sparse_gradients(
            self.saes[i], self.batch, penalty=self.penalty, want_l1=False, errors=self.errors,
            out=self.out, space=self.space, half=self.halves[i],
        )  # fmt: skip
        self.out.b_dec.sub_(self.out.b_enc @ self.saes[i].W_enc.t())
        self.space.mark("b_dec")

    def __call__(self) -> None:
        for i, sae in enumerate(self.saes):
            self.gradients(i)
            fused_adam_rows(
                sae, self.out, self.moments[i], self.rates, beta1=0.9, beta2=0.999, unit=True,
                half=self.halves[i],
            )  # fmt: skip
            self.space.mark("adam")


def dense_step(saes: list[StandardSAE], batch: Batch, dtype: str) -> Callable[[], object]:
    """What a sweep does while many features are active."""
    return pack_step(saes, batch, dtype, sparse=False)


def sparse_step(saes: list[StandardSAE], batch: Batch, dtype: str) -> Callable[[], object]:
    """What a sweep does afterwards."""
    return pack_step(saes, batch, dtype, sparse=True)


def pack_step(
    saes: list[StandardSAE], batch: Batch, dtype: str, *, sparse: bool
) -> Callable[[], object]:
    """All that a pack does in a step, counters included; replayed from a CUDA graph."""
    options = TrainingOptions(
        lr=0.0, l1_coefficient=L1_COEFFICIENT, total_steps=1 << 30, compute_dtype=dtype,
        mse_normalization=NORMALIZATION, lr_scheduler_name="constant",
    )  # fmt: skip
    trainers = [SAETrainer(sae, options) for sae in saes]
    if sparse and not all(t.on_gpu for t in trainers):
        raise RuntimeError("the sparse step can't run here: saeray.sae.gpu.sparse_step.available")
    pack = PackStep(sparse=sparse)

    def step() -> None:
        for trainer in trainers:
            trainer.active_share = 0.0  # or it would be dense where that is the faster one
        pack.step(trainers, batch.x)

    return step


def autograd_step(saes: list[StandardSAE], batch: Batch, dtype: str) -> Callable[[], object]:
    """As peers do it: W_enc [D, L] in memory, autograd under autocast, torch's fused Adam."""
    copies = []
    for sae in saes:
        p = {k: v.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
             for k, v in sae.named_parameters()}  # fmt: skip
        copies.append((p, torch.optim.Adam(p.values(), lr=0.0, fused=True)))
    saes.clear()  # so that their memory isn't counted

    def step() -> None:
        for p, adam in copies:
            with torch.autocast(batch.x.device.type, torch.bfloat16):
                f = torch.relu((batch.x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
                x_hat = f @ p["W_dec"] + p["b_dec"]
                mse = (x_hat.float() - batch.x).square().sum(1).mean()
                loss = mse + L1_COEFFICIENT * f.sum(1).mean()
            loss.backward()
            adam.step()
            adam.zero_grad()

    return step


def synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def seconds_of(step: Callable[[], object], x: Tensor, seconds: float) -> float:
    """Of one call: the mean over as many as fit, after two that don't count."""

    def took(n: int) -> float:
        synchronize(x)
        started = time.perf_counter()
        for _ in range(n):
            step()
        synchronize(x)
        return (time.perf_counter() - started) / n

    if not seconds:
        return took(1)
    took(1)
    return took(max(1, min(50, int(seconds / took(1)))))


def row(*cells: object) -> None:
    print("|", " | ".join(str(c) for c in cells), "|", flush=True)


def heading(*cells: str) -> None:
    row(*cells)
    row(*("---" for _ in cells))


def dense_gradients(sae: StandardSAE, batch: Batch) -> dict[str, Tensor]:
    """In float32, written out again: Σ over 512 rows at a time."""
    total = {k: torch.zeros_like(p) for k, p in sae.named_parameters()}
    for a in range(0, len(batch.x), 512):
        x, scale = batch.x[a : a + 512], batch.scale[a : a + 512]
        f = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
        dx = scale * (f @ sae.W_dec + sae.b_dec - x)
        dh = (dx @ sae.W_dec.t() + L1_COEFFICIENT / len(batch.x)) * (f > 0)
        total["W_dec"] += f.t() @ dx
        total["W_enc"] += (x - sae.b_dec).t() @ dh
        total["b_enc"] += dh.sum(0)
        total["b_dec"] += dx.sum(0) - dh.sum(0) @ sae.W_enc.t()
    return total


def check(batch: Batch, sizes: Sizes, device: str) -> None:
    """Relative errors of the sparse gradients, and whether two runs give the same bits."""
    print("## Sparse gradients against dense ones in float32\n")
    heading("sparse step", *PARAMETERS, "active a row, of nominated", "two runs")
    sae = an_sae(sizes, sizes.widths[0], sizes.l0[0], 0, device)
    with product_precision("float32"):
        wanted = dense_gradients(sae, batch)
    for dtype, fused in (
        ("float32", False), ("tf32", False), ("tf32", True), ("bfloat16", False), ("bfloat16", True)
    ):  # fmt: skip
        if device == "cpu" and (fused or dtype == "tf32"):
            continue  # the interpreter has no tensor cores
        step = SparseStep([sae], batch, dtype, fused_encoder=fused)
        step.gradients(0)
        first = [t.clone() for t in (*step.out.tensors(), step.errors)]
        step.gradients(0)
        same = all(map(torch.equal, first, (*step.out.tensors(), step.errors)))
        wrong = [
            float((getattr(step.out, k) - wanted[k]).norm() / wanted[k].norm()) for k in PARAMETERS
        ]
        nominated = int(step.space.total) / len(batch.x)
        per_row = float(step.out.fired.sum()) / len(batch.x)
        row(
            dtype + ", product in Triton" * fused, *(f"{w:.1e}" for w in wrong),
            f"{per_row:.1f} of {nominated:.1f}", "same bits" if same else "**DIFFER**",
        )  # fmt: skip
    print()


def by_part(batch: Batch, sizes: Sizes, device: str) -> None:
    """Milliseconds of each part of the sparse step in bfloat16, of one SAE."""
    print("## The sparse step in bfloat16 by part, ms\n")
    heading("d_sae", "L0", "encoder", *MARKS, "sum")
    ways: list[tuple[str, dict[str, object]]] = [
        (f"cuBLAS, {mib} MiB of h", dict(chunk_bytes=mib << 20)) for mib in (96, 1024)
    ]
    ways += [("Triton", dict(fused_encoder=True))]
    for d_sae in sizes.widths:
        for l0 in sizes.l0:
            for way, more in ways[:1] if device == "cpu" else ways:
                step = SparseStep([an_sae(sizes, d_sae, l0, 0, device)], batch, "bfloat16", **more)
                ms = parts_of(step, batch.x, 1 if device == "cpu" else 10)
                row(d_sae, l0, way, *(f"{ms[m]:.3f}" for m in MARKS), f"{sum(ms.values()):.3f}")
                del step
    print()


def parts_of(step: SparseStep, x: Tensor, n: int) -> dict[str, float]:
    """Milliseconds between the marks, the mean over n steps."""
    step()
    synchronize(x)
    seen: list[tuple[str, object]] = []

    def mark(part: str) -> None:
        if x.is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            seen.append((part, event))
        else:
            seen.append((part, time.perf_counter()))

    step.space.mark = mark
    total: dict[str, float] = defaultdict(float)
    for _ in range(n):
        seen.clear()
        mark("start")
        step()
        synchronize(x)
        for (_, before), (part, after) in pairwise(seen):
            took = before.elapsed_time(after) if x.is_cuda else 1000 * (after - before)  # type: ignore
            total[part] += took / n
    return total


def table(batch: Batch, sizes: Sizes, device: str, ends: float) -> None:
    print("## Steps\n")
    heading("step", "d_sae", "L0", "SAEs", "ms a step of one SAE", "SAE-tokens/s", "peak GiB")
    quick = device == "cpu"
    seen: dict[tuple[object, ...], str] = {}
    for n_saes in sizes.n_saes:
        for d_sae in sizes.widths:
            for l0 in sizes.l0:
                sparse = SparseStep if quick else sparse_step  # the interpreter is no GPU
                steps: list[tuple[str, Callable[..., object], str]] = [
                    ("sparse, bfloat16", sparse, "bfloat16")
                ]
                if not quick:
                    steps.append(("sparse, tf32", sparse, "tf32"))
                if l0 == sizes.l0[0]:  # what the others cost doesn't depend on L0
                    steps.append(("autograd, bfloat16 autocast", autograd_step, "bfloat16"))
                    types = ("float32",) if quick else ("bfloat16", "tf32", "float32")
                    steps += [(f"dense, {t}", dense_step, t) for t in types]
                for name, make, dtype in steps:
                    if time.monotonic() > ends:
                        print("\n(no time left; --budget)")
                        return
                    cells = measured(make, batch, sizes, (d_sae, l0, n_saes), dtype, device)
                    row(name, d_sae, l0, n_saes, *cells)
                    seen[name, d_sae, l0, n_saes] = cells[0]
    print()
    for dtype in ("bfloat16", "tf32"):
        for d_sae in sizes.widths:
            break_even(seen, dtype, d_sae, sizes.l0)


def break_even(
    seen: dict[tuple[object, ...], str], dtype: str, d_sae: int, l0: tuple[int, ...]
) -> None:
    """Up to which L0 the sparse step is the faster one, from two L0 in a straight line."""
    try:
        few, many = (float(seen[f"sparse, {dtype}", d_sae, n, 1]) for n in (l0[0], l0[-1]))
        dense = float(seen[f"dense, {dtype}", d_sae, l0[0], 1])
        at = l0[0] + (dense - few) * (l0[-1] - l0[0]) / (many - few)
    except (KeyError, ValueError, ZeroDivisionError):  # not measured, or no room for it
        return
    print(f"{dtype}, d_sae {d_sae}: sparse is faster below L0 of about {at:.0f}, ", end="")
    print(f"{at / d_sae:.2%} of the features")


def measured(
    make: Callable[..., object],
    batch: Batch,
    sizes: Sizes,
    shape: tuple[int, int, int],
    dtype: str,
    device: str,
) -> tuple[str, ...]:
    """Of `n_saes` SAEs of a width and an L0: ms, tokens/s and peak memory."""
    d_sae, l0, n_saes = shape
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        saes = [an_sae(sizes, d_sae, l0, seed, device) for seed in range(n_saes)]
        step = make(saes, batch, dtype)
        took = seconds_of(step, batch.x, sizes.seconds) / n_saes  # type: ignore[arg-type]
    except torch.cuda.OutOfMemoryError:
        return ("out of memory", "", "")
    peak = "" if device == "cpu" else f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
    return (f"{1000 * took:.3f}", f"{len(batch.x) / took:,.0f}", peak)


if __name__ == "__main__":
    main()
