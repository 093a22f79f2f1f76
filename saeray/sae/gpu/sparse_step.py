"""The sparse step on a GPU: one dense product to find the active entries, the rest on them alone.

    x - b_dec ─► h = (x - b_dec) W_enc ─► bits of h + b_enc > 0 ─► entries by feature and by row
    entries ─► f, from the rows ─► x̂, errors, dx̂ by row ─► df, dh and both gradients by feature

The product is made in the compute dtype, a chunk of rows at a time, and only the bits stay: never
a [B, L]. Which entries are active, and their f, is then decided in float32, so in bfloat16 no
feature fires or stays silent for a rounded h: what is rounded is W_dec in x̂, and x - b_dec and dx̂
in the weights' gradients. Weights, sums and Adam are float32. Nothing depends on the order in
which programs run, so the same inputs give the same bits on the same kind of GPU.

How many entries there are, the host reads only after everything has been enqueued, so the GPU does
not wait for it; if they had no room, the lists are made again with more.

Uses Triton, and imports it only when something is computed. B rows, D = d_in, L = d_sae; both
weights are kept a row per feature: W_enc [D, L] is the transpose of a contiguous [L, D].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from saeray.sae.architectures.base import SAE
from saeray.sae.gpu.adam import HalfWeights, of_rows, power_of_two, rows_of, run
from saeray.sae.gradients import Batch, Gradients

# The first two decide how sums are made, so they are constants, and not tuned while a run runs.
HOT_ENTRIES = 128  # a feature with more of them in a batch is summed in chunks of as many
CHUNK_BYTES = 96 << 20  # of h, a chunk of rows at a time
FIRST_ENTRIES_PER_ROW = 64  # room at the start; more is made where it is needed
N_WORKERS = 2048  # programs that share the chunks of hot features
GROUPS_AT_ONCE, WORDS_AT_ONCE = 128, 512  # of the bits
NOMINATE_TILE = dict(ROWS=16, WORDS=8, num_warps=4)
FUSED_TILE = dict(ROWS=128, COLS=256, BAND=8, num_warps=8, num_stages=3)
LOW = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
# How far the product may be off, relative to h: what is rounded is x and W_enc (sums of D such
# errors, of all signs) and h itself, to 2^-9 in bfloat16. Costs some entries that turn out silent.
SLACK = {"float32": 2.0**-18, "tf32": 2.0**-9, "bfloat16": 2.0**-7}


def available(device: torch.device) -> bool:
    """Whether the sparse step can run there: a GPU that is new enough and a Triton that works."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return _compiles(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _compiles(index: int) -> bool:
    """Triton needs a C compiler, and not every GPU is new enough: tried once."""
    from saeray.sae.gpu.entry_kernels import count_by_row

    if torch.cuda.get_device_capability(index)[0] < 8:  # no bfloat16, no TF32
        return False
    with torch.cuda.device(index):
        word = torch.full((1,), 7, dtype=torch.int32, device="cuda")
        count = torch.zeros(1, dtype=torch.int32, device="cuda")
        try:
            run(count_by_row, (1,), word, count, 1, WORDS=32)
        except Exception:  # of many kinds: no compiler, no header, an unknown GPU
            return False
        return int(count) == 3


@contextmanager
def product_precision(compute_dtype: str) -> Iterator[None]:
    """float32 products on cuda with TF32 or without, and afterwards as before."""
    matmul: Any = torch.backends.cuda.matmul
    flag: str = "allow_tf32"
    wanted: tuple[Any, Any] = (False, True)
    if hasattr(matmul, "fp32_precision"):  # torch >= 2.9, which warns of the older flag
        flag, wanted = "fp32_precision", ("ieee", "tf32")
    before = getattr(matmul, flag)
    setattr(matmul, flag, wanted[compute_dtype == "tf32"])
    try:
        yield
    finally:
        setattr(matmul, flag, before)


