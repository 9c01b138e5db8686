"""Lightning attention on TPUs (Mosaic): every pass is one kernel, a sweep over time.

Forward, dQ, dK and dV are the same computation with the roles exchanged. For a product (x, y, z)
with state S [x's width, z's width], chunk by chunk:

    out = ((x y^T) * pair) z + query * (x S)        S <- carry S + (key * y)^T z

    o:  (q, k, v)      dq: (do, v, k), S transposed         forwards in time
    dk: (v, do, q), S transposed      dv: (k, q, do)        backwards: pair transposed,
                                                            `query` and `key` exchanged
    final state: (-, k, v) without `out`

Grid (batch, head, block of tokens), the last one in order. Memory:

    HBM    inputs [B, T, H * width]: one head's block is a column of whole tiles, no transpose
    VMEM   blocks of inputs and outputs (double buffered), states [width, width] float32 and the
           decays of a chunk's pairs [C, C] float32 (scratch: kept from block to block)
    SMEM   log_decay [1, H]: two axes, so that vmap may add a third

Rows behind the end of the sequence are read as zeros and do not decay the state.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._pallas import pl, pltpu
from pallas_kernels.lightning_attention.tiles import Spec, TpuTiles, tpu_tiles

LANES = 128
MAX_WIDTH = 512


def unsupported(spec: Spec) -> str | None:
    """The matrix units take bfloat16 and float32; the states of a head must fit into VMEM."""
    if spec.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernels multiply bfloat16 or float32, not {jnp.dtype(spec.dtype).name}"
    if max(spec.key_width, spec.value_width) > MAX_WIDTH:
        return f"head widths {spec.key_width}, {spec.value_width} exceed {MAX_WIDTH}"
    return None


@dataclasses.dataclass(frozen=True)
class _Product:
    """Indices of x, y, z among the inputs of a sweep; without x there is only a state."""

    x: int | None
    y: int
    z: int
    keep: bool = True  # return the final state


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static part of a sweep."""

    products: tuple[_Product, ...]
    length: int
    chunk: int
    block: int
    reverse: bool = False

    @property
    def ragged(self) -> bool:
        """The last block reaches behind the end of the sequence."""
        return self.length % self.block != 0


def _dot(a, b, contract: tuple[int, int]):
    """Product of two matrices over one axis of each, summed in float32."""
    exact = a.dtype == jnp.float32
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _iota(shape: tuple[int, int], axis: int):
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _decays(plan: _Plan, rate, pair, position, starts, width: int):
    """Decays of the chunk at `position`: (pair, query, key, carry), documents cut apart."""
    C = plan.chunk
    row = _iota((C, width), 0)
    valid = jnp.clip(plan.length - position, 0, C) if plan.ragged else C

    def power(exponent):
        return jnp.exp(rate * exponent.astype(jnp.float32))

    query = power(row + 1)
    key = power(jnp.maximum(valid - 1 - row, 0))
    carry = power(jnp.full((1, width), valid, jnp.int32))
    if starts is None:
        return pair, query, key, carry
    # starts: [1, C] along the lanes. Turned over, [t, s] holds the start of t's document.
    across = jnp.broadcast_to(starts, (C, C))
    down = across.T
    begins, s = (across, 0) if plan.reverse else (down, 1)
    pair = jnp.where(begins <= position + _iota((C, C), s), pair, 0.0)
    query = jnp.where(jnp.broadcast_to(down[:, :1], (C, width)) < position, query, 0.0)
    last = starts[:, C - 1 :]
    key = jnp.where(jnp.broadcast_to(last, (C, width)) <= position + row, key, 0.0)
    carry = jnp.where(jnp.broadcast_to(last, (1, width)) < position, carry, 0.0)
    return pair, query, key, carry


