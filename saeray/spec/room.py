"""Room: what processes need, what nodes there are, and what is left once the needs are placed.

Plain data. Each role is one `Need`; needs are placed on nodes one by one, so that what is
promised fits node by node and not only in the sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

EPSILON = 1e-6
HEAD = "node:__internal_head__"  # the resource by which Ray knows its head node


class Need(NamedTuple):
    """What one process asks of the node it runs on."""

    resources: Mapping[str, float]  # CPU, GPU and custom ones; zeros left out
    labels: Mapping[str, str]

    def __str__(self) -> str:
        parts = [f"{n:g} {resource_words(name)}" for name, n in self.resources.items()]
        parts += [f"label {key}={value}" for key, value in self.labels.items()]
        return ", ".join(parts) or "nothing"


def resource_words(name: str) -> str:
    return {"CPU": "CPUs", "GPU": "GPUs"}.get(name, name)


def need(cpus: float, gpus: float, custom: Mapping[str, float], labels: Mapping[str, str]) -> Need:
    """What is asked for in amounts, zeros left out."""
    resources = {"CPU": cpus, "GPU": gpus, **custom}
    return Need({name: n for name, n in resources.items() if n}, labels)


class Node(NamedTuple):
    """A node of the cluster, or (`planned`) one that the autoscaler could start."""

    name: str
    resources: Mapping[str, float]
    store_bytes: int = 0
    labels: Mapping[str, str] = {}
    planned: bool = False
    id: str = ""  # Ray's, of one that is there

    @property
    def cpus(self) -> float:
        return self.resources.get("CPU", 0.0)

    @property
    def gpus(self) -> float:
        return self.resources.get("GPU", 0.0)

    @property
    def is_head(self) -> bool:
        return HEAD in self.resources

    def __str__(self) -> str:
        return f"{self.name}: {Need(shown(self.resources), self.labels)}"


def shown(resources: Mapping[str, float]) -> dict[str, float]:
    """What a user has a say in: not the addresses and memory that Ray lists too."""
    hidden = ("node:", "accelerator_type:", "memory", "object_store_memory")
    return {name: n for name, n in resources.items() if n and not name.startswith(hidden)}


@dataclass(frozen=True)
class Cluster:
    """The nodes there are, and those an autoscaler could add."""

    nodes: tuple[Node, ...]
    planned: tuple[Node, ...] = ()

    @classmethod
    def one_machine(
        cls, cpus: float, gpus: float = 0.0, store_bytes: int = 0, memory: float = 0.0
    ) -> Cluster:
        """memory: in bytes, as Ray counts it; 0: not known."""
        resources = {"CPU": cpus, "GPU": gpus, "memory": memory, HEAD: 1.0}
        return cls((Node("this machine", resources, store_bytes, id="this machine"),))

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    def __str__(self) -> str:
        total: Counter[str] = Counter()
        for node in self.nodes:
            total.update(shown(node.resources))
        text = f"{Need(total, {})} ({'; '.join(map(str, self.nodes))})"
        if self.planned:
            kinds = Counter(f"{Need(shown(n.resources), n.labels)}" for n in self.planned)
            more = "; ".join(f"{n} x ({kind})" for kind, n in kinds.items())
            text += f"; the autoscaler can add {more}"
        return text


def label_fits(value: str | None, wanted: str) -> bool:
    """Whether a label is what one of Ray's selectors wants: `a`, `!a`, `in(a, b)`, `!in(a, b)`."""
    condition = wanted.removeprefix("!")
    among = condition[3:-1].split(",") if condition.startswith("in(") else [condition]
    return (value in {text.strip() for text in among}) != wanted.startswith("!")


class Room:
    """What is still free on each node while needs are placed one by one."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = list(nodes)
        self.free = [dict(node.resources) for node in nodes]

    def holds(self, at: int, need: Need) -> bool:
        labels = self.nodes[at].labels
        return all(label_fits(labels.get(k), v) for k, v in need.labels.items()) and all(
            self.free[at].get(name, 0.0) + EPSILON >= n for name, n in need.resources.items()
        )

    def place(self, need: Need) -> Node | None:
        """Takes the need from the node it fits most tightly; None where none has room.

        Nodes that are there come before planned ones, and nodes without GPUs before others.
        """
        places = [at for at in range(len(self.nodes)) if self.holds(at, need)]
        if not places:
            return None
        at = min(
            places,
            key=lambda i: (
                self.nodes[i].planned,
                self.free[i].get("GPU", 0.0),
                self.free[i].get("CPU", 0.0),
            ),
        )
        for name, n in need.resources.items():
            self.free[at][name] -= n
        return self.nodes[at]

    def place_all(self, need: Need, n: int) -> list[Node] | None:
        placed = []
        for _ in range(n):
            node = self.place(need)
            if node is None:
                return None
            placed.append(node)
        return placed

    def take(self, node_id: str, need: Need) -> None:
        """Takes the need from one node, as far as it is there."""
        for at, node in enumerate(self.nodes):
            if node.id == node_id:
                for name, n in need.resources.items():
                    self.free[at][name] = max(0.0, self.free[at].get(name, 0.0) - n)

    def left(self) -> Cluster:
        """The nodes with what is still free of them."""
        nodes = [n._replace(resources=dict(f)) for n, f in zip(self.nodes, self.free, strict=True)]
        return Cluster(
            tuple(n for n in nodes if not n.planned), tuple(n for n in nodes if n.planned)
        )

    def n_nodes(self, need: Need) -> int:
        """How many nodes have room for at least one of this need."""
        return sum(self.holds(at, need) for at in range(len(self.nodes)))

    def how_many(self, need: Need, at_most: int) -> int:
        """How many of this need there is room for; nothing is taken."""
        trial = Room(self.nodes)
        trial.free = [dict(f) for f in self.free]
        n = 0
        while n < at_most and trial.place(need) is not None:
            n += 1
        return n