class CudaSpace:
    """Buffers of a step on B rows: 3/8 of a byte for each of B·L and 16 + 64 D / 1024 for an entry.

    One for all SAEs of a shape that are stepped one after another on a stream.
    """

    def __init__(
        self, sae: SAE, n_rows: int, compute_dtype: str, *,
        fused_encoder: bool = False, chunk_bytes: int = CHUNK_BYTES, hot: int = HOT_ENTRIES,
    ) -> None:  # fmt: skip
        """fused_encoder: the product in Triton, without h; else in cuBLAS, chunk_bytes at a time.

        Raises:
            ValueError: an unknown compute_dtype.
        """
        if compute_dtype not in LOW:
            raise ValueError(f"compute_dtype {compute_dtype!r}: one of {tuple(LOW)}")
        D, L, device = sae.d_in, sae.d_sae, sae.W_enc.device
        self.n_rows, self.compute_dtype, self.low = n_rows, compute_dtype, LOW[compute_dtype]
        self.fused_encoder, self.hot = fused_encoder, hot
        # Elements of gathered rows that a program holds, and those of one row to a warp.
        self.evaluate_at_once, self.gradients_at_once = (4096, 512), (4096, 256)
        self.n_groups, self.n_words = -(-n_rows // 32), -(-L // 32)

        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.by_feature, self.before = ints(self.n_groups, L), ints(self.n_groups, L)
        self.by_row = ints(n_rows, self.n_words)
        self.count, self.n_chunks, self.row_count = ints(L), ints(L), ints(n_rows)
        # One longer than what they are sums of: the first is 0, the last the total.
        self.start, self.chunk_start = (ints(L + 1, dtype=torch.int64) for _ in range(2))
        self.row_start = ints(n_rows + 1, dtype=torch.int64)
        self.fits = torch.ones(1, dtype=torch.bool, device=device)
        self.total = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.counted = torch.cuda.Event() if device.type == "cuda" else None
        self.x_exact = torch.empty(n_rows, D, device=device)  # x - b_dec
        self.x_centred = torch.empty(n_rows, D, dtype=self.low, device=device)
        self.dx_hat = torch.empty(n_rows, D, dtype=self.low, device=device)
        self.chunk_rows = n_rows
        if not fused_encoder:
            rows = chunk_bytes // (L * self.low.itemsize) // 128 * 128
            self.chunk_rows = min(n_rows, max(rows, 128))
            self.h = torch.empty(self.chunk_rows, L, dtype=self.low, device=device)
        self.W_enc: Tensor | None = None  # rounded here where there are no HalfWeights
        self.mark: Callable[[str], None] = lambda part: None  # told of each part that is enqueued
        self.make_room(sae, min(n_rows * L, n_rows * FIRST_ENTRIES_PER_ROW))

    def make_room(self, sae: SAE, n_entries: int) -> None:
        """For at least so many entries.

        Raises:
            RuntimeError: 2^31 or more of them.
        """
        self.capacity = -(-n_entries // 16) * 16  # Triton compiles other code where 16 divides
        if self.capacity >= 1 << 31:
            raise RuntimeError(f"{n_entries} active entries in a batch: take the dense step")
        device = sae.W_enc.device
        self.chunk_capacity = (2 * self.capacity // self.hot + 1 + 15) // 16 * 16
        # The old lists are let go of before the new ones are asked for.
        self.f = self.part_rows = self.part_sums = torch.empty(0)
        self.rows = self.features = self.places = self.chunk_feature = torch.empty(0)
        self.rows, self.features, self.places = (
            torch.zeros(self.capacity, dtype=torch.int32, device=device) for _ in range(3)
        )
        self.f = torch.zeros(self.capacity, device=device)
        self.chunk_feature = torch.zeros(self.chunk_capacity, dtype=torch.int32, device=device)
        self.part_rows = torch.empty(self.chunk_capacity, 2, sae.d_in, device=device)
        self.part_sums = torch.empty(self.chunk_capacity, 3, device=device)


def at_once(D: int, elements: int) -> int:
    """How many gathered rows a program holds: it is in flight with as many loads."""
    return min(16, max(1, elements // power_of_two(D)))


def sparse_gradients(
    sae: SAE,
    batch: Batch,
    *,
    penalty: Tensor,
    want_l1: bool,
    errors: Tensor,
    out: Gradients,
    space: CudaSpace,
    half: HalfWeights | None = None,
) -> None:
    """As `lane_gradients` over the whole batch: writes all of `out`, and x̂ - x into errors [B, D].

    penalty: of an active feature in one row, as it enters the gradient; 0-d, or [L] where features
    differ in it. half: used where the compute dtype is bfloat16.

    Raises:
        ValueError: a batch of another size than `space`'s, or a tensor not laid out in rows.
    """
    if len(batch.x) != space.n_rows:
        raise ValueError(f"a batch of {len(batch.x)} rows, buffers for {space.n_rows}")
    if not all(t.is_contiguous() for t in (batch.x, batch.scale, errors, sae.W_dec, out.W_dec)):
        raise ValueError("the sparse step needs x, errors and W_dec contiguous")
    with torch.cuda.device_of(batch.x):
        with product_precision(space.compute_dtype):
            select(sae, batch, space, half)
        if not recording():
            _read_later(space)
            differentiate(sae, batch, penalty, errors, out, space, half)
            if space.counted is not None:
                space.counted.synchronize()
            if int(space.total) > space.capacity:
                space.make_room(sae, int(space.total) * 5 // 4)
                differentiate(sae, batch, penalty, errors, out, space, half)
        else:  # a graph can't wait for the host, which looks at `valid` when it has been replayed
            differentiate(sae, batch, penalty, errors, out, space, half)
        torch.le(space.start[-1:], space.capacity, out=space.fits)
        out.valid.copy_(space.fits)
        sum_l1(out, want_l1 and penalty.dim() == 0)


def sum_l1(out: Gradients, wanted: bool) -> None:
    """Σ f, if wanted, and no loss beside it: what is left of `out` once the features' f are in."""
    out.inner.zero_()
    out.l1.zero_()
    if wanted:
        torch.sum(out.f, dim=0, out=out.l1)


def recording() -> bool:
    """Whether kernels are recorded for a CUDA graph, and not run."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _read_later(space: CudaSpace) -> None:
    """The number of entries, on its way to the host."""
    space.total.copy_(space.start[-1:], non_blocking=True)
    if space.counted is not None:
        space.counted.record()


def select(sae: SAE, batch: Batch, space: CudaSpace, half: HalfWeights | None) -> None:
    """Which entries may be active, as bits, and where the lists of each feature and row start."""
    from saeray.sae.gpu import entry_kernels as kernels

    (B, D), L, N, G = batch.x.shape, sae.d_sae, space.n_words, space.n_groups
    torch.sub(batch.x, sae.b_dec, out=space.x_exact)
    space.x_centred.copy_(space.x_exact)
    W_enc = rows_of(sae.W_enc)
    if space.low != torch.float32 and half is not None:
        half.refresh(sae)
        W_enc = half.W_enc
    elif space.low != torch.float32:
        if space.W_enc is None:
            space.W_enc = torch.empty_like(W_enc, dtype=space.low)
        W_enc = space.W_enc.copy_(W_enc)
    space.mark("cast")
    slack = SLACK[space.compute_dtype]
    if space.fused_encoder:
        tile = FUSED_TILE | dict(DEPTH=64 if space.low != torch.float32 else 32)
        run(
            kernels.encode_and_nominate, (-(-B // tile["ROWS"]) * -(-L // tile["COLS"]),),
            space.x_centred, W_enc, sae.b_enc, slack, space.by_row, B, L, D, N,
            PRECISION="ieee" if space.compute_dtype == "float32" else "tf32", **tile,
        )  # fmt: skip
        space.mark("encoder")
    else:
        for a in range(0, B, space.chunk_rows):
            b = min(a + space.chunk_rows, B)
            h = torch.mm(space.x_centred[a:b], W_enc.t(), out=space.h[: b - a])
            space.mark("encoder")
            run(
                kernels.nominate,
                (-(-(b - a) // NOMINATE_TILE["ROWS"]), -(-N // NOMINATE_TILE["WORDS"])),
                h, sae.b_enc, slack, space.by_row, a, b, L, N, **NOMINATE_TILE,
            )  # fmt: skip
            space.mark("select")
    run(
        kernels.transpose_bits, (G, -(-N // 8)),
        space.by_row, space.by_feature, B, L, N, WORDS=8, num_warps=4,
    )  # fmt: skip
    run(
        kernels.count_by_feature, (-(-L // 32),),
        space.by_feature, space.before, space.count, space.n_chunks, G, L,
        HOT=space.hot, GROUPS=GROUPS_AT_ONCE, COLS=32, num_warps=4,
    )  # fmt: skip
    words = min(WORDS_AT_ONCE, power_of_two(N))
    run(kernels.count_by_row, (B,), space.by_row, space.row_count, N, WORDS=words, num_warps=4)
    for counts, start in (
        (space.count, space.start),
        (space.n_chunks, space.chunk_start),
        (space.row_count, space.row_start),
    ):
        torch.cumsum(counts, 0, dtype=torch.int64, out=start[1:])
    space.mark("select")


def differentiate(
    sae: SAE,
    batch: Batch,
    penalty: Tensor,
    errors: Tensor,
    out: Gradients,
    space: CudaSpace,
    half: HalfWeights | None,
) -> None:
    """From the bits to the gradients. Writes no further than there is room."""
    from saeray.sae.gpu import entry_kernels as kernels
    from saeray.sae.gpu import gradient_kernels

    s, (B, D), L, N = space, batch.x.shape, sae.d_sae, space.n_words
    room, chunk_room, hot = s.capacity, s.chunk_capacity, s.hot
    workers = min(N_WORKERS, chunk_room)
    entries = (s.rows, s.f)
    chunks = (s.chunk_start, s.chunk_feature)
    run(
        kernels.list_rows, (s.n_groups, -(-L // 512)),
        s.by_feature, s.before, s.start, s.rows, L, room, COLS=512, num_warps=4,
    )  # fmt: skip
    run(
        kernels.list_features, (B,),
        s.by_row, s.by_feature, s.before, s.start, s.row_start, s.features, s.places, L, N, room,
        WORDS=min(WORDS_AT_ONCE, power_of_two(N)), num_warps=4,
    )  # fmt: skip
    run(
        kernels.list_chunks, (-(-L // 256),),
        s.n_chunks, *chunks, L, chunk_room, COLS=256, num_warps=4,
    )  # fmt: skip
    s.mark("lists")
    run(
        kernels.evaluate, (workers + L,),
        s.x_exact, rows_of(sae.W_enc), sae.b_enc, s.start, *chunks, *entries, L, D, room,
        chunk_room, workers, HOT=hot, AT_ONCE=at_once(D, s.evaluate_at_once[0]),
        **of_rows(D, s.evaluate_at_once[1]),
    )  # fmt: skip
    s.mark("evaluate")
    W_dec = half.W_dec if half is not None and s.low == torch.bfloat16 else sae.W_dec
    run(
        kernels.decode, (B,),
        s.row_start, s.features, s.places, s.f, W_dec, sae.b_dec, batch.x, batch.scale, errors,
        s.dx_hat, D, room, AT_ONCE=at_once(D, 8192), **of_rows(D, 256),
    )  # fmt: skip
    torch.sum(errors * batch.scale, dim=0, out=out.b_dec)
    s.mark("decode")
    form = dict(
        WEIGHTED=penalty.dim() == 1, HOT=hot, AT_ONCE=at_once(D, s.gradients_at_once[0]),
        **of_rows(D, s.gradients_at_once[1]),
    )  # fmt: skip
    run(
        gradient_kernels.sums_of_chunks, (workers,),
        sae.W_dec, s.dx_hat, s.x_centred, s.start, *chunks, *entries, penalty, s.part_rows,
        s.part_sums, L, D, room, chunk_room, workers, **form,
    )  # fmt: skip
    run(
        gradient_kernels.gradients, (L,),
        sae.W_dec, s.dx_hat, s.x_centred, s.start, s.chunk_start, *entries, penalty, s.part_rows,
        s.part_sums, out.W_dec, rows_of(out.W_enc), out.b_enc, out.f, out.fired, D, room,
        chunk_room, **form,
    )  # fmt: skip
    s.mark("gradients")
