"""Build the bundled language model and its text (`saeray/models/tiny-python`).

A GPT-2-shaped model small enough to ship (4 layers, d_model 128, vocabulary 4096), trained on
Python's own documentation and the docstrings of its standard library (PSF licence), so that the
default sweep trains SAEs on the activations of a model that has really learned something.

Nothing in saeray treats the result specially: it is an ordinary Hugging Face directory and
ordinary parquet files.

    apt-get install python3-doc          # the documentation's reStructuredText sources
    python saeray/models/build_tiny_python.py --docs /usr/share/doc/python3.11/html/_sources

Prints the unigram entropy of the held-out text and the model's held-out loss, in nats per token.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent / "tiny-python"
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 256  # tokens
BATCH = 16  # contexts
HELD_OUT_EVERY = 50  # one document in fifty is never trained on


def docstring_documents() -> list[str]:
    """One document per standard-library module: its docstrings, in source order."""
    documents = []
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if skipped & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # deliberately broken fixtures of the standard library
        parts = []
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    name = getattr(node, "name", path.stem)
                    parts.append(f"{name}\n{text}")
        if parts:
            documents.append("\n\n".join(parts))
    return documents


def documentation_documents(sources: Path) -> list[str]:
    """The documentation's reStructuredText pages, cut into pieces of a few thousand characters."""
    documents = []
    for path in sorted(sources.rglob("*.rst.txt")):
        if path.name == "changelog.rst.txt":
            continue  # a list of commit lines, a fifth of all text
        text = path.read_text(encoding="utf-8", errors="replace")
        piece: list[str] = []
        size = 0
        for paragraph in text.split("\n\n"):
            piece.append(paragraph)
            size += len(paragraph)
            if size > 4000:
                documents.append("\n\n".join(piece))
                piece, size = [], 0
        if piece:
            documents.append("\n\n".join(piece))
    return documents


def write_parquet(documents: list[str], path: Path) -> None:
    table = pa.table({"text": pa.array(documents, pa.string())})
    pq.write_table(table, path, compression="zstd", compression_level=19)


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=CONTEXT,
    )


def tokenise(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    ids: list[int] = []
    for document in documents:
        ids.append(tokenizer.bos_token_id)
        ids.extend(tokenizer.encode(document))
    return np.asarray(ids, dtype=np.int64)


def unigram_entropy(train: np.ndarray, held_out: np.ndarray) -> float:
    """Cross-entropy of the held-out tokens under the training frequencies (add-one), nats."""
    counts = np.bincount(train, minlength=VOCABULARY) + 1.0
    log_p = np.log(counts / counts.sum())
    return float(-log_p[held_out].mean())


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, ids: np.ndarray) -> float:
    model.eval()
    n = len(ids) // CONTEXT
    windows = torch.from_numpy(ids[: n * CONTEXT].reshape(n, CONTEXT))
    losses = [model(w, labels=w).loss.item() * len(w) for w in windows.split(32)]
    model.train()
    return sum(losses) / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, required=True, help="reStructuredText sources")
    parser.add_argument("--tokens", type=float, default=16e6, help="tokens to train on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    documents = documentation_documents(arguments.docs) + docstring_documents()
    build(HERE, documents, Size(), arguments.tokens, arguments.seed)


class Size(NamedTuple):
    """Of a model with GPT-2's shape."""

    layers: int = 4
    d_model: int = 128
    heads: int = 4


def build(folder: Path, documents: list[str], size: Size, tokens: float, seed: int) -> None:
    """Writes text/train.parquet, text/held_out.parquet, tokenizer, model and figures.json."""
    random.seed(seed)
    torch.manual_seed(seed)
    documents = [d for d in documents if len(d) >= 200]
    random.shuffle(documents)
    held_out = documents[::HELD_OUT_EVERY]
    train = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY]
    (folder / "text").mkdir(parents=True, exist_ok=True)
    write_parquet(train, folder / "text" / "train.parquet")
    write_parquet(held_out, folder / "text" / "held_out.parquet")

    tokenizer = train_tokenizer(train)
    tokenizer.save_pretrained(folder)
    # The class name that transformers 4 knows too.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    train_ids, held_out_ids = tokenise(tokenizer, train), tokenise(tokenizer, held_out)
    print(f"{len(train)} documents, {len(train_ids):,} tokens; held out {len(held_out_ids):,}")

    model = train_model(tokenizer, train_ids, size, steps_of(tokens), seed)
    entropy, loss_nats = (
        unigram_entropy(train_ids, held_out_ids),
        held_out_loss(model, held_out_ids),
    )
    model.save_pretrained(folder)
    figures = {
        "train_tokens_in_text": len(train_ids),
        "held_out_tokens": len(held_out_ids),
        "tokens_trained_on": steps_of(tokens) * BATCH * CONTEXT,
        "unigram_entropy_nats": round(entropy, 3),
        "held_out_loss_nats": round(loss_nats, 3),
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def steps_of(tokens: float) -> int:
    """Optimizer steps that see that many tokens."""
    return int(tokens / (BATCH * CONTEXT))


def train_model(
    tokenizer: PreTrainedTokenizerFast, train_ids: np.ndarray, size: Size, steps: int, seed: int
) -> GPT2LMHeadModel:
    """A model trained on contexts taken at random from `train_ids` [tokens]."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=size.d_model,
        n_layer=size.layers,
        n_head=size.heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=4e-3,
        betas=(0.9, 0.95),
        fused=True,
    )
    generator = np.random.default_rng(seed)
    started = time.time()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 200)
        scale = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * scale
        starts = generator.integers(0, len(train_ids) - CONTEXT, size=BATCH)
        x = torch.from_numpy(np.stack([train_ids[s : s + CONTEXT] for s in starts]))
        loss = model(x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            rate = (step + 1) * BATCH * CONTEXT / (time.time() - started)
            print(f"step {step}/{steps} loss {loss.item():.3f} {rate:,.0f} tokens/s", flush=True)
    return model


if __name__ == "__main__":
    main()
