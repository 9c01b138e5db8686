"""Lightning attention on Hopper GPUs (Mosaic GPU): the plan of a call around its two kernels.

One launch of `sweep` makes o; one makes dq, dk and dv (two where the widths of k and v differ).
Where these would leave the chip idle, the sequence is split first: `partial_states`, a scan.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._dispatch import not_hopper
from pallas_kernels._pallas import pl, unify_varying, varying_axes
from pallas_kernels.lightning_attention.gpu_common import CHUNK, Split
from pallas_kernels.lightning_attention.gpu_states import Direction, partial_states
from pallas_kernels.lightning_attention.gpu_sweep import Sweep, sweep
from pallas_kernels.lightning_attention.tiles import GpuTiles, Spec, gpu_tiles

LOG2_E = 1.4426950408889634
MAX_WIDTH = 256
MOST_PIECES = 16


def unsupported(spec: Spec) -> str | None:
    """Hopper's tensor cores multiply 16-bit operands; the registers hold 256 x 64 of a state."""
    if spec.dtype not in (jnp.bfloat16, jnp.float16):
        return f"its tensor cores multiply bfloat16 or float16, not {jnp.dtype(spec.dtype).name}"
    if max(spec.key_width, spec.value_width) > MAX_WIDTH:
        return f"head widths {spec.key_width} and {spec.value_width} must be at most {MAX_WIDTH}"
    return not_hopper()


def pieces(spec: Spec) -> int:
    """The least power of two of pieces, in whole chunks, that the forward does not cut further."""
    widths = [pl.cdiv(width, CHUNK) for width in (spec.key_width, spec.value_width)]
    count = 1
    while count < MOST_PIECES and spec.length % (2 * count * CHUNK) == 0:
        heads, chunks = spec.batch * spec.heads * count, spec.length // (count * CHUNK)
        if gpu_tiles(heads, chunks, widths[1:], max(widths)).segments == 1:
            break
        count *= 2
    return count


def _pad(x: Array, sizes: dict[int, int]) -> Array:
    """Zeros behind `x` until its axes have these sizes."""
    wanted = [sizes.get(axis, size) for axis, size in enumerate(x.shape)]
    if wanted == list(x.shape):
        return x
    return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, wanted, strict=True)])


def _up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple


def _rows(*arrays: Array) -> list[Array]:
    """Whole slices wide; at least a chunk long, and a multiple of the 8 rows of a TMA tile."""
    return [_pad(x, {1: max(CHUNK, _up(x.shape[1], 8)), 3: _up(x.shape[3], CHUNK)}) for x in arrays]


def _state(x: Array) -> Array:
    return _pad(x, {2: _up(x.shape[2], CHUNK), 3: _up(x.shape[3], CHUNK)})


def _cut(x: Array, like: Array) -> Array:
    """The rows without padding, varying over the mesh axes that `like` varies over."""
    return unify_varying(x[:, : like.shape[1], :, : like.shape[3]], varying_axes(like))