def _kernel(rates, inputs, starts, initial, outs, finals, pair, states, *, plan: _Plan):
    C, chunks = plan.chunk, plan.block // plan.chunk
    step, steps = pl.program_id(2), pl.num_programs(2)
    rate = rates[0, pl.program_id(1)]
    block = steps - 1 - step if plan.reverse else step
    width = max(ref.shape[-1] for ref in inputs)

    @pl.when(step == 0)
    def _():
        distance = _iota((C, C), 0) - _iota((C, C), 1)
        distance = -distance if plan.reverse else distance
        decay = jnp.exp(rate * jnp.maximum(distance, 0).astype(jnp.float32))
        pair[...] = jnp.where(distance >= 0, decay, 0.0)
        for i, S in enumerate(states):
            S[...] = initial[i][0, 0] if initial else jnp.zeros_like(S)

    for c in reversed(range(chunks)) if plan.reverse else range(chunks):
        rows = pl.ds(c * C, C)
        position = block * plan.block + c * C

        def load(ref, rows=rows, position=position):
            x = ref[0, rows, :]
            if not plan.ragged:
                return x
            return jnp.where(_iota(x.shape, 0) < plan.length - position, x, jnp.zeros_like(x))

        values = [load(ref) for ref in inputs]
        begins = starts[0][0, :, rows] if starts else None
        decays, query, key, carry = _decays(plan, rate, pair[...], position, begins, width)
        query, key = (key, query) if plan.reverse else (query, key)
        for i, product in enumerate(plan.products):
            S, y, z = states[i], values[product.y], values[product.z]
            if product.x is not None:
                x = values[product.x]
                scores = (_dot(x, y, (1, 1)) * decays).astype(z.dtype)
                out = _dot(scores, z, (1, 0))
                out += query[:, : z.shape[1]] * _dot(x, S[...].astype(x.dtype), (1, 0))
                outs[i][0, rows, :] = out.astype(outs[i].dtype)
            y = (key[:, : y.shape[1]] * y.astype(key.dtype)).astype(z.dtype)
            S[...] = carry[:, : z.shape[1]] * S[...] + _dot(y, z, (0, 0))

    @pl.when(step == steps - 1)
    def _():
        kept = [S for S, product in zip(states, plan.products, strict=True) if product.keep]
        for final, S in zip(finals, kept, strict=True):
            final[0, 0] = S[...]


def _pad_to(x: Array, axis: int, multiple: int) -> Array:
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, padding) if padding[axis][1] else x


def _sweep(
    inputs: Sequence[Float[Array, "B T H _"]],
    products: tuple[_Product, ...],
    log_decay: Float[Array, "H"],
    initial: Sequence[Float[Array, "B H _ _"]],
    doc_start: Int[Array, "B T"] | None,
    *,
    reverse: bool = False,
    tiles: TpuTiles | None,
    name: str,
) -> tuple[list[Float[Array, "B T H _"]], list[Float[Array, "B H _ _"]]]:
    """Outputs and kept final states of one sweep; `initial` is empty or has one per product."""
    B, T, H, _ = inputs[0].shape
    widths = [x.shape[-1] for x in inputs]
    rows = [_pad_to(x, 3, LANES) for x in inputs]
    padded = [x.shape[-1] for x in rows]
    tiles = tiles or tpu_tiles(max(padded), inputs[0].dtype)
    chunk, block = tiles.chunk, min(tiles.block, pl.cdiv(T, tiles.chunk) * tiles.chunk)
    plan = _Plan(products, T, chunk, block, reverse)
    if block > T:
        rows = [_pad_to(x, 1, block) for x in rows]
    rows = [x.reshape(B, -1, H * w) for x, w in zip(rows, padded, strict=True)]
    initial = [_pad_to(_pad_to(S, 2, LANES), 3, LANES) for S in initial]
    steps = pl.cdiv(T, block)
    starts = []
    if doc_start is not None:
        behind = steps * block - T
        starts = [jnp.pad(doc_start, ((0, 0), (0, behind)), mode="edge")[:, None, :]]
    varying = jax.typeof(rows[0]).manual_axis_type

    def out(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)

    def at(n):
        return steps - 1 - n if reverse else n

    def tokens(width):
        return pl.BlockSpec((1, block, width), lambda b, h, n: (b, at(n), h))

    def state(*widths):
        return pl.BlockSpec((1, 1, *widths), lambda b, h, n: (b, h, 0, 0))

    written = [p for p in products if p.x is not None]
    shapes = [(padded[p.y], padded[p.z]) for p in products]
    kept = [s for s, p in zip(shapes, products, strict=True) if p.keep]
    outs, finals = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        name=name,
        grid=(B, H, steps),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            [tokens(w) for w in padded],
            [pl.BlockSpec((1, 1, block), lambda b, h, n: (b, 0, at(n))) for _ in starts],
            [state(*S.shape[2:]) for S in initial],
        ],
        out_specs=[[tokens(padded[p.z]) for p in written], [state(*s) for s in kept]],
        out_shape=[
            [out(rows[p.z].shape, rows[p.z].dtype) for p in written],
            [out((B, H, *s), jnp.float32) for s in kept],
        ],
        scratch_shapes=[
            pltpu.VMEM((chunk, chunk), jnp.float32),
            [pltpu.VMEM(s, jnp.float32) for s in shapes],
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(plan, B, H, padded, inputs[0].dtype.itemsize),
    )(log_decay.astype(jnp.float32)[None], rows, starts, initial)
    outs = [
        o[:, :T].reshape(B, T, H, -1)[..., : widths[p.z]]
        for o, p in zip(outs, written, strict=True)
    ]
    kept = [(widths[p.y], widths[p.z]) for p in products if p.keep]
    return outs, [S[:, :, :d, :e] for S, (d, e) in zip(finals, kept, strict=True)]


