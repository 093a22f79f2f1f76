"""Placement: how many harvesters and trainers, how much of which nodes each takes, and why.

Plain data: nothing here knows of Ray; the caller says which nodes there are, and which ones an
autoscaler could start (`room`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

from saeray.errors import ConfigError
from saeray.spec.checks import AUTO
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.fitted import Fitted
from saeray.spec.resources import Resources
from saeray.spec.room import EPSILON, Cluster, Need, Node, Room

LEAST_CPUS = 0.1  # of a trainer: below it Ray's accounting means nothing any more
LEAST_SHARE = 0.01  # of one of many that share cores: they are counted, by memory, long before
# Of an object store, buffers may take this share: Ray begins to spill to disk at 0.8
# (object_spilling_threshold), and snapshots of weights need some as well.
STORE_SHARE = 0.75
ONE_PASS_BY = ("trainer_cpus", "trainer_gpus", "saes_per_trainer")  # left to "auto"
GPUS_PER_HARVESTER = 8  # trainers that one harvester feeds, where nobody says otherwise


class Store(NamedTuple):
    """Object store for the blocks of one stream, in bytes."""

    total: int
    held: int = 0  # of it, by the buffers of other streams

    @property
    def usable(self) -> int:
        return max(0, int(self.total * STORE_SHARE) - self.held)


def store_of(
    cluster: Cluster, nodes: Sequence[str], held: Mapping[str, float] | None = None
) -> Store:
    """What there is for the blocks of harvesters on these nodes (ids, one a harvester).

    A block lies on the node of the harvester that made it, and each makes about as many as the
    others: a node with h of n harvesters must hold h/n of them.

    held: bytes of each node, by its id, that other streams may take.
    """
    stores = {node.id: node.store_bytes for node in cluster.nodes}
    shares = {i: len(nodes) / h for i, h in Counter(nodes).items() if i in stores}
    each = [Store(int(stores[i] * n), int((held or {}).get(i, 0) * n)) for i, n in shares.items()]
    return min(each, key=lambda store: store.usable)


def wants_gpu(config: LanguageModelSAERunnerConfig, cluster: Cluster) -> bool:
    """Whether the trainers go onto GPUs: as `device` says, or where "auto" finds some."""
    kind = config.device.split(":")[0]
    return kind == "cuda" or (kind == AUTO and cluster.gpus > 0)


def fit(
    resources: Resources,
    cluster: Cluster,
    saes: int | Sequence[int],
    use_gpu: bool,
    harvest: bool = True,
    most_packs: int = 0,
) -> Fitted:
    """Decides every "auto" from the nodes there are; asks for more only where nothing fits.

    On CPUs: one harvester, and a pack per node with a thread per core: the SAEs of a pack share
    each batch, and a second pack on the same cores would only read it twice. On GPUs: one pack per
    GPU that is left after the harvesters (which share one GPU with the trainers when there is only
    one). Where SAEs need more packs than that they get smaller shares, so that all run at the same
    time. Without `harvest` the stream is there already, and only trainers need room.

    saes: how many; or how many of each kind, where only those of one kind may share a pack.
    most_packs: at the same time, where memory has room for no more.

    Raises:
        ConfigError: what is asked for fits neither the nodes there are nor those an autoscaler
            could add; with the numbers.
    """
    kinds = (saes,) if isinstance(saes, int) else tuple(saes)
    fitted = fit_as_asked(resources, cluster, kinds, use_gpu, harvest, most_packs)
    if fitted.passes == 1:
        return fitted
    given = [name for name in ONE_PASS_BY if getattr(resources, name) != AUTO]
    for names in (some for n in range(1, len(given) + 1) for some in combinations(given, n)):
        left_open: dict[str, Any] = dict.fromkeys(names, AUTO)
        freed = replace(resources, **left_open)
        try:
            other = fit_as_asked(freed, cluster, kinds, use_gpu, harvest, most_packs)
        except ConfigError:
            continue
        if other.passes == 1:
            by = ", ".join(f"resources.{name}: auto" for name in names)
            return replace(fitted, one_pass_by=by)
    return fitted


def fit_as_asked(
    resources: Resources,
    cluster: Cluster,
    kinds: Sequence[int],
    use_gpu: bool,
    harvest: bool,
    most_packs: int,
) -> Fitted:
    """`fit`, without a look at what else could be asked for."""

    def into(nodes: Sequence[Node]) -> Fitted:
        return fit_into(resources, nodes, kinds, use_gpu, harvest, most_packs, str(cluster))

    everything = (*cluster.nodes, *cluster.planned)
    if use_gpu and sum(node.gpus for node in everything) < EPSILON:
        raise ConfigError("device = 'cuda': the cluster has no GPU; use device: cpu.")
    try:
        return into(cluster.nodes)
    except ConfigError:
        if not cluster.planned:
            raise
    # As few more nodes as will do: they cost money.
    nodes = list(cluster.nodes)
    for more in range(1, len(cluster.planned) + 1):
        nodes = [*cluster.nodes, *interleaved(cluster.planned)[:more]]
        try:
            fitted = into(nodes)
        except ConfigError:
            continue
        return with_waiting(fitted, cluster, sum(kinds))
    return into(everything)


def interleaved(planned: Sequence[Node]) -> list[Node]:
    """One node of each kind, then a second one of each: any mix is reached early."""
    seen: Counter[str] = Counter()
    turn = {}
    for i, node in enumerate(planned):
        turn[i] = seen[node.name]
        seen[node.name] += 1
    return [planned[i] for i in sorted(turn, key=lambda i: (turn[i], i))]


def with_waiting(fitted: Fitted, cluster: Cluster, n_saes: int) -> Fitted:
    """Notes which planned nodes a fitted sweep will use."""
    room = Room((*cluster.nodes, *cluster.planned))
    n_ranks = fitted.all_packs * fitted.num_workers
    used = room.place_all(fitted.harvester, fitted.harvesters) or []
    used += [node for node in (room.place(fitted.trainer) for _ in range(n_ranks)) if node]
    kinds: dict[str, set[int]] = {}
    for node in used:
        if node.planned:
            kinds.setdefault(node.name, set()).add(id(node))
    text = ", ".join(f"{len(ids)} x {kind}" for kind, ids in kinds.items())
    values = {**vars(fitted), "waits_for": text}
    if fitted.saes_per_trainer >= n_saes > 1:
        values["why"] += "; saes_per_trainer: N would ask the autoscaler for more"
    return Fitted(**values)


def fit_into(
    resources: Resources,
    nodes: Sequence[Node],
    kinds: Sequence[int],
    use_gpu: bool,
    harvest: bool,
    most_packs: int,
    cluster: str,
) -> Fitted:
    """`fit` into exactly these nodes."""
    n_saes = sum(kinds)
    gpus = sum(node.gpus for node in nodes)
    values = amounts(resources, gpus, n_saes, use_gpu, harvest)
    room = Room(nodes)
    harvester = Fitted(**values).harvester
    places = room.place_all(harvester, values["harvesters"])
    placed = places is not None
    values["harvester_nodes"] = tuple(n.id for n in places or () if n.id)
    auto, ranks = resources.saes_per_trainer == AUTO, resources.num_workers
    possible = n_saes if auto else packs_of(kinds, int(resources.saes_per_trainer))
    at_once = min(possible, most_packs or possible)
    # So many at the same time are one pass, if they fit.
    wanted = min(len(kinds) if auto else possible, at_once)
    if placed:
        values |= shares(resources, room, Fitted(**values), n_saes, wanted, use_gpu)
    fitted = Fitted(**values)
    slots = room.how_many(fitted.trainer, at_once * ranks) if placed else 0
    if slots < ranks:
        raise does_not_fit(fitted, cluster)
    packs = min(at_once, slots // ranks)
    one_each = room.n_nodes(fitted.trainer)
    if auto:
        if not use_gpu:  # a second pack on the same cores would only read the stream twice
            packs = min(packs, max(one_each, wanted))
        values["saes_per_trainer"] = most_per_pack(kinds, packs)
        values["all_packs"] = packs_of(kinds, values["saes_per_trainer"])
        packs = min(packs, values["all_packs"])
        where = "GPU beside the harvesters" if use_gpu else "node, on all its cores"
        values["why"] = f"{packs} packs, one per {where}"
        if values["all_packs"] == 1:
            values["why"] = "one pack of all SAEs fits best"
        elif len(kinds) > 1:
            values["why"] = f"{values['all_packs']} packs, each of one train_batch_size"
    else:
        values["saes_per_trainer"] = int(resources.saes_per_trainer)
        values["why"], values["all_packs"] = "saes_per_trainer as given", possible
    values["packs"], values["most_packs"] = packs, most_packs
    values["share_cores"] = fitted.trainer_gpus <= 0.5 if use_gpu else packs * ranks > one_each
    values["threads"] = (
        max(1, int(values["trainer_cpus"]))
        if use_gpu or resources.trainer_cpus != AUTO
        else threads_of(room, fitted, packs * ranks)
    )
    return Fitted(**values)


def packs_of(kinds: Sequence[int], per_pack: int) -> int:
    """How many packs of at most so many SAEs, where only those of one kind may share one."""
    return sum(-(-n // per_pack) for n in kinds)


def most_per_pack(kinds: Sequence[int], packs: int) -> int:
    """The smallest packs of which there are no more than `packs`, or than kinds."""
    sizes = range(1, max(kinds) + 1)
    return next(size for size in sizes if packs_of(kinds, size) <= max(packs, len(kinds)))


def shares(
    resources: Resources, room: Room, fitted: Fitted, n_saes: int, wanted: int, use_gpu: bool
) -> dict[str, float]:
    """What each rank takes where that is "auto", so that `wanted` packs run at the same time."""
    n_ranks = wanted * fitted.num_workers
    auto = resources.saes_per_trainer == AUTO
    if not use_gpu:
        if resources.trainer_cpus != AUTO:
            return {}
        cpus = (best_trainer_cpus(room, fitted, n_saes) or 1.0) if auto else 0.0
        alone = replace(fitted, trainer_cpus=cpus)
        if not auto or room.how_many(alone.trainer, n_ranks) < n_ranks:
            cpus = most_cpus(room, fitted, n_ranks)
        return {"trainer_cpus": cpus}
    if not auto:  # cut like this by someone who knows what fits onto a GPU
        return {}
    free = [n for n in ("trainer_gpus", "trainer_cpus") if getattr(resources, n) == AUTO]
    for part in range(1, wanted + 1):
        for names in (free[:1], free):
            smaller: dict[str, Any] = {
                name: hundredths(getattr(fitted, name) / part) for name in names
            }
            trainer = replace(fitted, **smaller).trainer
            if all(smaller.values()) and room.how_many(trainer, n_ranks) >= n_ranks:
                return smaller
    return {}


def amounts(
    resources: Resources, gpus: float, n_saes: int, use_gpu: bool, harvest: bool
) -> dict[str, Any]:
    """What `Fitted` has of each role, as given or by default; "auto" CPUs and packs come later."""
    alone = use_gpu and gpus <= 1
    values: dict[str, Any] = {
        "num_workers": resources.num_workers,
        "harvester_cpus": resources.harvester_cpus,
        "harvester_resources": resources.harvester_resources,
        "harvester_labels": resources.harvester_labels,
        "trainer_resources": resources.trainer_resources,
        "trainer_labels": resources.trainer_labels,
        "trainer_cpus": 1.0,
        "trainer_gpus": 0.0,
        "saes_per_trainer": n_saes,
        "threads": 1,
        "why": "",
    }
    if not harvest:
        values["harvesters"] = 0
    elif resources.harvesters != AUTO:
        values["harvesters"] = int(resources.harvesters)
    else:
        values["harvesters"] = max(1, int(gpus) // GPUS_PER_HARVESTER) if use_gpu else 1
    values["harvester_gpus"] = (
        (0.25 / max(1, values["harvesters"]) if alone else 1.0)
        if use_gpu and resources.harvester_gpus == AUTO
        else (0.0 if resources.harvester_gpus == AUTO else float(resources.harvester_gpus))
    )
    if use_gpu:
        values["trainer_gpus"] = 0.75 if alone else 1.0
    if resources.trainer_gpus != AUTO:
        values["trainer_gpus"] = float(resources.trainer_gpus)
    if resources.trainer_cpus != AUTO:
        values["trainer_cpus"] = float(resources.trainer_cpus)
    return values


def best_trainer_cpus(room: Room, fitted: Fitted, n_saes: int) -> float | None:
    """CPUs of each rank where packs are cut as the nodes are: the shortest time for all SAEs.

    The packs of a sweep are equally large and read one stream in step, so that with n of them the
    time goes as ceil(n_saes / n) / CPUs. All of them ask for the same, which is all that is free
    of the smallest node that takes part: Ray puts a pack onto the emptiest node it fits, and a
    pack that asked for less than another could take its only place. A node with room for two
    would get two, so smaller nodes than half the largest take no part.
    """
    others = Need({k: v for k, v in fitted.trainer.resources.items() if k != "CPU"}, {})
    others = others._replace(labels=fitted.trainer.labels)
    ranks = fitted.num_workers
    free = [
        room.free[at].get("CPU", 0.0) for at in range(len(room.nodes)) if room.holds(at, others)
    ]
    best: tuple[float, float] | None = None
    for cpus in {hundredths(f / k) for f in free for k in range(1, ranks + 1)}:
        if cpus < LEAST_CPUS or (ranks == 1 and max(free) + EPSILON >= 2 * cpus):
            continue
        each = Need({"CPU": cpus, **others.resources}, others.labels)
        packs = min(room.how_many(each, n_saes * ranks) // ranks, room.n_nodes(each), n_saes)
        if packs:
            time = -(-n_saes // packs) / (cpus * ranks)
            best = min(best or (time, -cpus), (time, -cpus))
    if best is None:
        return None
    # What is left of a core is room for a sweep that joins, where whole ones keep packs apart too.
    cpus, whole = -best[1], float(int(-best[1] + EPSILON))
    same_nodes = sum(f + EPSILON >= whole for f in free) == sum(f + EPSILON >= cpus for f in free)
    return whole if ranks == 1 and same_nodes and max(free) + EPSILON < 2 * whole else cpus


def most_cpus(room: Room, fitted: Fitted, n_ranks: int) -> float:
    """CPUs of each rank where the number of packs is given: as many as let all of them run."""
    others = {k: v for k, v in fitted.trainer.resources.items() if k != "CPU"}

    def slots(cpus: float) -> int:
        return room.how_many(Need({"CPU": cpus, **others}, fitted.trainer.labels), n_ranks)

    candidates = {
        hundredths(free.get("CPU", 0.0) / k) for free in room.free for k in range(1, n_ranks + 1)
    }
    enough = [c for c in candidates if c >= LEAST_SHARE and slots(c) >= n_ranks]
    return max(enough, default=LEAST_SHARE)


def hundredths(cpus: float) -> float:
    """Ray counts resources in ten-thousandths; hundredths are plenty, and can be read."""
    return int(cpus * 100 + EPSILON) / 100


def threads_of(room: Room, fitted: Fitted, n_ranks: int) -> int:
    """Threads of each rank: all cores of its node, shared with the other ranks there.

    Harvesters are not subtracted: they wait for the trainers as often as these wait for them.
    """
    trial = Room(room.nodes)
    trial.free = [dict(f) for f in room.free]
    ranks: Counter[int] = Counter()
    for _ in range(n_ranks):
        node = trial.place(fitted.trainer)
        if node is not None:
            ranks[trial.nodes.index(node)] += 1
    shares = [trial.nodes[at].cpus // n for at, n in ranks.items()]
    return max(1, int(min(shares, default=1)))


def does_not_fit(fitted: Fitted, cluster: str) -> ConfigError:
    harvesters = "harvesters" if fitted.harvesters != 1 else "harvester"
    trainers = "trainers" if fitted.num_workers != 1 else "trainer"
    return ConfigError(
        f"resources: {fitted.harvesters} {harvesters} of {fitted.harvester} and "
        f"{fitted.num_workers} {trainers} of {fitted.trainer} do not fit at the same time: the "
        f"cluster has {cluster}. Lower one of them, or add nodes."
    )
