"""What the parts of a sweep say to each other: plain data, no Ray, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from saeray.spec.order import StreamOrder
from saeray.spec.synthetic import is_synthetic

PACK = "pack-"  # what the names of packs begin with
NAMESPACE = "saeray"  # Ray's, where actors have their names, unless the user names another

# The states an SAE goes through. The last four are ends.
WAITING, TRAINING, EVALUATING = "waiting", "training", "evaluating"
DONE, STOPPED, FAILED, INTERRUPTED = "done", "stopped", "failed", "interrupted"
ENDS = (DONE, STOPPED, FAILED, INTERRUPTED)
# `stopped` by its scheduler; `failed` by itself (NaN), so it would fail again; `interrupted` by
# anything else: those are what --resume goes on with.


class SpecialTokens(NamedTuple):
    """Of a stream's text."""

    bos_id: int | None  # of what begins every window; None: nothing does
    bos: str | None
    excluded: tuple[int, ...] = ()  # ids whose rows no SAE sees


class ModelFacts(NamedTuple):
    """What the rest of a sweep needs to know about the language model."""

    d_in: dict[str, int]  # per hook point
    d_vocab: int
    fast_path: bool
    device: str  # kind: cpu, cuda or mps
    parameter_bytes: int  # of the weights
    warnings: tuple[str, ...] = ()  # of what is accepted, and should be known
    computed: tuple[str, ...] = ()  # the hook points as a forward comes to them


class Snapshot(NamedTuple):
    """A published SAE, on its way to where it is evaluated."""

    cfg: dict[str, Any]  # what cfg.json says of its kind
    tensors: dict[str, Any]  # numpy arrays by sae_lens's names


# Figures, by their names in logs, that only an SAE's last evaluation has.
FINAL_METRICS = ("eval/s_n_dec", "eval/mdl")


class Report(NamedTuple):
    """One SAE at one optimizer step, from its pack."""

    name: str
    step: int
    n_training_tokens: int
    metrics: dict[str, Any]  # by wandb key
    snapshot: Any = None  # [ObjectRef of a Snapshot] where an evaluation is wanted
    state: str = TRAINING  # or an end
    error: str | None = None  # of a failed one
    path: str | None = None  # of a finished one: its folder


class Result(NamedTuple):
    """What a trial hands to Tune: the newest metrics of its SAE, and whether they are the last."""

    number: int  # counts up; a trial asks for what is newer than what it has
    n_training_tokens: int
    step: int
    metrics: dict[str, Any]
    state: str
    error: str | None
    path: str | None
    checkpoint: str | None  # newest checkpoint's folder


@dataclass(frozen=True)
class PackPlan:
    """Everything a pack's workers are told."""

    pack: str
    configs: dict[str, dict[str, Any]]  # by SAE
    folder: str  # of the sweep
    hook_points: list[str]  # of the stream, in the order of a block's references
    widths: dict[str, int]  # d_in at each of them
    order: StreamOrder
    buffer: Any  # actor handle
    threads: int
    marker: str = ""  # tells the disk of `folder` from others (`head_folder`)
    special: SpecialTokens | None = None


def reader_name(pack: str, rank: int) -> str:
    """As the buffer knows a rank of a pack."""
    return f"{pack}/{rank}" if rank else pack


def pack_name(number: int, incarnation: str) -> str:
    """Of a pack that a roster launches; no other incarnation of it uses the name again."""
    return f"{PACK}{number:03d}-{incarnation[:8]}"


def is_packs(reader: str) -> bool:
    """Whether a reader of a buffer is a pack's."""
    return reader.startswith(PACK)


NOTHING = PackPlan("", {}, "", [], {}, StreamOrder(0, 0, 0, 0), None, 0)  # for a pack not wanted


