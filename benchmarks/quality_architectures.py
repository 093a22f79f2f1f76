"""FVU at equal L0 of every architecture: saeray beside sae_lens's trainer, by one evaluator.

    python benchmarks/quality_architectures.py --output quality/architectures
    python benchmarks/quality_architectures.py --output quality/look --tokens 200000 --seeds 0 \
        --architectures topk gated                                        # a quick look

Both train the same SAEs at the same settings: sae_lens's defaults for each architecture, three
sparsities, the bundled model, d_sae 1024, one learning rate. They are given the same batches from
the same initial weights, a seed each, so that what differs between them is what they make of those
and not luck (`--own-start` lets sae_lens draw its own weights, of the same distribution). All are
then judged by saeray on text that none was trained on. One training runs at a time.

dead_feature_window is a tenth of the steps in both, not sae_lens's 1000: more than there are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import quality_report
import torch
from fresh_trainer import fresh_trainer
from peers import ROOT, SETTINGS, environment
from quality import BATCH, CONTEXT, EXPANSION, SUBJECTS, run
from quality_report import at_equal_l0
from safetensors.torch import save_file

from saeray.files.checkpoint import save_final
from saeray.files.storage import Folder
from saeray.lm.hub import load_tokenizer
from saeray.lm.model import LanguageModel
from saeray.sae.pack_step import PackStep
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve
from saeray.text.tokens import TokenWindows

SUBJECT = SUBJECTS["bundled"]
D_SAE = EXPANSION * SUBJECT.d_in
MATRYOSHKA_WIDTHS = [32, 96, 224, 480, 1024]
TANH = {"jumprelu_sparsity_loss_mode": "tanh"}
AUXK = {"auxk_scaling": "dead_share"}  # as sae_lens has it, with its coefficient of 1


class Kind(NamedTuple):
    """An architecture at sae_lens's defaults, in the words of both."""

    knob: str  # which field makes it sparse; both call it the same
    values: list[float]
    ours: dict[str, Any] = {}  # noqa: RUF012 - never written to
    theirs: dict[str, Any] = {}  # noqa: RUF012


KINDS = {
    "standard": Kind("l1_coefficient", [1.5, 3.0, 6.0]),
    "topk": Kind("k", [8, 16, 32], AUXK),
    "batchtopk": Kind("k", [8, 16, 32], AUXK),
    "matryoshka": Kind(
        "k",
        [8, 16, 32],
        AUXK | {"matryoshka_widths": ",".join(map(str, MATRYOSHKA_WIDTHS))},
        {"matryoshka_widths": MATRYOSHKA_WIDTHS},
    ),
    # The default, step, leaves L0 at 800 and more for as many steps as there are here.
    "jumprelu": Kind("l0_coefficient", [0.5, 1.5, 5.0], TANH, TANH),
    "gated": Kind("l1_coefficient", [1.5, 3.0, 6.0]),
}
DEFAULT = ["topk", "batchtopk", "matryoshka", "jumprelu", "gated"]


class Sae(NamedTuple):
    system: str
    seed: int
    lr: float
    l1: float  # the value of whatever makes it sparse
    folder: Path


