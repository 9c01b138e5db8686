"""The forward pass on Hopper: n compute warpgroups, of 64 query rows each, and one for TMA.

    grid        (blocks,), each of which takes query tiles one after another, in the order (head
                groups, query tiles, heads of a group): the keys and values of the heads that run
                side by side stay in L2; heavy query tiles first
    GMEM        q, k, v, o [B, T, H, D], lse [B, H, T]; read and written where they lie, by TMA,
                which reads zeros behind the last row and writes nothing there
    SMEM        q: 64 rows per warpgroup; k, v: rings of `stages` key tiles, filled by TMA;
                where blocks stay: the o of the tile before, on its way out
    registers   per compute warpgroup: o [64, E] float32, the scores and p [64, kv]

The warpgroups take turns on the tensor cores: while one multiplies, the others exponentiate.
Within a warpgroup the scores of a tile are multiplied together with `p v` of the tile before.
Key tiles run from last to first: the masked ones at the diagonal start, those that need no
mask follow in a loop of their own. The exponents of a row are relative to the maximum of its first
key tile: a step first takes its exponentials without looking for a new one, and only if their sum
is above `MOST` does a warp look, take them again and rescale o. That is as exact: all sums are of
floating point numbers, which have room for it. The next query tile of a block is loaded while the
one before is finished. Keys may lie in several arrays: then a table has the order of their pieces.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels._pallas import PER_ROW, WGMMA, pl, plgpu
from pallas_kernels._ptx import ROW_THREADS, any_above, named_barrier, row_sums, thread_sums
from pallas_kernels.flash_attention.gpu_common import (
    COMPUTE_REGISTERS,
    LOG2E,
    MEMORY_REGISTERS,
    ROWS,
    SMEM_BYTES,
    SMS,
    SWIZZLED,
    SWIZZLED_FLOAT32,
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
from pallas_kernels.flash_attention.gpu_schedule import each_item, telling
from pallas_kernels.flash_attention.pieces import MOST_PIECES, Pieces
from pallas_kernels.flash_attention.tiles import KernelTiles, Spec

MOST = 2.0**12  # of the p that a thread sums up; float16 has room for it
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
    size = (tiles.q * key_width + stages * tiles.kv * (key_width + width)) * q.dtype.itemsize
    size += tiles.q * width * spec.out_dtype.itemsize
    items = batch * heads * count
    stay = items > SMS and size <= SMEM_BYTES - 2**11  # and barriers
    blocks = SMS if stay else items
    through_q = spec.out_dtype == q.dtype and width == key_width  # o of a block that does not stay
    operands = q, k_arrays, v_arrays, k_order, visible, *(carry or (None, None))
    arrays, structure = jax.tree.flatten(operands)

    def kernel(*refs):
        q_gmem, k_gmems, v_gmems, order, ranges, o_in, lse_in = jax.tree.unflatten(
            structure, refs[: len(arrays)]
        )
        o_gmem, lse_gmem, (q_smem, k_smem, v_smem), o_smem, *barriers, spare = refs[len(arrays) :]
        (q_full, k_full, v_full), (q_empty, k_empty, v_empty, turn), items_told = barriers
        warpgroup = lax.axis_index("warpgroup")

        def place(item):
            """The batch member, head and query tile of an item, and the bounds of its key tiles."""
            row, head = lax.div(item, group), lax.rem(item, group)
            head += group * lax.div(row, count)
            b, h, tile = lax.div(head, heads), lax.rem(head, heads), count - 1 - lax.rem(row, count)
            start, full_start, full_stop, stop = tile_bounds(
                ranges, b, h, tile, lambda: row_tile_bounds(spec, tiles, tile)
            )
            # A tile without keys runs one step that is masked whole, and so writes its zeros.
            start = jnp.minimum(start, pl.cdiv(len(k_gmems) * keys, tiles.kv) - 1)
            stop = jnp.maximum(stop, start + 1)
            return (b, h, tile), (start, full_start, full_stop, stop)

        def slot_of(step):
            # Not by a division where a mask does: it stands between a turn and its first product.
            return step & (stages - 1) if stages.bit_count() == 1 else lax.rem(step, stages)

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

            def load(item, before):
                (b, h, tile), (start, _, _, stop) = place(item)

                def load_keys(step, gmems, ring, ready, free):
                    slot = slot_of(before + step)
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
                    if stay:
                        pl.when(before > 0)(functools.partial(plgpu.barrier_wait, q_empty.at[w]))
                    rows = pl.ds(skip + tile * tiles.q + w * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(q_gmem.at[b, rows, h], q_smem.at[w], q_full.at[w])
                load_keys(0, *rings[1])

                def both(step, _):
                    for ring in rings:
                        load_keys(step, *ring)

                lax.fori_loop(1, stop - start, both, None)
                return before + stop - start

            steps = each_item(items, blocks, items_told, load, takes=True)
            awaited(k_empty, steps, stages)
            awaited(v_empty, steps, stages)
            for w in range(warpgroups if stay else 0):
                plgpu.barrier_wait(q_empty.at[w])

        @pl.when(warpgroup < warpgroups)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS[warpgroups], action="increase")
            q_own = q_smem.at[warpgroup]
            through = o_smem.at[warpgroup] if stay else q_own if through_q else None
            p_spare, o_spare = (None if x is None else x.at[warpgroup] for x in spare)
            scale = exponent_scale(spec)

            def take_turn():
                if turn is not None:
                    plgpu.barrier_wait(turn.at[warpgroup])
                elif warpgroups > 1:
                    named_barrier("sync", warpgroup, 2)

            def pass_turn():
                after = lax.rem(warpgroup + 1, warpgroups)
                if turn is not None:
                    plgpu.barrier_arrive(turn.at[after])
                elif warpgroups > 1:
                    named_barrier("arrive", after, 2)

            parts = ROW_THREADS if interpret is None else 1  # that a row's l consists of

            def sums(p):
                """Of rows: on a GPU of each thread's part of them, to be joined at last."""
                return thread_sums(p) if interpret is None else p.sum(axis=1)

            def above(total):
                return any_above(total, MOST) if interpret is None else ~jnp.all(total <= MOST)

            def multiply_scores(s_acc, slot):
                plgpu.wgmma(s_acc, q_own, k_smem.at[slot].transpose((1, 0)))

            def attend(item, before):
                (b, h, tile), (start, full_start, full_stop, stop) = place(item)
                steps = stop - start
                first_row = tile * tiles.q + warpgroup * ROWS
                rows = pl.ds(first_row, ROWS)

                def scores(s, step, masked):
                    s = capped(s, spec)
                    if not masked:
                        return s
                    key = (stop - 1 - step) * tiles.kv
                    mask = seen(spec, ranges, b, h, shape, 0, first_row, key)
                    return jnp.where(mask, s, -jnp.inf)

                def weights(s, m):
                    """p = 2^(scale s - m) and its sums."""
                    p = jnp.exp2(s * scale - per_row(m, shape))
                    return p, sums(p)

                def anchor(m):
                    return jnp.where(m == -jnp.inf, 0.0, m)

                def shrinking(m, new_m):
                    """The factors of what was relative to m and shall be to new_m."""
                    return jnp.exp2(m - anchor(new_m))

                def grown(s, m, l):
                    """p relative to the maximum so far, that maximum, and the sum l so far."""
                    new_m = jnp.maximum(m, s.max(axis=1) * scale)
                    p, total = weights(s, anchor(new_m))
                    return p, new_m, l * shrinking(m, new_m) + total

                def rescaled(o, m, new_m):
                    return o * per_row(shrinking(m, new_m), (ROWS, width))

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
                        l = jnp.where(m == -jnp.inf, 0.0, 1 / parts)

                        @pl.when(carried)
                        def _continue():
                            o = plgpu.load(o_in.at[b, at, h], layout=WGMMA, optimized=False)
                            o_acc[...] = o

                    slot = slot_of(before)

                    def first(s_acc):
                        multiply_scores(s_acc, slot)
                        pass_turn()
                        return s_acc[...]

                    plgpu.barrier_wait(q_full.at[warpgroup])
                    plgpu.barrier_wait(k_full.at[slot])
                    pl.when((warpgroup > 0) | (before > 0))(take_turn)
                    s = pl.run_scoped(first, plgpu.ACC(shape, jnp.float32))
                    plgpu.barrier_arrive(k_empty.at[slot])
                    p, new_m, l = grown(scores(s, 0, True), m, l)
                    p = p.astype(q.dtype)
                    if carry is not None:
                        o_acc[...] = rescaled(o_acc[...], m, new_m)

                    def step(masked, i, state):
                        p, m, l = state
                        slot, last = slot_of(before + i), slot_of(before + i - 1)

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
                        s = scores(s, i, masked)
                        new_p, total = weights(s, m)
                        grew = above(total)  # warps may differ: no branch waits for another
                        new_p, new_m, l = lax.cond(
                            grew, lambda: grown(s, m, l), lambda: (new_p, m, l + total)
                        )
                        o = o_acc[...]
                        plgpu.barrier_arrive(v_empty.at[last])
                        o_acc[...] = lax.cond(grew, lambda: rescaled(o, m, new_m), lambda: o)
                        # Only now: the registers of the old p were in use by its product.
                        return new_p.astype(q.dtype), new_m, l

                    masked_to = jnp.maximum(stop - full_stop, 1)
                    full_to = jnp.maximum(stop - full_start, masked_to)
                    state = p, new_m, l
                    state = lax.fori_loop(1, masked_to, functools.partial(step, True), state)
                    state = lax.fori_loop(masked_to, full_to, functools.partial(step, False), state)
                    if visible is not None or spec.window is not None:
                        state = lax.fori_loop(full_to, steps, functools.partial(step, True), state)
                    p, m, l = state
                    if stay:
                        plgpu.barrier_arrive(q_empty.at[warpgroup])
                    last = slot_of(before + steps - 1)
                    plgpu.barrier_wait(v_full.at[last])
                    accumulate(o_acc, p, v_smem.at[last], p_spare)
                    o = o_acc[...]
                    plgpu.barrier_arrive(v_empty.at[last])
                    return o, m, row_sums(l) if interpret is None else l

                o, m, l = accumulators(compute, [(ROWS, width)], [o_spare])
                lse_gmem.at[b, h, rows][...] = m * (1 / LOG2E) + jnp.log(l)
                o = o * per_row(1 / jnp.where(l == 0.0, 1.0, l), (ROWS, width))
                if through is None:
                    o_gmem.at[b, rows, h][...] = o.astype(spec.out_dtype)
                    return before + steps
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                through[...] = o.astype(spec.out_dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(through, o_gmem.at[b, rows, h])
                return before + steps

            each_item(items, blocks, items_told, attend, takes=False)
            pl.when(warpgroup == 0)(take_turn)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    operand = functools.partial(smem, dtype=q.dtype, transforms=SWIZZLED)
    o_transforms = SWIZZLED if spec.out_dtype.itemsize == 2 else SWIZZLED_FLOAT32
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
            smem(warpgroups, ROWS, width, dtype=spec.out_dtype, transforms=o_transforms)
            if stay
            else None,
            (one_each(), ring(), ring()),
            (
                one_each(),
                ring(num_arrivals=warpgroups),
                ring(num_arrivals=warpgroups),
                None if interpret is None else one_each(),
            ),
            telling(warpgroups) if stay and interpret is None else None,
            (None, None)
            if interpret is None
            else (
                operand(warpgroups, ROWS, tiles.kv),
                smem(warpgroups, ROWS, width, dtype=jnp.float32),
            ),
        ),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(*arrays)