class Answer(NamedTuple):
    """What a roster says to a pack's reports."""

    incarnation: str  # of the roster; a new one may not have what the old one was told
    withdrawn: list[str]  # SAEs that shall leave the pack
    settled: dict[str, int]  # SAE -> step up to which its reports are evaluated and written
    ended: Mapping[str, int] = {}  # SAE -> step of an end of it that is written
    unevaluated: Sequence[str] = ()  # SAEs whose next report shall be evaluated, whatever its step
    held: Sequence[str] = ()  # SAEs that may be stopped where they were at their last report
    undecided: Sequence[str] = ()  # of those, the ones that Ray Tune may yet stop there


class CacheKey(NamedTuple):
    """Which activation cache a harvester reads and writes."""

    uri: str
    identity: dict[str, Any]  # see saeray.files.cache
    earlier: dict[str, Any] | None = None  # the identity that versions up to 0.1 had for it


class RowsFor(NamedTuple):
    """An SAE some of whose features are dead, after a step, and how rows are picked for them."""

    name: str
    hook_point: str
    method: str  # see saeray.sae.resampling
    seed: int
    step: int


class RowsWanted(NamedTuple):
    """A pack's request for the rows that dead features may take the place of."""

    pack: str
    blocks: range  # the LM batches they are of
    saes: tuple[RowsFor, ...]
    attempt: int = 0  # counts up where what was answered was lost


class Gauges(NamedTuple):
    """The activation buffer, as it stands."""

    harvested_tokens: int  # LM tokens computed, evaluation not counted
    slots: int  # blocks the buffer may hold
    used: int  # blocks held or under way
    ready: int
    harvest_seconds: float  # summed over harvesters
    elapsed_seconds: float  # since the first harvest
    n_harvesters: int
    readers: dict[str, int]  # reader -> window it is at
    detached: list[str]
    cached_tokens: int = 0  # read from the activation cache instead of computed
    resampling_tokens: int = 0  # run to pick rows for dead features, beside those harvested
    warnings: Sequence[str] = ()
    incarnation: str = ""  # of the buffer; counts start anew with it
    n_down: int = 0  # harvesters that are being started (again)


class ReaderGauges(NamedTuple):
    """One rank of a pack, since its first batch came."""

    waited_seconds: float  # for activations
    busy_seconds: float  # with what is done with them
    step_seconds: float = 0.0  # of these: in the SAEs' step


@dataclass
class SAERow:
    """One SAE in the live table."""

    name: str
    state: str
    step: int
    total_steps: int
    n_training_tokens: int
    metrics: dict[str, Any]
    error: str | None = None


LM_TOKENS, KNOWN_ROWS = "LM tokens", "rows of known features"


def rows_are(model_names: Iterable[str]) -> str:
    """What is harvested of these models, in words."""
    kinds = {KNOWN_ROWS if is_synthetic(name) else LM_TOKENS for name in model_names}
    return " and ".join(sorted(kinds)) or LM_TOKENS


@dataclass
class SweepStatus:
    """A whole sweep at one moment: what the live view draws."""

    rows: list[SAERow]
    phase: str  # what is being waited for, in words
    harvested_tokens: int = 0
    cached_tokens: int = 0
    trained_tokens: int = 0  # SAE-tokens
    gauges: list[Gauges] = field(default_factory=list)
    readers: dict[str, ReaderGauges] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None  # the whole sweep can't go on
    bad_input: bool = False  # … because of what the user gave
    epochs: int = 1
    skipped_rows: int = 0
    evaluation_tokens: int = 0
    resampling_tokens: int = 0  # run to pick rows for dead features
    packs: list[list[str]] = field(default_factory=list)
    rows_are: str = LM_TOKENS  # or KNOWN_ROWS, or both
    # What one pass for each stream comes to: the tokens of its SAE that is furthest.
    pass_tokens: list[int] = field(default_factory=list)
    placement: str = ""  # what was chosen of the cluster, and why
    training_since: float | None = None  # time.time() of the first optimizer step's report
    training_until: float | None = None  # the same, of the newest report
    # What of the start was there when, time.time(); for `benchmarks/startup.py`.
    milestones: dict[str, float] = field(default_factory=dict)
