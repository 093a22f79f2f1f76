"""FVU at equal L0 of TopK transcoders of an MLP: saeray beside sparsify, by one evaluator.

    python benchmarks/quality_transcoders.py --output quality/transcoders

sae_lens loads transcoders and trains none; sparsify (of 2501.18823) trains them, with TopK. Both
are given the same batches of the bundled model: x at `blocks.2.mlp.hook_in`, y at
`blocks.2.hook_mlp_out`, d_sae 1024, k 8, 16 and 32, with a skip connection and without. Each is at
the best of some learning rates. sparsify has its default optimizer (schedule-free sign descent with
momentum) and Adam with warm-up and decay, its loss and its start; saeray the recipe `sae_lens`. All
are then judged by saeray on text that none was trained on. One training runs at a time.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import MODEL, ROOT, SETTINGS, environment
from quality import BATCH, CONTEXT, EXPANSION, run
from safetensors.torch import load_file

from saeray.cluster.options import options_of
from saeray.files import strict_json
from saeray.lm.hub import load_tokenizer
from saeray.lm.model import LanguageModel
from saeray.sae.architectures import ARCHITECTURES
from saeray.sae.architectures.base import SAE
from saeray.sae.architectures.topk import TopKSAE
from saeray.sae.initial import initial_sae
from saeray.sae.metrics import ReconstructionSums
from saeray.sae.pack_step import PackStep
from saeray.sae.trainer import SAETrainer
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve
from saeray.text.tokens import TokenWindows

READ, WRITTEN = "blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"
D = 128
K = (8, 16, 32)
OURS = {"saeray": {}, "saeray, lr decay": {"lr_decay_steps": 0.2}}
LR = (2e-3, 4e-3, 8e-3)
THEIRS = {"sparsify 1.3.3, signum": "signum", "sparsify 1.3.3, Adam": "adam"}
THEIR_LR = {"signum": (5e-3, 1e-2, 2e-2), "adam": LR}  # 0.02: its own for d_sae 1024
AUXK = 1 / 32


class Benchmark:
    """What both are given, and what is found of each."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.output: Path = arguments.output.resolve()
        self.output.mkdir(parents=True, exist_ok=True)
        self.steps, self.k, self.skips = arguments.tokens // BATCH, arguments.k, arguments.skip
        self.seed = arguments.seed
        config = self.config(lr=1e-3, k=8)
        self.model = LanguageModel(config, [READ, WRITTEN])
        self.text = TokenWindows(config, load_tokenizer(config))
        found = self.model.activations(torch.from_numpy(self.text.evaluation().copy()))
        self.held_out = [found[h].float() for h in (READ, WRITTEN)]

    def config(self, **fields: Any) -> LanguageModelSAERunnerConfig:
        return resolve(
            LanguageModelSAERunnerConfig(
                model_name=str(MODEL),
                hook_point=READ,
                hook_point_out=WRITTEN,
                dataset_path=str(MODEL / "text" / "train.parquet"),
                architecture="topk",
                recipe="sae_lens",
                b_dec_init_method="mean",
                context_size=CONTEXT,
                expansion_factor=EXPANSION,
                seed=self.seed,
                training_tokens=self.steps * BATCH,
                train_batch_size=BATCH,
                dead_feature_window=max(1, self.steps // 10),
                store_batch_size=SETTINGS["store_batch_size"],
                eval_windows=64,
                log_to_wandb=False,
                device="cpu",
                **fields,
            )
        )

    @property
    def files(self) -> list[Path]:
        return [self.output / f"{name} {self.steps} seed {self.seed}.npy" for name in "xy"]

    def activations(self) -> list[np.ndarray]:
        """x and y [tokens, d], the same rows in the same order; kept in files."""
        files = self.files
        if not files[1].exists():
            n, at_once = -(-self.steps * BATCH // CONTEXT), SETTINGS["store_batch_size"]
            parts = []
            for first in range(0, n, at_once):
                windows = torch.from_numpy(self.text.train(first, min(at_once, n - first)).copy())
                found = self.model.activations(windows)
                parts.append([found[h].float().numpy() for h in (READ, WRITTEN)])
            rows = [np.concatenate(part) for part in zip(*parts, strict=True)]
            order = np.random.default_rng(self.seed).permutation(len(rows[0]))
            for file, values in zip(files, rows, strict=True):
                np.save(file, values[order[: self.steps * BATCH]])
        return [np.load(file, mmap_mode="r") for file in files]

    def train_ours(self, fields: dict[str, Any], skip: bool) -> Iterator[tuple[int, float, SAE]]:
        """Of every k and learning rate, all in one pack."""
        x, y = self.activations()
        at = [(k, lr) for k in self.k for lr in LR]
        fields = {n: int(v * self.steps) if n.endswith("_steps") else v for n, v in fields.items()}
        trainers = []
        for k, lr in at:
            config = self.config(k=k, lr=lr, skip_connection=skip, **fields)
            options = options_of(config, torch.device("cpu"), D)
            sae = initial_sae(
                D,
                EXPANSION * D,
                seed=config.seed,
                b_dec=torch.from_numpy(x[:BATCH].mean(axis=0)),
                b_dec_out=torch.from_numpy(y[:BATCH].mean(axis=0)),
                skip=skip,
                dtype=torch.float32,
                encoder_init=str(config.encoder_init),
                encoder_init_scale=config.encoder_init_scale or 0.0,
                decoder_init_norm=config.decoder_init_norm or 0.0,
                architecture=ARCHITECTURES["topk"],
                options=options,
            )
            trainers.append(SAETrainer(sae, options))
        step = PackStep()
        for i in range(self.steps):
            rows = slice(i * BATCH, (i + 1) * BATCH)
            read = tuple(torch.from_numpy(values[rows].copy()) for values in (x, y))
            step.step(trainers, [read] * len(trainers))
        for (k, lr), trainer in zip(at, trainers, strict=True):
            yield k, lr, trainer.published

    def train_theirs(self, optimizer: str, skip: bool) -> Iterator[tuple[int, float, SAE]]:
        self.activations()
        coders = [
            {
                "folder": str(self.output / f"{optimizer} skip {skip} k {k} lr {lr:g}"),
                "k": k, "lr": lr, "skip": skip, "optimizer": optimizer, "auxk": AUXK,
            }
            for k in self.k
            for lr in THEIR_LR[optimizer]
        ]  # fmt: skip
        settings = {
            **{name: str(file) for name, file in zip("xy", self.files, strict=True)},
            "seed": self.seed, "steps": self.steps, "batch": BATCH, "d_sae": EXPANSION * D,
            "dead_feature_window": max(1, self.steps // 10), "coders": coders,
        }  # fmt: skip
        script = str(ROOT / "benchmarks" / "peer_transcoders.py")
        command = [str(environment("sparsify")), script, json.dumps(settings)]
        run(command, self.output / "log.txt", os.environ | {"OMP_NUM_THREADS": "1"})
        for one in coders:
            yield one["k"], one["lr"], as_ours(Path(one["folder"]), one["k"])

    @torch.inference_mode()
    def judged(self, k: int, lr: float, sae: SAE) -> dict[str, Any]:
        """On the held-out text, without the language model's loss: many are judged here."""
        sums, n_active = ReconstructionSums(self.held_out[1].mean(dim=0)), 0
        fired = torch.zeros(sae.d_sae, dtype=torch.bool)
        for x, y in zip(*(rows.split(BATCH) for rows in self.held_out), strict=True):
            f = sae.encode(x)
            sums.add(y, sae.reconstruct(x, f) - y)
            fired |= (f > 0).any(dim=0)
            n_active += int((f > 0).sum())
        return {
            "k": k,
            "lr": lr,
            "l0": n_active / sums.n_rows,
            "fvu": sums.result().fvu,
            "never": int((~fired).sum()),
        }


def as_ours(folder: Path, k: int) -> SAE:
    """A SparseCoder of sparsify as what it computes."""
    w = load_file(folder / "weights.safetensors")
    return TopKSAE(
        W_enc=w["encoder.weight"].t(),
        W_dec=w["W_dec"],
        b_enc=w["encoder.bias"],
        b_dec=torch.zeros(D),
        b_dec_out=w["b_dec"],
        W_skip=w["W_skip"].t().contiguous() if "W_skip" in w else None,
        k=k,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--k", type=int, nargs="+", default=K)
    parser.add_argument("--skip", type=int, choices=(0, 1), nargs="+", default=(0, 1))
    parser.add_argument("--systems", nargs="+", default=[*OURS, *THEIRS])
    benchmark = Benchmark(parser.parse_args())
    systems = parser.parse_args().systems
    found: dict[str, list[dict[str, Any]]] = {}
    for skip in map(bool, benchmark.skips):
        for system in systems:
            saes = (
                benchmark.train_ours(OURS[system], skip)
                if system in OURS
                else benchmark.train_theirs(THEIRS[system], skip)
            )
            label = f"{system}{', skip connection' if skip else ''}"
            found[label] = [benchmark.judged(*one) for one in saes]
            print(label, *found[label], sep="\n  ", flush=True)
    (benchmark.output / "results.json").write_text(strict_json.dumps(found, indent=1))
    print("\n| | " + " | ".join(f"k {k}: lr, L0, FVU, never fired" for k in benchmark.k))
    print("|---" * (1 + len(benchmark.k)) + "|")
    for label, rows in found.items():
        cells = []
        for k in benchmark.k:
            best = min((r for r in rows if r["k"] == k), key=lambda r: r["fvu"])
            figures = f"{best['l0']:.1f}, {best['fvu']:.4f}, {best['never']}"
            cells.append(f"{best['lr']:g}, {figures}")
        print(f"| {label} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
