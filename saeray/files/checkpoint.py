"""Checkpoints: safetensors and JSON, loadable by sae_lens as they are, no pickle.

    cfg.json  sae_weights.safetensors  sparsity.safetensors      what sae_lens reads
    train_state.safetensors  train_state.json                    what training goes on from

`train_state.json` is written last and holds a checksum of every other file, so a checkpoint that
was cut off or damaged is noticed and an older one is used.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from saeray.files import strict_json
from saeray.files.sae_cfg import (
    SAECfg,
    as_loaded,
    in_the_form_of_now,
    weights_of_now,
    without_rescaling,
)
from saeray.files.storage import Folder
from saeray.sae.architectures import ARCHITECTURES, published_sae
from saeray.sae.architectures.base import SAE, kind_of
from saeray.sae.metrics import log10_frequency
from saeray.sae.options import TrainingOptions
from saeray.sae.trainer import SAETrainer, final_form
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import SpecialTokens
from saeray.spec.stream import positions
from saeray.version import __version__

# The newest sae_lens this format was checked with. Below 6 sae_lens drops `metadata` in silence.
SAE_LENS_VERSION = "6.54.12"
STATE_MARKER = "train_state.json"


def reshaping(hook_point: str) -> str:
    """What sae_lens has to do to an activation of the hook point before the SAE takes it.

    It joins the heads of `hook_z` alone: anything else with heads (hook_q, hook_k, hook_v) has no
    counterpart there, and is given to the SAE as [..., heads * d_head].
    """
    return "hook_z" if hook_point.endswith("hook_z") else "none"


def served_rows(
    config: LanguageModelSAERunnerConfig, special: SpecialTokens | None
) -> dict[str, Any]:
    """Which rows the SAE was trained on, as sae_lens says it: slices there end before their end."""
    excluded: bool | list[int] = bool(config.exclude_special_tokens)
    if isinstance(config.exclude_special_tokens, tuple) and special is not None:
        excluded = list(special.excluded)
    at = positions(config)
    sliced = config.context_slice is not None
    return {
        "seqpos_slice": [at.start, at.stop] if sliced else [None],
        "exclude_special_tokens": excluded,
    }


def sae_lens_cfg(
    config: LanguageModelSAERunnerConfig, sae: SAE, special: SpecialTokens | None
) -> dict[str, Any]:
    """cfg.json as `sae_lens.SAE.load_from_disk` wants it. special: tokens of its text."""
    read, *written = config.hooks_read
    return {
        **kind_of(sae),
        **sae.SAE_LENS_CFG,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": not sae.is_transcoder,
        "normalize_activations": "none",
        # Of a transcoder's input sae_lens joins no heads.
        "reshape_activations": "none" if sae.is_transcoder else reshaping(read),
        **({"d_out": sae.d_out} if sae.is_transcoder else {}),
        "metadata": {
            "sae_lens_version": SAE_LENS_VERSION,
            "saeray_version": __version__,
            "model_name": config.model_name,
            "hook_name": read,
            **({"hook_name_out": written[0]} if written else {}),
            "hook_head_index": None,
            "context_size": config.context_size,
            "prepend_bos": config.prepend_bos,
            "bos_token": None if special is None else special.bos,
            "bos_token_id": None if special is None else special.bos_id,
            **served_rows(config, special),
            "dataset_path": config.dataset_path,
            "training_config": config.to_dict(),
        },
    }


def sae_files(
    config: LanguageModelSAERunnerConfig, sae: SAE, frequency: Tensor, special: SpecialTokens | None
) -> dict[str, bytes]:
    """The files that sae_lens loads; frequency [L] is the features' firing frequency."""
    weights = {n: t.detach().cpu().contiguous() for n, t in sae.sae_lens_tensors().items()}
    return {
        "cfg.json": json_bytes(sae_lens_cfg(config, sae, special)),
        "sae_weights.safetensors": save(weights),
        "sparsity.safetensors": save({"sparsity": log10_frequency(frequency).cpu()}),
    }


def save_final(
    folder: Folder,
    config: LanguageModelSAERunnerConfig,
    trainer: SAETrainer | Taken,
    special: SpecialTokens | None = None,
) -> None:
    """Publishes a trained SAE (`SAETrainer.final`)."""
    folder.publish(sae_files(config, trainer.final, trainer.firing_frequency, special))


class Taken(NamedTuple):
    """An SAE in training as it was at one step: a copy, so that its training may go on."""

    step: int
    published: SAE
    firing_frequency: Tensor  # [L]
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    unit: bool  # the rows of its decoder

    @property
    def final(self) -> SAE:
        """What `final/` holds."""
        return final_form(self.published, self.unit)


