"""Milliseconds a step of standard SAEs of many shapes on one GPU, and where the sparse step pays.

    python benchmarks/gpu_shapes.py            # a checkout, torch and triton: under a minute
    python benchmarks/gpu_shapes.py --quick    # one tiny shape, does it run

In bfloat16, packs replayed from CUDA graphs (`gpu.py` says what is measured), beside autograd's.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

import gpu
import torch
from gpu import FULL, QUICK, Batch, Sizes, heading, row, seconds_of

SHAPES = [  # d_in, d_sae, rows
    (128, 1024, 1024), (128, 4096, 4096), (128, 16_384, 4096), (512, 16_384, 2048),
    (768, 6144, 4096), (768, 24_576, 1024), (768, 24_576, 2048), (768, 24_576, 4096),
    (768, 49_152, 4096), (2304, 36_864, 4096), (4096, 32_768, 4096),
]  # fmt: skip
SHARES = (0.001, 0.002, 0.003, 0.004, 0.006, 0.01)  # of the features
SECONDS = 0.1


def milliseconds(sizes: Sizes, d_sae: int, l0: int, n_saes: int, kind: str, device: str) -> float:
    """Of one SAE of a pack of n_saes."""
    x = torch.randn(sizes.n_rows, sizes.d_in, generator=torch.Generator().manual_seed(0))
    batch = Batch.of(x.to(device), gpu.NORMALIZATION)
    saes = [gpu.an_sae(sizes, d_sae, l0, seed, device) for seed in range(n_saes)]
    make = getattr(gpu, f"{kind}_step")
    step = make(saes, batch, "bfloat16")
    return 1000 * seconds_of(step, batch.x, sizes.seconds) / n_saes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    if not quick and not torch.cuda.is_available():
        sys.exit("no GPU that torch can use; --quick shows whether the script runs")
    device = "cpu" if quick else "cuda"
    print("CPU" if quick else torch.cuda.get_device_name(), "\n")
    heading("d_in", "d_sae", "rows", "autograd", "dense", *(f"{s:.1%}" for s in SHARES))
    for d_in, d_sae, rows in [(8, 20, 16)] if quick else SHAPES:
        sizes = dataclasses.replace(QUICK if quick else FULL, d_in=d_in, n_rows=rows)
        sizes = dataclasses.replace(sizes, seconds=0.0 if quick else SECONDS)
        n_saes = 1 if d_sae > 20_000 else 4
        of_l0 = [max(2, round(share * d_sae)) for share in SHARES]
        times = [
            milliseconds(sizes, d_sae, of_l0[-1], n_saes, kind, device)
            for kind in ("autograd", "dense")
        ]
        if not quick:  # the interpreter has no sparse step in a pack
            times += [milliseconds(sizes, d_sae, l0, n_saes, "sparse", device) for l0 in of_l0]
        row(d_in, d_sae, rows, *(f"{ms:.2f}" for ms in times))


if __name__ == "__main__":
    main()
