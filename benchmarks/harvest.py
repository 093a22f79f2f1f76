"""Tokens/s of one harvester's language model on one CPU core, in float32 and bfloat16.

    python benchmarks/harvest.py                     # about two minutes

The bundled model (4 layers, d_model 128) at blocks.2.hook_resid_pre, and one of GPT-2 small's
shape (12 layers, d_model 768) with random weights at blocks.6.hook_resid_pre; contexts of 128
tokens. Ways are timed in turns; the table has the fastest of the rounds.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch
from peers import MODEL

from saeray.lm.model import LanguageModel
from saeray.spec.config import LanguageModelSAERunnerConfig

CONTEXT = 128
DTYPES = ["float32", "bfloat16"]


def gpt2_small(folder: Path) -> Path:
    """Random weights in GPT-2 small's shape; the bundled model's tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    for file in MODEL.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | contexts per forward | float32 tokens/s | bfloat16 tokens/s | ratio |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "bundled, 4 layers, 128": (MODEL, "blocks.2.hook_resid_pre"),
            "GPT-2 small's shape": (gpt2_small(Path(folder)), "blocks.6.hook_resid_pre"),
        }
        for name, (path, hook) in models.items():
            loaded = [
                LanguageModel(
                    LanguageModelSAERunnerConfig(
                        model_name=str(path),
                        hook_point=hook,
                        dataset_path="-",
                        context_size=CONTEXT,
                        activation_dtype=dtype,
                        device="cpu",
                    ),
                    [hook],
                )
                for dtype in DTYPES
            ]
            for n in arguments.contexts:
                tokens = loaded[0].random_tokens(n, CONTEXT)
                best = [0.0, 0.0]
                for _ in range(arguments.rounds):
                    for i, model in enumerate(loaded):
                        began = time.perf_counter()
                        model.activations(tokens)
                        rate = tokens.numel() / (time.perf_counter() - began)
                        best[i] = max(best[i], rate)
                wide, narrow = best
                print(
                    f"| {name} | {n} | {wide:,.0f} | {narrow:,.0f} | {narrow / wide:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