def _cost(plan: _Plan, batch: int, heads: int, widths: list[int], itemsize: int):
    """What the scheduler should know of a kernel that it cannot look into."""
    tokens, C = batch * heads * plan.length, plan.chunk
    operations, moved = 0, sum(widths) * itemsize
    for p in plan.products:
        d, e = widths[p.y], widths[p.z]
        operations += 2 * d * e
        if p.x is not None:
            operations += 2 * (C * (d + e) + d * e)
            moved += e * itemsize
    return pl.CostEstimate(
        flops=tokens * operations,
        transcendentals=tokens * 2 * max(widths),
        bytes_accessed=tokens * moved,
    )


def fwd(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    state: Float[Array, "B H D E"] | None,
    doc_start: Int[Array, "B T"] | None,
    *,
    tiles: TpuTiles | None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H D E"]]:
    """Outputs and final state."""
    (o,), (final,) = _sweep(
        (q, k, v),
        (_Product(0, 1, 2),),
        log_decay,
        [] if state is None else [state],
        doc_start,
        tiles=tiles,
        name="lightning_forward",
    )
    return o, final


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
    tiles: TpuTiles | None = None,
) -> tuple[
    Float[Array, "B T H D"],
    Float[Array, "B T H D"],
    Float[Array, "B T H E"],
    Float[Array, "B H D E"],
]:
    """Cotangents of q, k, v and the initial state."""
    (dq,), _ = _sweep(
        (do, v, k),
        (_Product(0, 1, 2, keep=False),),
        log_decay,
        [] if state is None else [state.swapaxes(2, 3)],
        doc_start,
        tiles=tiles,
        name="lightning_dq",
    )
    (dk, dv), (dinitial,) = _sweep(
        (q, k, v, do),
        (_Product(2, 3, 0, keep=False), _Product(1, 0, 3)),
        log_decay,
        [] if dstate is None else [dstate.swapaxes(2, 3), dstate],
        doc_start,
        reverse=True,
        tiles=tiles,
        name="lightning_dkv",
    )
    return dq, dk, dv, dinitial


def final_state(
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    state: Float[Array, "B H D E"] | None,
    doc_start: Int[Array, "B T"] | None,
    *,
    tiles: TpuTiles | None = None,
) -> Float[Array, "B H D E"]:
    """The state after the last token."""
    _, (final,) = _sweep(
        (k, v),
        (_Product(None, 0, 1),),
        log_decay,
        [] if state is None else [state],
        doc_start,
        tiles=tiles,
        name="lightning_state",
    )
    return final


def initial_cotangent(
    q: Float[Array, "B T H D"],
    do: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    doc_start: Int[Array, "B T"] | None,
    *,
    tiles: TpuTiles | None = None,
) -> Float[Array, "B H D E"]:
    """What `do` sends to the initial state."""
    _, (dinitial,) = _sweep(
        (q, do),
        (_Product(None, 0, 1),),
        log_decay,
        [],
        doc_start,
        reverse=True,
        tiles=tiles,
        name="lightning_dstate",
    )
    return dinitial
