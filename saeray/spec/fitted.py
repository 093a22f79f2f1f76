"""What placement comes to: `resources:` with every "auto" decided, and what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from saeray.spec.room import Need, need


@dataclass(frozen=True)
class Fitted:
    """`resources:` with every "auto" decided."""

    harvesters: int
    harvester_cpus: float
    harvester_gpus: float
    saes_per_trainer: int
    num_workers: int
    trainer_cpus: float
    trainer_gpus: float
    threads: int
    why: str
    packs: int = 0  # that run at the same time
    all_packs: int = 0  # at the same time or one after the other
    most_packs: int = 0  # at the same time, by memory; 0: as many as there is room for
    one_pass_by: str = ""  # what would let all of them run at the same time
    share_cores: bool = False  # or a GPU: then a pack that waits gives way to the others
    harvester_resources: Mapping[str, float] = field(default_factory=dict)
    harvester_labels: Mapping[str, str] = field(default_factory=dict)
    trainer_resources: Mapping[str, float] = field(default_factory=dict)
    trainer_labels: Mapping[str, str] = field(default_factory=dict)
    waits_for: str = ""  # what must come first, in words: nodes to be started, other work's end
    harvester_nodes: tuple[str, ...] = ()  # ids of nodes that are there, one a harvester

    @property
    def harvester(self) -> Need:
        return need(
            self.harvester_cpus,
            self.harvester_gpus,
            self.harvester_resources,
            self.harvester_labels,
        )

    @property
    def trainer(self) -> Need:
        return need(
            self.trainer_cpus, self.trainer_gpus, self.trainer_resources, self.trainer_labels
        )

    @property
    def passes(self) -> int:
        """Over the text: packs that do not run at the same time each read it anew."""
        return -(-self.all_packs // self.packs) if self.packs else 1

    def passes_said(self, cached: bool) -> str:
        """How many passes there will be where it is not one, and what would make it one.

        cached: an activation cache is there, from which all but the first are read.
        """
        if self.passes == 1:
            return ""
        limit = ", as memory allows" if self.most_packs else ""
        text = f"{self.passes} passes over the text ({self.all_packs} packs, {self.packs} at a time"
        text += f"{limit})"
        if self.one_pass_by:
            text += f"; one by {self.one_pass_by}"
        elif self.most_packs:
            text += "; one by more memory, or by fewer packs (a larger resources.saes_per_trainer, "
            text += "fewer values of train_batch_size)"
        if cached:
            return f"{text}; all but the first from activation_cache"
        return f"{text}; activation_cache: DIR keeps what the first one harvests for the others"

    def as_data(self) -> dict[str, Any]:
        """For sweep.yaml: without what is of this moment only."""
        gone = ("waits_for", "harvester_nodes")
        return {name: value for name, value in vars(self).items() if name not in gone}

    def __str__(self) -> str:
        harvesters = f"{self.harvesters} harvester{'s' * (self.harvesters != 1)} ({self.harvester})"
        if not self.harvesters:
            harvesters = "a stream that runs already"
        ranks = f"{self.num_workers} ranks of " if self.num_workers > 1 else ""
        return (
            f"{harvesters}, packs of up to "
            f"{self.saes_per_trainer} SAEs ({ranks}{self.trainer}; "
            f"{self.threads} threads): {self.why}"
        )
