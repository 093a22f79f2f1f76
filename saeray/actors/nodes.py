"""What nodes the cluster has, which ones its autoscaler could add, and where this process is."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import ray
import yaml

from saeray.actors.environment import in_own_ray
from saeray.spec.messages import NAMESPACE
from saeray.spec.room import HEAD, Cluster, Node

logger = logging.getLogger(__name__)

HEAD_SHARE = 0.0001  # of HEAD, per process that must be there: the least Ray takes, so 10,000 fit


def namespace() -> str:
    """Where the actors of this process's sweeps have their names: the user's own Ray namespace.

    One that Ray made up is of no use: nobody else could find the sweep there.
    """
    own = ray.get_runtime_context().namespace
    return NAMESPACE if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", own) else own


def over_client() -> bool:
    """Whether this process is outside the cluster, connected by `ray://`."""
    return bool(ray.util.client.ray.is_connected())


def has_head() -> bool:
    return HEAD in ray.cluster_resources()


def on_head() -> dict[str, Any]:
    """Options that place a task or an actor on the head node.

    (A soft affinity to it is not always kept.)
    """
    return {"resources": {HEAD: HEAD_SHARE}} if has_head() else {}


def own_node() -> str:
    """The id of the node that this process runs on."""
    return str(ray.get_runtime_context().get_node_id())


def is_head() -> bool:
    """Whether this process runs on the head node."""
    if over_client():
        return False
    here = own_node()
    return any(n["NodeID"] == here and HEAD in n["Resources"] for n in ray.nodes())


def leaving_nodes() -> set[str]:
    """The ids of nodes that are about to be taken away: preempted, or drained by an autoscaler.

    What runs there goes on until it is; nothing new is started there. None while the GCS can't be
    asked: those who look do so every second, and shall go on looking.
    """
    if in_own_ray() or over_client():
        return set()  # there is but one; whoever places anything runs in the cluster
    from ray._private.state import state

    try:
        return set(state.get_draining_nodes())
    except Exception:  # of many types, all of them for a GCS that does not answer
        logger.warning("can't ask which nodes are about to be taken away", exc_info=True)
        return set()


def cluster_now(taken: Mapping[str, Mapping[str, float]] | None = None) -> Cluster:
    """The nodes there are at this moment and those the autoscaler could add.

    Without those that are about to be taken away.

    taken: what others hold of each node, by its id; it is left out.
    """
    leaving = leaving_nodes()
    alive = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving]
    hosts = Counter(n["NodeManagerAddress"] for n in alive)
    nodes = []
    for n in alive:
        address = n["NodeManagerAddress"]
        held = (taken or {}).get(n["NodeID"], {})
        nodes.append(
            Node(
                name=address if hosts[address] == 1 else f"{address}/{n['NodeID'][:6]}",
                resources={
                    name: max(0.0, amount - held.get(name, 0.0))
                    for name, amount in n["Resources"].items()
                },
                store_bytes=int(n["Resources"].get("object_store_memory", 0)),
                labels=n.get("Labels") or {},
                id=n["NodeID"],
            )
        )
    return Cluster(tuple(nodes), planned_nodes(nodes))


def held_by_others() -> dict[str, dict[str, float]]:
    """What is in use of each node of which anything is, by its id.

    For a sweep that holds nothing itself yet.
    """
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    held: dict[str, dict[str, float]] = {}
    for n in ray.nodes():
        if n["Alive"] and n["NodeID"] in free:
            used = {
                name: amount - free[n["NodeID"]].get(name, 0.0)
                for name, amount in n["Resources"].items()
                if not name.startswith(("node:", "memory", "object_store_memory"))
            }
            used = {name: amount for name, amount in used.items() if amount > 1e-6}
            if used:
                held[n["NodeID"]] = used
    return held


def planned_nodes(nodes: list[Node]) -> tuple[Node, ...]:
    """What the cluster's autoscaler could still start; none where there is no autoscaler.

    Known from the autoscaler's own config file, which lies on the head node: only there.
    """
    config = autoscaling_config(ray.get_runtime_context().gcs_address)
    if config is None:
        return ()
    head_type = config.get("head_node_type")
    left = config.get("max_workers", 0) - max(0, len(nodes) - 1)
    planned = []
    for name, kind in (config.get("available_node_types") or {}).items():
        resources = {k: float(v) for k, v in (kind.get("resources") or {}).items()}
        if name == head_type or not resources:
            continue
        shape = Counter({k: v for k, v in resources.items() if k not in ("memory",)})
        there = sum(
            HEAD not in n.resources
            and all(abs(n.resources.get(k, 0.0) - v) < 1e-6 for k, v in shape.items())
            for n in nodes
        )
        labels = {str(k): str(v) for k, v in (kind.get("labels") or {}).items()}
        n_more = kind.get("max_workers", config.get("max_workers", 0)) - there
        planned += [Node(name, resources, 0, labels, planned=True) for _ in range(max(0, n_more))]
    return tuple(planned) if left > 0 else ()


@lru_cache(maxsize=4)
def autoscaling_config(gcs_address: str) -> dict[str, Any] | None:
    """The config of this cluster's autoscaler, from the command line of its process here."""
    import psutil  # Ray brings it

    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if not any(w.endswith("monitor.py") for w in words):
            continue
        options = dict(w.split("=", 1) for w in words if w.startswith("--") and "=" in w)
        path = options.get("--autoscaling-config")
        if path and options.get("--gcs-address") == gcs_address:
            try:
                config = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
            except (OSError, yaml.YAMLError):
                return None
            return config if isinstance(config, dict) else None
    return None