class Benchmark:
    """What both are given, and where their SAEs are kept."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.model = SUBJECT.folder()
        self.steps = arguments.tokens // BATCH
        self.dead_feature_window = self.steps // 10

    def config(self, seed: int, **fields: Any) -> LanguageModelSAERunnerConfig:
        return resolve(
            LanguageModelSAERunnerConfig(
                model_name=str(self.model),
                hook_point=SUBJECT.hook,
                dataset_path=str(self.model / "text" / "train.parquet"),
                context_size=CONTEXT,
                expansion_factor=EXPANSION,
                recipe="sae_lens",
                lr=self.arguments.lr,
                seed=seed,
                training_tokens=self.steps * BATCH,
                train_batch_size=BATCH,
                store_batch_size=SETTINGS["store_batch_size"],
                dead_feature_window=self.dead_feature_window,
                eval_windows=8,
                log_to_wandb=False,
                device="cpu",
                **fields,
            )
        )

    def activations(self, seed: int) -> Path:
        """[tokens, d_in] in a seed's order, of the documents that come first in it."""
        file = self.arguments.output / f"activations {self.steps * BATCH} seed {seed}.npy"
        if not file.exists():
            config = self.config(seed)
            text, model = (
                TokenWindows(config, load_tokenizer(config)),
                LanguageModel(config, [SUBJECT.hook]),
            )
            n, at_once = -(-self.steps * BATCH // CONTEXT), SETTINGS["store_batch_size"]
            parts = []
            for first in range(0, n, at_once):
                windows = torch.from_numpy(text.train(first, min(at_once, n - first)).copy())
                rows = model.activations(windows)[SUBJECT.hook]
                parts.append(rows.reshape(-1, SUBJECT.d_in).float().numpy())
            found = np.concatenate(parts)
            order = np.random.default_rng(seed).permutation(len(found))[: self.steps * BATCH]
            np.save(file, found[order])
        return file

    def folder(self, system: str, architecture: str, value: float, seed: int) -> Path:
        return self.arguments.output / f"{system} seed {seed}" / f"{architecture} {value:g}"

    def train_ours(self, architecture: str, seed: int) -> None:
        """All of an architecture's sparsities, in one pack."""
        kind = KINDS[architecture]
        configs, trainers, folders = [], [], []
        for value in kind.values:
            folder = self.folder("saeray", architecture, value, seed)
            if (folder / "cfg.json").exists():
                continue
            config = self.config(seed, architecture=architecture, **{kind.knob: value}, **kind.ours)
            configs.append(config)
            trainers.append(fresh_trainer(config, SUBJECT.d_in))
            folders.append(folder)
        if not trainers:
            return
        x, step = np.load(self.activations(seed), mmap_mode="r"), PackStep(threads=1)
        for i in range(self.steps):
            step.step(trainers, torch.from_numpy(x[i * BATCH : (i + 1) * BATCH].copy()))
        for folder, config, trainer in zip(folders, configs, trainers, strict=True):
            save_final(Folder.at(folder), config, trainer)

    def train_theirs(self, architecture: str, seed: int) -> None:
        kind, start = KINDS[architecture], self.arguments.output / f"start {seed}.safetensors"
        sae = fresh_trainer(self.config(seed, architecture="standard"), SUBJECT.d_in).sae
        save_file({n: getattr(sae, n).clone().contiguous() for n in ("W_enc", "W_dec")}, start)
        settings = {
            "activations": str(self.activations(seed)),
            "start": None if self.arguments.own_start else str(start),
            "seed": seed,
            "steps": self.steps,
            "batch": BATCH,
            "d_sae": D_SAE,
            "lr": self.arguments.lr,
            "dead_feature_window": self.dead_feature_window,
            "saes": [
                {
                    "folder": str(self.folder("sae_lens", architecture, value, seed)),
                    "architecture": architecture,
                    "fields": {kind.knob: value, **kind.theirs},
                }
                for value in kind.values
            ],
        }
        script = str(ROOT / "benchmarks" / "peer_architectures.py")
        command = [str(environment("sae_lens")), script, json.dumps(settings)]
        run(command, self.arguments.output / "log.txt", os.environ | {"OMP_NUM_THREADS": "1"})

    def saes(self, architecture: str) -> list[Sae]:
        """Both systems' SAEs of all seeds; trains those that are not there."""
        found = []
        for seed in self.arguments.seeds:
            for system, train in (("saeray", self.train_ours), ("sae_lens", self.train_theirs)):
                print(f"{architecture}, seed {seed}, {system} …", flush=True)
                train(architecture, seed)
                for value in KINDS[architecture].values:
                    folder = self.folder(system, architecture, value, seed)
                    found.append(Sae(system, seed, self.arguments.lr, value, folder))
        return found


def table(by_architecture: dict[str, list[quality_report.Row]]) -> str:
    """A line for each architecture and sparsity: means over seeds, and FVU at equal L0."""
    lines = ["| | | L0 | FVU | CE score | never fired | FVU at equal L0, ours over theirs |"]
    lines.append("|---|---|---|---|---|---|---|")
    for architecture, rows in by_architecture.items():
        kind = KINDS[architecture]
        for value in kind.values:
            pair = [
                [r for r in rows if r["system"] == s and r["l1"] == value]
                for s in ("saeray", "sae_lens")
            ]
            ratios = []
            for mine in pair[0]:
                line = [r for r in rows if r["system"] == "sae_lens" and r["seed"] == mine["seed"]]
                ratios.append(mine["fvu"] / at_equal_l0(mine["l0"], line))
            figures = [
                " / ".join(f"{statistics.mean(r[key] for r in of):.{digits}f}" for of in pair)
                for key, digits in (("l0", 1), ("fvu", 4), ("ce", 4), ("never", 0))
            ]
            shown = " , ".join(f"{r:.3f}" for r in ratios)
            lines.append(
                f"| {architecture} | {kind.knob} {value:g} | {' | '.join(figures)} | "
                f"**{statistics.mean(ratios):.3f}** ({shown}) |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="SAEs are kept there")
    parser.add_argument("--architectures", nargs="+", choices=KINDS, default=DEFAULT)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--own-start", action="store_true", help="sae_lens draws its own weights")
    arguments = parser.parse_args()
    arguments.output = arguments.output.resolve()
    arguments.output.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(arguments)
    found = {}
    for architecture in arguments.architectures:
        saes = benchmark.saes(architecture)
        found[architecture] = quality_report.judged(saes, benchmark.model, SUBJECT.hook)
        print(table({architecture: found[architecture]}), flush=True)
    text = table(found)
    (arguments.output / "architectures.md").write_text(text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    main()