def _cut_state(x: Array, k: Array, v: Array) -> Array:
    return unify_varying(x[:, :, : k.shape[3], : v.shape[3]], varying_axes(k, v))


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the entries share: decay rates, documents, and the way the work is split."""

    rate: Float[Array, "H"]
    doc_start: Int[Array, "B N"] | None
    split: Split
    tiles: GpuTiles

    @classmethod
    def plan(cls, makes, k, v, log_decay, doc_start, tiles) -> "_Call":
        """For sweeps that make rows as wide as those of each of `makes`."""
        batch, length, heads, _ = k.shape
        chunks = pl.cdiv(length, CHUNK)
        if tiles is None:
            slices = [pl.cdiv(x.shape[3], CHUNK) for x in makes]
            widest = max(pl.cdiv(x.shape[3], CHUNK) for x in (k, v))
            tiles = gpu_tiles(batch * heads, chunks, slices, widest)
        per_segment = pl.cdiv(chunks, min(tiles.segments, chunks))
        if doc_start is not None:
            doc_start = jnp.pad(doc_start, ((0, 0), (0, -length % CHUNK)), mode="edge")
        rate = jnp.maximum(log_decay.astype(jnp.float32) * LOG2_E, -1e4)
        return cls(rate, doc_start, Split(length, per_segment), tiles)

    def scan(self, direction: Direction, partial: Array, state: Array | None) -> list[Array]:
        """`state` at the boundaries of the segments, in the direction's order."""
        count, size, length = len(partial), self.split.per_segment * CHUNK, self.split.length
        states = [jnp.zeros(partial.shape[1:], jnp.float32) if state is None else _state(state)]
        skipped = self.split.segments - count if direction.reverse else 0
        for index in reversed(range(count)) if direction.reverse else range(count):
            start = (index + skipped) * size
            end = min(start + size, length)
            weight = jnp.exp2(self.rate * (end - start))[None, :, None, None]
            if self.doc_start is not None:
                last = min(end, length - 1) if direction.reverse else end - 1
                kept = self.doc_start[:, last, None, None, None] < start
                weight = jnp.where(kept, weight, 0)
            states.append(weight * states[-1] + partial[index])
        return states

    def partial(self, directions: Sequence[Direction], count: int) -> list[Array]:
        """What the segments add to the states."""
        return partial_states(directions, self.rate, self.doc_start, self.split, count)

    def final(self, direction: Direction, state: Array | None) -> Array:
        """`state` behind the last segment in the direction's order."""
        (partial,) = self.partial([direction], self.split.segments)
        return self.scan(direction, partial, state)[-1]

    def initial(self, *given: tuple[Direction, Array | None]) -> Sequence[Array | None]:
        """For each direction, the state with which every segment begins."""
        if self.split.segments == 1:
            return [None if state is None else _state(state)[None] for _, state in given]
        partials = self.partial([direction for direction, _ in given], self.split.segments - 1)
        found = []
        for (direction, state), partial in zip(given, partials, strict=True):
            states = self.scan(direction, partial, state)
            found.append(jnp.stack(states[::-1] if direction.reverse else states))
        return found

    def sweep(self, *sweeps: Sweep) -> tuple[list[Array], list[Array]]:
        """Rows of the sweeps, and their final states."""
        slices = sweeps[0].c.shape[3] // CHUNK
        return sweep(
            sweeps,
            self.rate,
            self.doc_start,
            self.split,
            workers=math.gcd(self.tiles.workers, slices),
            stages=self.tiles.stages,
        )


def fwd(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    state: Float[Array, "B H D E"] | None,
    doc_start: Int[Array, "B T"] | None,
    *,
    tiles: GpuTiles | None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H D E"]]:
    """Outputs and final state."""
    call = _Call.plan([v], k, v, log_decay, doc_start, tiles)
    a, b, c = _rows(q, k, v)
    (S,) = call.initial((Direction(b, c, reverse=False), state))
    (o,), (final,) = call.sweep(Sweep(a, b, c, S, final=True))
    return _cut(o, v), _cut_state(final, k, v)


def bwd(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    state: Float[Array, "B H D E"] | None,
    doc_start: Int[Array, "B T"] | None,
    do: Float[Array, "B T H E"],
    dstate: Float[Array, "B H D E"] | None,
    *,
    tiles: GpuTiles | None = None,
) -> tuple[
    Float[Array, "B T H D"],
    Float[Array, "B T H D"],
    Float[Array, "B T H E"],
    Float[Array, "B H D E"],
]:
    """Cotangents of q, k, v and the initial state."""
    call = _Call.plan([q, k, v], k, v, log_decay, doc_start, tiles)
    a, b, c, d = _rows(q, k, v, do)
    S, dS = call.initial(
        (Direction(b, c, reverse=False), state), (Direction(a, d, reverse=True), dstate)
    )
    for_dq = Sweep(d, c, b, S, by_columns=False)
    for_dk = Sweep(c, d, a, dS, by_columns=False, reverse=True)
    for_dv = Sweep(b, a, d, dS, reverse=True, final=True)
    if a.shape == c.shape:
        (dq, dk, dv), (final,) = call.sweep(for_dq, for_dk, for_dv)
    else:
        (dq, dk), _ = call.sweep(for_dq, for_dk)
        (dv,), (final,) = call.sweep(for_dv)
    return _cut(dq, q), _cut(dk, k), _cut(dv, v), _cut_state(final, k, v)


def final_state(
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    state: Float[Array, "B H D E"] | None,
    doc_start: Int[Array, "B T"] | None,
    *,
    tiles: GpuTiles | None = None,
) -> Float[Array, "B H D E"]:
    """The state after the last token."""
    call = _Call.plan([v], k, v, log_decay, doc_start, tiles)
    return _cut_state(call.final(Direction(*_rows(k, v), reverse=False), state), k, v)


def initial_cotangent(
    q: Float[Array, "B T H D"],
    do: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    doc_start: Int[Array, "B T"] | None,
    *,
    tiles: GpuTiles | None = None,
) -> Float[Array, "B H D E"]:
    """What `do` sends to the initial state."""
    call = _Call.plan([do], q, do, log_decay, doc_start, tiles)
    return _cut_state(call.final(Direction(*_rows(q, do), reverse=True), None), q, do)
