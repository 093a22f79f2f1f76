"""One SAE of a pack: its training, where its files lie, and copies of it for others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from saeray.cluster.held import Held
from saeray.files.checkpoint import Taken, taken
from saeray.files.storage import Folder
from saeray.sae.architectures.base import SAE, kind_of
from saeray.sae.trainer import SAETrainer
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import Snapshot
from saeray.stream.arrays import to_array


@dataclass
class Member:
    """One SAE of the pack."""

    name: str
    config: LanguageModelSAERunnerConfig
    folder: Folder
    trainer: SAETrainer
    checkpoints: set[int]
    hooks: tuple[int, ...]  # what it reads: places among the stream's hook points
    held: Held | None = None  # of a bare tune.run

    @property
    def n_training_tokens(self) -> int:
        return self.trainer.step * self.config.train_batch_size

    @property
    def checkpoints_at(self) -> Folder:
        return self.folder / "checkpoints"

    @property
    def kept(self) -> set[int]:
        """Tokens at which `n_checkpoints` wants a checkpoint; any other is deleted in time."""
        return {step * self.config.train_batch_size for step in self.checkpoints}


def taken_of(m: Member) -> Taken:
    """A copy of it as it is now: the one that is there, or a new one."""
    if m.held is not None and m.held.state.step == m.trainer.step:
        return m.held.state
    return taken(m.trainer)


def snapshot_of(sae: SAE) -> Any:
    """A reference to a copy of the weights, for the harvesters to evaluate.

    The roster's hold on it keeps it alive, as long as this process, its owner, lives.
    """
    arrays = {n: to_array(t.detach()) for n, t in sae.sae_lens_tensors().items()}  # copies
    return ray.put(Snapshot(kind_of(sae), arrays))
