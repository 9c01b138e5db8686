"""What the two Mosaic GPU kernels of lightning attention, `sweep` and `partial_states`, share.

Forward and backward are four calls of one operation, for rows a, b, c and a state S:

    out_t = sum_s lambda^|t-s| (a_t . b_s) c_s  +  lambda^(distance of S) a_t . S

             a    b    c    order in time          state, [D, E]
    o        q    k    v    s <= t                 S  = sum k v^T
    dq       do   v    k    s <= t                 S
    dk       v    do   q    s >= t (reverse)       dS = sum q do^T
    dv       k    q    do   s >= t (reverse)       dS

`sweep` runs chunks of 64 tokens through a block per (batch, head, segment, sweep, slices of c):

    GMEM       a, b, c, out [B, T, H, width]; states [B, H, D, E] float32
    SMEM       a, b, c: `stages` chunks in flight, filled by TMA from the last warpgroup
               and for each compute warpgroup, which owns 64 columns of c, of out and of S:
               S in 16 bits (operand of a . S); c scaled by its decay to the chunk's far end;
               the masked and decayed scores; out, on its way to GMEM
    registers  S in float32

The chunks of a block are sequential, so few heads leave the chip idle. Then the sequence is cut
into segments: `partial_states` finds what each adds to the state (it reads b and c only, and only
as far back as the decay lets anything survive), a scan joins these, and all segments run at once.

Rows come as `gpu.py` pads them: widths in slices of 64, and a multiple of 8 tokens (a TMA tile),
of which `length` are real. TMA reads zeros behind the end and drops what is written there.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._pallas import PER_COLUMN, PER_ROW, WGMMA, pl, plgpu

CHUNK = 64  # tokens in a chunk, columns in a slice: the tile of every product
GRID = ("batch", "head", "segment", "sweep", "group")

# Nothing in shared memory is both read and written by one thread without a commit in between,
# so the barriers that Pallas adds around every access are not needed.
COMPILER = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)

ACCUMULATOR = plgpu.ACC((CHUNK, CHUNK), jnp.float32)

# A reference to memory, or to barriers, inside a kernel.
Ref = Any


@dataclasses.dataclass(frozen=True)
class Split:
    """`length` tokens in chunks, and the chunks in segments of `per_segment`."""

    length: int
    per_segment: int

    @property
    def chunks(self) -> int:
        """Chunks of the sequence, the last one perhaps short."""
        return pl.cdiv(self.length, CHUNK)

    @property
    def segments(self) -> int:
        """Segments of the sequence, the last one perhaps short."""
        return pl.cdiv(self.chunks, self.per_segment)

    def chunk_range(self, segment: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """First chunk of a segment, and how many it has."""
        first = segment * self.per_segment
        return first, jnp.minimum(self.per_segment, self.chunks - first)


def smem(dtype: jnp.dtype, *shape: int) -> Any:
    """Shared memory for operands of the tensor cores."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def power(rate: Float[Array, ""], exponent: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """lambda^exponent, with rate = log2(lambda)."""
    return jnp.exp2(rate * exponent.astype(jnp.float32))


def row_index() -> Int[Array, "64"]:
    """0 to 63, one for each row of a tile."""
    return plgpu.layout_cast(lax.iota(jnp.int32, CHUNK), PER_ROW)


def over_rows(x: Float[Array, "64"]) -> Float[Array, "64 64"]:
    """A tile whose row i is x_i throughout."""
    return lax.broadcast_in_dim(x, (CHUNK, CHUNK), [0])


def pair_decay(rate: Float[Array, ""], reverse: bool) -> Float[Array, "64 64"]:
    """lambda^|i-j| where row i sees row j of its own chunk, else 0."""
    i, j = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), n, layout=WGMMA) for n in (0, 1))
    distance = j - i if reverse else i - j
    return jnp.where(distance >= 0, power(rate, distance), 0)


def decay_into_state(rate, position, start, end, reverse: bool) -> Float[Array, "64"]:
    """Decay of the rows from `position` on their way into the state of tokens [start, end).

    Forwards it is the state at the last of these tokens; in reverse, one step before the first.
    """
    token = position + row_index()
    return power(rate, token - start + 1 if reverse else jnp.maximum(end - 1 - token, 0))


def decay_out_of_state(rate, size, reverse: bool) -> Float[Array, "64"]:
    """Decay of the state that enters a chunk of `size` tokens on its way to each row."""
    row = row_index()
    return power(rate, jnp.maximum(size - 1 - row, 0) if reverse else row + 1)


class Documents:
    """What document boundaries hide: nothing where `doc_start` is None.

    Token t sees s <= t if doc_start[t] <= s. Forwards the state after tokens [start, end) is that
    of the document of token end-1; in reverse, that of token start, if it began earlier.
    """

    def __init__(self, doc_start: Ref, length: int):
        self.doc_start, self.length = doc_start, length

    def _of(self, token: Int[Array, ""]) -> Int[Array, ""]:
        return self.doc_start[jnp.minimum(token, self.length - 1)]

    def _of_chunk(self, position: Int[Array, ""], layout: Any) -> Int[Array, "64"]:
        chunk = self.doc_start.at[pl.ds(position, CHUNK)]
        return plgpu.load(chunk, layout=layout, optimized=False)

    def within(self, weight, position, reverse: bool) -> Float[Array, "64 64"]:
        """`weight` between the rows of a chunk."""
        if self.doc_start is None:
            return weight
        key, query = (0, 1) if reverse else (1, 0)
        token = position + plgpu.broadcasted_iota(jnp.int32, weight.shape, key, layout=WGMMA)
        begin = self._of_chunk(position, PER_COLUMN if reverse else PER_ROW)
        return jnp.where(lax.broadcast_in_dim(begin, weight.shape, [query]) <= token, weight, 0)

    def into_state(self, weight, position, start, end, reverse: bool) -> Float[Array, "64"]:
        """`weight` of the rows from `position` in the state of tokens [start, end)."""
        if self.doc_start is None:
            return weight
        if reverse:
            return jnp.where(self._of_chunk(position, PER_ROW) < start, weight, 0)
        return jnp.where(position + row_index() >= self._of(end - 1), weight, 0)

    def out_of_state(self, weight, position, reverse: bool) -> Float[Array, "64"]:
        """`weight` with which the rows of a chunk see the state that enters it."""
        if self.doc_start is None:
            return weight
        if reverse:
            return jnp.where(position + row_index() >= self._of(position + CHUNK), weight, 0)
        return jnp.where(self._of_chunk(position, PER_ROW) < position, weight, 0)

    def through(self, weight, start, end, reverse: bool) -> Float[Array, ""]:
        """`weight` with which the state that enters tokens [start, end) leaves them."""
        if self.doc_start is None:
            return weight
        return jnp.where(self._of(end if reverse else end - 1) < start, weight, 0)


def state_tile(slice_: Int[Array, ""], m: int, by_columns: bool) -> tuple[Any, Any]:
    """Where a state in GMEM holds a slice of c against the m-th 64 columns of b."""
    mine, other = pl.ds(slice_ * CHUNK, CHUNK), pl.ds(m * CHUNK, CHUNK)
    return (other, mine) if by_columns else (mine, other)


def products(
    jobs: Sequence[Callable[[Ref], None]], meanwhile: Callable[[], None] | None = None
) -> tuple[Float[Array, "64 64"], ...]:
    """What each job has added to its accumulator; `meanwhile` runs as the tensor cores work."""

    def run(*accumulators):
        for job, accumulator in zip(jobs, accumulators, strict=True):
            job(accumulator)
        if meanwhile is not None:
            meanwhile()
        return tuple(accumulator[...] for accumulator in accumulators)

    return pl.run_scoped(run, *[ACCUMULATOR] * len(jobs))


def scale(scaled: Ref, c: Ref, weight: Float[Array, "64"]) -> None:
    """Store c with its rows weighted; the caller commits it."""
    rows = plgpu.load(c, layout=WGMMA).astype(jnp.float32)
    scaled[...] = (rows * over_rows(weight)).astype(c.dtype)


def add_outer(b: Ref, scaled: Ref, by_columns: bool, m: int, accumulator: Ref) -> None:
    """Add sum over rows of b (x) c to the m-th tile of a state."""
    tile = b.at[:, pl.ds(m * CHUNK, CHUNK)]
    if by_columns:
        plgpu.wgmma(accumulator, tile.T, scaled)
    else:
        plgpu.wgmma(accumulator, scaled.T, tile)


def copy_slices(c: Ref, c_smem: Ref, barrier: Ref, group: Int[Array, ""], workers: int) -> None:
    """Fetch one slice of c for each compute warpgroup."""
    for worker in range(workers):
        columns = pl.ds((group * workers + worker) * CHUNK, CHUNK)
        plgpu.copy_gmem_to_smem(c.at[:, columns], c_smem.at[worker], barrier)


def produce(count: Int[Array, ""], stages: int, consumed: Ref, copy: Callable) -> None:
    """`copy(n, slot)` for n < count, each as soon as its slot has been consumed."""

    @pl.loop(0, count)
    def _(n):
        slot = lax.rem(n, stages)
        pl.when(n >= stages)(lambda: plgpu.barrier_wait(consumed.at[slot]))
        copy(n, slot)

    @pl.loop(jnp.maximum(0, count - stages), count)
    def _(n):
        plgpu.barrier_wait(consumed.at[lax.rem(n, stages)])
