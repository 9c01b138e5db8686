"""The forward pass on Hopper: n compute warpgroups, of 64 query rows each, and one for TMA.

    grid        (head groups, runs of query tiles, heads of a group): the keys and values of the
                heads that run side by side stay in L2; heavy query tiles first
    GMEM        q, k, v, o [B, T, H, D], lse [B, H, T]; read and written where they lie, by TMA,
                which reads zeros behind the last row and writes nothing there
    SMEM        q: 64 rows per warpgroup; k, v: rings of `stages` key tiles, filled by TMA;
                in runs: the o of the tile before, on its way out
    registers   per compute warpgroup: o [64, E] float32, the scores and p [64, kv]

The warpgroups take turns on the tensor cores: while one multiplies, the others exponentiate.
Within a warpgroup the scores of a tile are multiplied together with `p v` of the tile before.
Key tiles run from last to first: the masked ones at the diagonal start, those that need no
mask follow in a loop of their own. In a run of query tiles the next one is loaded while the one
before is finished. Keys may lie in several arrays: then a table has the order of their pieces.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels._pallas import pl, plgpu
from pallas_kernels.flash_attention.gpu_common import (
    COMPUTE_REGISTERS,
    LOG2E,
    MEMORY_REGISTERS,
    PER_ROW,
    ROWS,
    SMEM_BYTES,
    SMS,
    SWIZZLED,
    WGMMA,
    Visible,
    accumulate,
    accumulators,
    awaited,
    capped,
    exponent_scale,
    per_row,
    row_tile_bounds,
    seen,
    smem,
    tile_bounds,
)
from pallas_kernels.flash_attention.pieces import MOST_PIECES, Pieces
from pallas_kernels.flash_attention.tiles import KernelTiles, Spec

PIECE_BITS = (MOST_PIECES - 1).bit_length()


def forward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"] | Pieces,
    v: Float[Array, "B S K E"] | Pieces,
    visible: Visible | None,
    carry: tuple[Float[Array, "B C H E"], Float[Array, "B H C"]] | None,
    *,
    skip: int = 0,
    spec: Spec,
    tiles: KernelTiles,
    interpret: Any = None,
) -> tuple[Float[Array, "B R H E"], Float[Array, "B H R"]]:
    """o and lse of the R rows behind `skip`, lse of whole tiles; spec has the true lengths.

    D and E are multiples of 64, S one of 8 that holds a tile. T is whole tiles where there is a
    carry, or o has another dtype or width than q; else a multiple of 8 that holds 64 rows. Pieces
    are whole tiles, and so are those of the R rows that have no carry.
    """
    batch, length, heads, key_width = q.shape
    length -= skip
    count = pl.cdiv(length, tiles.q)
    fresh = 0 if carry is None else count - carry[0].shape[1] // tiles.q  # tiles without a carry
    (*k_arrays, k_order), (*v_arrays, _) = (
        (*x.arrays, x.order) if isinstance(x, Pieces) else (x, None) for x in (k, v)
    )
    _, keys, _, width = v_arrays[0].shape
    warpgroups, stages, group = tiles.q // ROWS, tiles.stages, tiles.head_group(spec, keys)
    shape = (ROWS, tiles.kv)
    by_tma = spec.out_dtype == q.dtype and width == key_width  # float32 leaves as fast without
    # Where query tiles are few, or all take as long, runs of them would end later than they save.
    uneven = visible is not None or spec.causal or spec.window is not None
    size = tiles.q * (key_width + width) + stages * tiles.kv * (key_width + width)
    room = q.dtype.itemsize * size <= SMEM_BYTES - 2**11  # and barriers
    in_runs = by_tma and carry is None and uneven and room and batch * heads * count >= 3 * SMS
    run = tiles.run if in_runs else 1
    operands = q, k_arrays, v_arrays, k_order, visible, *(carry or (None, None))
    arrays, structure = jax.tree.flatten(operands)

    def kernel(*refs):
        q_gmem, k_gmems, v_gmems, order, ranges, o_in, lse_in = jax.tree.unflatten(
            structure, refs[: len(arrays)]
        )
        o_gmem, lse_gmem, (q_smem, k_smem, v_smem), o_smem, full, empty, spare = refs[len(arrays) :]
        q_full, k_full, v_full = full
        q_empty, k_empty, v_empty, turn = empty
        index = lax.axis_index("group") * group + lax.axis_index("head")
        b, h = lax.div(index, heads), lax.rem(index, heads)
        latest = count - 1 - lax.axis_index("run") * run
        warpgroup = lax.axis_index("warpgroup")

        def walk(visit):
            """visit(n, query tile, its bounds, key tiles before) for each of the block's."""

            def one(n, before):
                tile = latest - n
                start, full_start, full_stop, stop = tile_bounds(
                    ranges, b, h, tile, lambda: row_tile_bounds(spec, tiles, tile)
                )
                # A tile without keys runs one step that is masked whole, and so writes its zeros.
                start = jnp.minimum(start, pl.cdiv(len(k_gmems) * keys, tiles.kv) - 1)
                stop = jnp.maximum(stop, start + 1)
                visit(n, tile, (start, full_start, full_stop, stop), before)
                return before + stop - start

            if run == 1:
                return one(0, 0)
            return lax.fori_loop(0, jnp.minimum(run, latest + 1), one, jnp.int32(0))

        @pl.when(warpgroup == warpgroups)
        def _load():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            rings = (k_gmems, k_smem, k_full, k_empty), (v_gmems, v_smem, v_full, v_empty)

            if order is not None:  # a table in one register
                pieces = order.shape[0]
                table = sum(order[i] << (PIECE_BITS * i) for i in range(pieces))

            def find(key):
                """Of key `key` of all: its array, and which key of that it is."""
                if order is None:
                    return 0, key
                size = len(k_gmems) * keys // pieces
                piece = (table >> (PIECE_BITS * lax.div(key, size))) & (2**PIECE_BITS - 1)
                key = piece * size + lax.rem(key, size)
                return lax.div(key, keys), lax.rem(key, keys)

            def load(n, tile, bounds, before):
                start, _, _, stop = bounds

                def load_keys(step, gmems, ring, ready, free):
                    slot = lax.rem(before + step, stages)
                    array, key = find((stop - 1 - step) * tiles.kv)
                    at = b, pl.ds(key, tiles.kv), lax.div(h, spec.group)
                    wait = functools.partial(plgpu.barrier_wait, free.at[slot])
                    pl.when(before + step >= stages)(wait)

                    def copy(gmem):
                        plgpu.copy_gmem_to_smem(gmem.at[*at], ring.at[slot], ready.at[slot])

                    for number, gmem in enumerate(gmems):
                        pl.when(array == number)(functools.partial(copy, gmem))

                # In the order in which the query tile before has done with the SMEM.
                load_keys(0, *rings[0])
                for w in range(warpgroups):
                    if run > 1:
                        pl.when(n > 0)(functools.partial(plgpu.barrier_wait, q_empty.at[w]))
                    rows = pl.ds(skip + tile * tiles.q + w * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(q_gmem.at[b, rows, h], q_smem.at[w], q_full.at[w])
                load_keys(0, *rings[1])

                def both(step, _):
                    for ring in rings:
                        load_keys(step, *ring)

                lax.fori_loop(1, stop - start, both, None)

            steps = walk(load)
            awaited(k_empty, steps, stages)
            awaited(v_empty, steps, stages)
            for w in range(warpgroups if run > 1 else 0):
                plgpu.barrier_wait(q_empty.at[w])

        @pl.when(warpgroup < warpgroups)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS[warpgroups], action="increase")
            q_own = q_smem.at[warpgroup]
            through = q_own if o_smem is None else o_smem.at[warpgroup]
            p_spare, o_spare = (None if x is None else x.at[warpgroup] for x in spare)
            scale = exponent_scale(spec)

            def take_turn():
                if warpgroups > 1:
                    plgpu.barrier_wait(turn.at[warpgroup])

            def pass_turn():
                if warpgroups > 1:
                    plgpu.barrier_arrive(turn.at[lax.rem(warpgroup + 1, warpgroups)])

            def multiply_scores(s_acc, slot):
                plgpu.wgmma(s_acc, q_own, k_smem.at[slot].transpose((1, 0)))

            def attend(n, tile, bounds, before):
                start, full_start, full_stop, stop = bounds
                steps = stop - start
                first_row = tile * tiles.q + warpgroup * ROWS
                rows = pl.ds(first_row, ROWS)

                def soften(s, m, l, step, masked):
                    """p = 2^(scale s - m), the new maximum m and sum l, and what o shrinks by."""
                    s = capped(s, spec)
                    if masked:
                        key = (stop - 1 - step) * tiles.kv
                        mask = seen(spec, ranges, b, h, shape, 0, first_row, key)
                        s = jnp.where(mask, s, -jnp.inf)
                    new_m = jnp.maximum(m, s.max(axis=1) * scale)
                    anchor = jnp.where(new_m == -jnp.inf, 0.0, new_m) if masked else new_m
                    shrink = jnp.exp2(m - anchor)
                    p = jnp.exp2(s * scale - per_row(anchor, shape))
                    return p, new_m, l * shrink + p.sum(axis=1), shrink

                def compute(o_acc):
                    if carry is None:
                        m = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), PER_ROW)
                        l = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW)
                    else:
                        at = pl.ds(jnp.maximum(first_row - fresh * tiles.q, 0), ROWS)
                        m = plgpu.load(lse_in.at[b, h, at], layout=PER_ROW, optimized=False)
                        m *= LOG2E
                        carried = fresh == 0 or tile >= fresh
                        if fresh:
                            m += jnp.where(carried, 0.0, -jnp.inf)
                        l = jnp.where(m == -jnp.inf, 0.0, 1.0)

                        @pl.when(carried)
                        def _continue():
                            o = plgpu.load(o_in.at[b, at, h], layout=WGMMA, optimized=False)
                            o_acc[...] = o

                    slot = lax.rem(before, stages)

                    def first(s_acc):
                        multiply_scores(s_acc, slot)
                        pass_turn()
                        return s_acc[...]

                    plgpu.barrier_wait(q_full.at[warpgroup])
                    plgpu.barrier_wait(k_full.at[slot])
                    pl.when((warpgroup > 0) | (n > 0))(take_turn)
                    s = pl.run_scoped(first, plgpu.ACC(shape, jnp.float32))
                    plgpu.barrier_arrive(k_empty.at[slot])
                    p, m, l, shrink = soften(s, m, l, 0, True)
                    p = p.astype(q.dtype)
                    if carry is not None:
                        o_acc[...] = o_acc[...] * per_row(shrink, (ROWS, width))

                    def step(masked, i, state):
                        p, m, l = state
                        slot, last = (lax.rem(before + x, stages) for x in (i, i - 1))

                        def multiply(s_acc):
                            multiply_scores(s_acc, slot)
                            plgpu.barrier_wait(v_full.at[last])
                            accumulate(o_acc, p, v_smem.at[last], p_spare)
                            pass_turn()
                            return plgpu.wgmma_accumulator_load(s_acc, wait_n=1)

                        plgpu.barrier_wait(k_full.at[slot])
                        take_turn()
                        s = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
                        plgpu.barrier_arrive(k_empty.at[slot])
                        new_p, m, l, shrink = soften(s, m, l, i, masked)
                        o = o_acc[...]
                        plgpu.barrier_arrive(v_empty.at[last])
                        o_acc[...] = o * per_row(shrink, (ROWS, width))
                        # Only now: the registers of the old p were in use by its product.
                        return new_p.astype(q.dtype), m, l

                    masked_to = jnp.maximum(stop - full_stop, 1)
                    full_to = jnp.maximum(stop - full_start, masked_to)
                    state = lax.fori_loop(1, masked_to, functools.partial(step, True), (p, m, l))
                    state = lax.fori_loop(masked_to, full_to, functools.partial(step, False), state)
                    if visible is not None or spec.window is not None:
                        state = lax.fori_loop(full_to, steps, functools.partial(step, True), state)
                    p, m, l = state
                    if run > 1:
                        plgpu.barrier_arrive(q_empty.at[warpgroup])
                    last = lax.rem(before + steps - 1, stages)
                    plgpu.barrier_wait(v_full.at[last])
                    accumulate(o_acc, p, v_smem.at[last], p_spare)
                    o = o_acc[...]
                    plgpu.barrier_arrive(v_empty.at[last])
                    return o, m, l

                o, m, l = accumulators(compute, [(ROWS, width)], [o_spare])
                lse_gmem.at[b, h, rows][...] = m * (1 / LOG2E) + jnp.log(l)
                o = o * per_row(1 / jnp.where(l == 0.0, 1.0, l), (ROWS, width))
                if not by_tma:
                    o_gmem.at[b, rows, h][...] = o.astype(spec.out_dtype)
                    return
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                through[...] = o.astype(spec.out_dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(through, o_gmem.at[b, rows, h])

            walk(attend)
            pl.when(warpgroup == 0)(take_turn)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    operand = functools.partial(smem, dtype=q.dtype, transforms=SWIZZLED)
    one_each = functools.partial(plgpu.Barrier, num_barriers=warpgroups)
    ring = functools.partial(plgpu.Barrier, num_barriers=stages)
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((batch, length, heads, width), spec.out_dtype),
            jax.ShapeDtypeStruct((batch, heads, count * tiles.q), jnp.float32),
        ),
        scratch_types=(
            (
                operand(warpgroups, ROWS, key_width),
                operand(stages, tiles.kv, key_width),
                operand(stages, tiles.kv, width),
            ),
            None if run == 1 else operand(warpgroups, ROWS, width),
            (one_each(), ring(), ring()),
            (
                one_each(),
                ring(num_arrivals=warpgroups),
                ring(num_arrivals=warpgroups),
                one_each(),
            ),
            (None, None)
            if interpret is None
            else (
                operand(warpgroups, ROWS, tiles.kv),
                smem(warpgroups, ROWS, width, dtype=jnp.float32),
            ),
        ),
        grid=(batch * heads // group, pl.cdiv(count, run), group),
        grid_names=("group", "run", "head"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*arrays)
