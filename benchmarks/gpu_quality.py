"""FVU and CE score over L0 of what a GPU trains in each precision, on the bundled model.

    python benchmarks/gpu_quality.py                      # a checkout, torch, transformers, pyarrow
    python benchmarks/gpu_quality.py --device cpu --dtypes float32        # to compare with
    python benchmarks/gpu_quality.py --tokens 100000 --architectures topk # a quick look

The language model is read by transformers alone, so neither Ray nor transformer_lens is needed.
All SAEs of a line start from the same weights and see the same rows in the same order; they are
trained by what a sweep trains by (`PackStep`), with the defaults of each architecture, and judged
on text that none was trained on. *float32* is dense or from active entries as a sweep would have
it; so is *bfloat16*. The last column is FVU at equal L0: along the line of the first dtype's SAEs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # saeray need not be installed

import pyarrow.parquet as pq
import torch
from fresh_trainer import fresh_trainer
from quality_report import at_equal_l0
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from saeray.sae.architectures.base import SAE
from saeray.sae.metrics import ReconstructionSums
from saeray.sae.pack_step import PackStep
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve

MODEL = Path(__file__).parents[1] / "saeray" / "models" / "tiny-python"
LAYER, D_IN, CONTEXT, SEED = 2, 128, 128, 0
HELD_OUT_WINDOWS = 256
KINDS: dict[str, tuple[str, list[float]]] = {  # what makes it sparse: about L0 80 to 8
    "standard": ("l1_coefficient", [6e-4, 1.5e-3, 3e-3, 6e-3]),
    "p_anneal": ("l1_coefficient", [1.5, 3.0, 6.0]),
    "gated": ("l1_coefficient", [1.5, 3.0, 6.0]),
    "topk": ("k", [8, 16, 32]),
    "batchtopk": ("k", [8, 16, 32]),
    "matryoshka": ("k", [8, 16, 32]),
    "jumprelu": ("l0_coefficient", [0.5, 1.5, 5.0]),
}
MORE: dict[str, dict[str, Any]] = {
    "standard": {"use_ghost_grads": True},
    "matryoshka": {"matryoshka_widths": "64,256"},
    "jumprelu": {"jumprelu_sparsity_loss_mode": "tanh"},  # as quality_architectures.py, and why
}


class Subject:
    """The language model, and its activations at blocks.2.hook_resid_pre."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.model = AutoModelForCausalLM.from_pretrained(MODEL).to(device).eval()
        self.held_out = self.windows("held_out")[:HELD_OUT_WINDOWS]

    def windows(self, split: str) -> Tensor:
        """[n, CONTEXT] tokens of its text, documents one after the other."""
        documents = pq.read_table(MODEL / "text" / f"{split}.parquet").column("text").to_pylist()
        ids = [t for doc in self.tokenizer(documents).input_ids for t in (0, *doc)]
        return torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)

    @torch.no_grad()
    def activations(self, windows: Tensor) -> Tensor:
        """[tokens, D_IN]"""
        parts = []
        for part in windows.split(64):
            states = self.model(part.to(self.device), output_hidden_states=True).hidden_states
            parts.append(states[LAYER].reshape(-1, D_IN).float())
        return torch.cat(parts)

    @torch.no_grad()
    def loss(self, instead: Any) -> float:
        """Cross-entropy on the held-out text with `instead(x)` in place of the activations x."""

        def replace(module: Any, arguments: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            x = instead(x.reshape(-1, D_IN)).reshape(x.shape)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        handle = self.model.transformer.h[LAYER - 1].register_forward_hook(replace)
        try:
            losses = []
            for part in self.held_out.split(64):
                ids = part.to(self.device)
                logits = self.model(ids).logits[:, :-1].flatten(0, 1)
                losses.append(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))
            return float(torch.stack(losses).mean())
        finally:
            handle.remove()


def config_of(
    architecture: str, value: float, dtype: str, arguments: argparse.Namespace
) -> LanguageModelSAERunnerConfig:
    return resolve(
        LanguageModelSAERunnerConfig(
            model_name=str(MODEL),
            hook_point=f"blocks.{LAYER}.hook_resid_pre",
            dataset_path=str(MODEL / "text" / "train.parquet"),
            context_size=CONTEXT,
            architecture=architecture,
            expansion_factor=arguments.d_sae // D_IN,
            lr=arguments.lr,
            seed=SEED,
            training_tokens=arguments.tokens,
            train_batch_size=arguments.batch,
            dead_feature_window=max(1, arguments.tokens // arguments.batch // 10),
            compute_dtype=dtype,
            log_to_wandb=False,
            device=arguments.device,
            **{KINDS[architecture][0]: value},
            **MORE.get(architecture, {}),
        )
    )


def judged(sae: SAE, subject: Subject, x: Tensor, ce: tuple[float, float]) -> dict[str, float]:
    """On held-out rows x; ce: with the activations as they are, and with zeros in their place."""
    sums, active = ReconstructionSums(x.mean(dim=0)), 0
    fired = torch.zeros(sae.d_sae, device=x.device)
    for rows in x.split(4096):
        f = sae.encode(rows)
        sums.add(rows, sae.decode(f) - rows)
        fired += (f != 0).sum(dim=0)
        active += int((f != 0).sum())
    clean, zero = ce
    spliced = subject.loss(lambda rows: sae.decode(sae.encode(rows)))
    return {
        "l0": active / len(x),
        "fvu": float(sums.result().fvu),
        "ce": (zero - spliced) / (zero - clean),
        "never": int((fired == 0).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "tf32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    subject = Subject(device)
    windows = subject.windows("train")[: -(-arguments.tokens // CONTEXT)]
    rows = subject.activations(windows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))
    rows, held_out = rows[order.to(device)], subject.activations(subject.held_out)
    ce = (subject.loss(lambda x: x), subject.loss(torch.zeros_like))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}; d_sae {arguments.d_sae}, lr {arguments.lr:g}, ", end="")
    print(f"{arguments.tokens:,} tokens in batches of {arguments.batch}; ", end="")
    print(f"cross-entropy {ce[0]:.4f}, with zeros {ce[1]:.4f}\n")
    print("| | | dtype | L0 | FVU | CE score | never fired | sparse steps | FVU at equal L0 | s |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for architecture in arguments.architectures:
        knob, values = KINDS[architecture]
        line: list[dict[str, Any]] = []
        for dtype in arguments.dtypes:
            started = time.monotonic()
            trainers = [
                fresh_trainer(config_of(architecture, value, dtype, arguments), D_IN, device)
                for value in values
            ]
            pack, sparse = PackStep(), [0] * len(trainers)
            n = arguments.batch
            steps = arguments.tokens // arguments.batch
            for i in range(steps):
                pack.step(trainers, rows[i * n : (i + 1) * n])
                sparse = [k + t.sparse for k, t in zip(sparse, trainers, strict=True)]
            took = time.monotonic() - started
            found = [judged(t.published, subject, held_out, ce) for t in trainers]
            line = line or found
            for value, of_sparse, row in zip(values, sparse, found, strict=True):
                ratio = row["fvu"] / at_equal_l0(row["l0"], line)
                print(
                    f"| {architecture} | {knob} {value:g} | {dtype} | {row['l0']:.1f} "
                    f"| {row['fvu']:.4f} | {row['ce']:.4f} | {row['never']} "
                    f"| {of_sparse / steps:.0%} | {ratio:.3f} | {took / len(values):.0f} |",
                    flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