def taken(trainer: SAETrainer, in_place: bool = False) -> Taken:
    """All that a checkpoint of it is written from, in main memory, or (in_place) where it is."""

    def copy(t: Tensor) -> Tensor:
        return t.detach().clone() if in_place else t.detach().to("cpu", copy=True)

    tensors, numbers = trainer.state()
    published = trainer.published
    if published is not trainer.sae:  # what is folded for users; training needs what is not
        tensors |= {f"sae.{name}": t for name, t in trainer.sae.tensors.items()}
    return Taken(
        trainer.step,
        published.with_tensors({name: copy(t) for name, t in published.tensors.items()}),
        copy(trainer.firing_frequency),
        {name: copy(t) for name, t in tensors.items()},
        numbers,
        trainer.unit,
    )


def save_checkpoint(
    folder: Folder,
    config: LanguageModelSAERunnerConfig,
    trainer: SAETrainer | Taken,
    special: SpecialTokens | None = None,
) -> None:
    """Publishes an SAE in training, with everything it takes to continue bit for bit."""
    state = trainer if isinstance(trainer, Taken) else taken(trainer)
    files = sae_files(config, state.published, state.firing_frequency, special)
    files["train_state.safetensors"] = save({n: t.contiguous() for n, t in state.tensors.items()})
    files[STATE_MARKER] = json_bytes(
        {
            **state.numbers,
            "n_training_tokens": state.step * config.train_batch_size,
            "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        }
    )
    folder.publish(files)


@dataclass
class Checkpoint:
    """A valid checkpoint, read."""

    cfg: dict[str, Any]
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]

    def trainer(self, options: TrainingOptions, device: torch.device) -> SAETrainer:
        kind = ARCHITECTURES[options.architecture].sae
        own = {n[4:]: t for n, t in self.tensors.items() if n.startswith("sae.")}
        settings = {n: getattr(options, n) for n in kind.SETTINGS}
        sae = kind(**own, **settings) if own else published_sae(self.cfg, self.weights)
        sae = sae.with_tensors({n: t.to(device) for n, t in sae.tensors.items()})
        return SAETrainer.resumed(sae, options, self.tensors, self.numbers)


class Damaged(Exception):
    """A checkpoint that can't be used, with the reason."""


def load_checkpoint(folder: Folder) -> Checkpoint:
    """Reads a checkpoint after comparing every file with its checksum.

    Raises:
        Damaged: a file is missing, cut off or changed.
    """
    try:
        numbers = strict_json.loads(folder.read(STATE_MARKER))
        files = {name: folder.read(name) for name in numbers["sha256"]}
    except (OSError, ValueError, KeyError) as error:
        raise Damaged(f"{folder.uri}: {error}") from None
    for name, wanted in numbers["sha256"].items():
        if hashlib.sha256(files[name]).hexdigest() != wanted:
            raise Damaged(f"{folder.uri}/{name} does not have the checksum it was written with")
    return Checkpoint(
        strict_json.loads(files["cfg.json"]),
        load(files["sae_weights.safetensors"]),
        load(files["train_state.safetensors"]),
        numbers,
    )


def newest_checkpoint(folder: Folder) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint below `folder`, and why newer ones were passed over."""
    passed_over: list[str] = []
    for tokens in folder.numbers():
        try:
            return load_checkpoint(folder / str(tokens)), passed_over
        except Damaged as damage:
            passed_over.append(str(damage))
    return None, passed_over


def delete_others(folder: Folder, keep: set[int]) -> None:
    """Deletes the checkpoints below `folder` but those at `keep` tokens."""
    for tokens in {*folder.numbers()} - keep:
        (folder / str(tokens)).delete()
    if folder.exists() and not folder.names():
        folder.delete()


def load_sae(folder: Folder | str) -> SAE:
    """Loads a published SAE (`…/final`, or a checkpoint), sae_lens's too, with its `cfg`.

    Raises:
        FileNotFoundError: there is none. ConfigError: one that computes what none of ours does.
    """
    folder = folder if isinstance(folder, Folder) else Folder.at(folder)
    cfg = in_the_form_of_now(strict_json.loads(folder.read("cfg.json")))
    weights = weights_of_now(cfg, load(folder.read("sae_weights.safetensors")))
    sae = without_rescaling(cfg, published_sae(cfg, weights))
    known = "sparsity.safetensors" in folder.names()
    sparsity = load(folder.read("sparsity.safetensors"))["sparsity"] if known else None
    sae.cfg = SAECfg(as_loaded(cfg) | sae.SAE_LENS_CFG, folder.uri, sparsity)
    return sae


def json_bytes(data: object) -> bytes:
    return (strict_json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
