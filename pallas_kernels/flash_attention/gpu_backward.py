"""The backward pass on Hopper: dk and dv (and dq by reduction) over key tiles, or dq over rows.

`backward_keys`, a block owns `64 n` keys of one key/value head:
    grid        (head groups, key tiles, heads of a group), heavy key tiles first
    SMEM        k, v: 64 keys per warpgroup; q, do, lse, delta: rings of query tiles;
                ds of all the block's keys, twice; dq: the part of each warpgroup
    registers   per compute warpgroup: dk [64, D] and dv [64, E] float32, p^T and ds^T [64, q]
With dq, the warpgroups show each other their ds; in the next step each multiplies `dq = ds k` for
its part of the rows or columns and TMA adds it to float32 dq in GMEM, in no certain order.

`backward_rows`, a block owns `64 n` query rows and computes their dq alone, in a fixed order:
    grid        (head groups, query tiles, heads of a group), heavy query tiles first
    SMEM        q, do: 64 rows per warpgroup; k, v: rings of key tiles
    registers   per compute warpgroup: dq [64, D] float32, p and ds [64, kv]
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels._pallas import pl, plgpu
from pallas_kernels.flash_attention.gpu_common import (
    COMPUTE_REGISTERS,
    MEMORY_REGISTERS,
    ROWS,
    SWIZZLED,
    WGMMA,
    Visible,
    accumulate,
    accumulators,
    awaited,
    capped,
    column_tile_bounds,
    exponent_scale,
    per_column,
    per_row,
    row_tile_bounds,
    seen,
    smem,
    tile_bounds,
)
from pallas_kernels.flash_attention.tiles import KernelTiles, Spec

PER_ROW, PER_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)
SWIZZLED_FLOAT32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


def backward_keys(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    visible: Visible | None,
    do: Float[Array, "B T H E"],
    lse: Float[Array, "B H T"],
    delta: Float[Array, "B H T"],
    dq: Any,
    sums: dict[str, Array],
    *,
    want: tuple[str, ...],
    spec: Spec,
    tiles: KernelTiles,
    interpret: Any = None,
) -> tuple[Array, ...]:
    """Those of dk `[B, S, K, D]` and dv `[B, S, K, E]` that `want` names; adds to the ref dq.

    lse is in base 2, and inf for rows that see nothing. dq: None or a float32 ref `[B, T, H, D]`.
    sums: float32 arrays, by name, to which dk and dv are added, or nothing.
    """
    batch, length, _, width = q.shape
    kv_length, kv_heads = k.shape[1:3]
    value_width = v.shape[-1]
    warpgroups, halves, stages = tiles.kv // ROWS, tiles.q // ROWS, tiles.stages
    heads_per_group = max(tiles.head_group(spec) // spec.group, 1)
    with_ds = dq is not None or "dk" in want
    with_dv = "dv" in want
    do_stages = stages if with_dv else tiles.early_stages
    # Each warpgroup multiplies the dq of its 64 query rows, or of its part of the columns.
    split_rows = halves == warpgroups
    dq_shape = (ROWS, width if split_rows else width // warpgroups)
    shape = (ROWS, tiles.q)
    arrays, structure = jax.tree.flatten((q, k, v, visible, do, lse, delta, dq, sums))

    def kernel(*refs):
        q_gmem, k_gmem, v_gmem, ranges, do_gmem, lse_gmem, delta_gmem, dq_gmem, sums_gmem = (
            jax.tree.unflatten(structure, refs[: len(arrays)])
        )
        *out_gmem, own_smem, rings, ds_smem, dq_smem, full, empty, ds_ready, spare = refs[
            len(arrays) :
        ]
        k_smem, v_smem = own_smem
        q_smem, lse_smem, delta_smem, do_smem = rings
        kv_full, q_full, do_full = full
        q_empty, do_empty = empty
        index = lax.axis_index("group") * heads_per_group + lax.axis_index("head")
        b, kv_head = lax.div(index, kv_heads), lax.rem(index, kv_heads)
        tile = lax.axis_index("tile")
        warpgroup = lax.axis_index("warpgroup")

        def walk(visit: Callable, state):
            """The number of steps, and state = visit(masked, query head, n, query tile, state)."""

            def head(member, carry):
                n, state = carry
                h = kv_head * spec.group + member
                start, full_start, full_stop, stop = tile_bounds(
                    ranges, b, h, tile, lambda: column_tile_bounds(spec, tiles, tile)
                )
                for first, last, masked in (
                    (start, full_start, True),
                    (full_start, full_stop, False),
                    (full_stop, stop, True),
                ):
                    step = functools.partial(visit, masked, h, n - start)
                    state = lax.fori_loop(first, last, step, state)
                return n + stop - start, state

            return lax.fori_loop(0, spec.group, head, (jnp.int32(0), state))

        @pl.when(warpgroup == warpgroups)
        def _load():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            for w in range(warpgroups):
                at = b, pl.ds(tile * tiles.kv + w * ROWS, ROWS), kv_head
                plgpu.copy_gmem_to_smem(k_gmem.at[*at], k_smem.at[w], kv_full.at[w])
                if with_ds:
                    plgpu.copy_gmem_to_smem(v_gmem.at[*at], v_smem.at[w], kv_full.at[w])

            def load(_, h, before, i, state):
                n, rows = before + i, pl.ds(i * tiles.q, tiles.q)
                slot = lax.rem(n, stages)
                pl.when(n >= stages)(lambda: plgpu.barrier_wait(q_empty.at[slot]))
                ready = q_full.at[slot]
                plgpu.copy_gmem_to_smem(q_gmem.at[b, rows, h], q_smem.at[slot], ready)
                plgpu.copy_gmem_to_smem(lse_gmem.at[b, h, rows], lse_smem.at[slot], ready)
                if with_ds:
                    plgpu.copy_gmem_to_smem(delta_gmem.at[b, h, rows], delta_smem.at[slot], ready)
                slot = lax.rem(n, do_stages)
                pl.when(n >= do_stages)(lambda: plgpu.barrier_wait(do_empty.at[slot]))
                ready = do_full.at[slot]
                plgpu.copy_gmem_to_smem(do_gmem.at[b, rows, h], do_smem.at[slot], ready)
                return state

            steps, _ = walk(load, None)
            awaited(q_empty, steps, stages)
            awaited(do_empty, steps, do_stages)

        @pl.when(warpgroup < warpgroups)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS[warpgroups], action="increase")
            first_key = tile * tiles.kv + warpgroup * ROWS
            own_spare = (None if x is None else x.at[warpgroup] for x in spare)
            spares = dict(zip(("p", "dk", "dv"), own_spare, strict=True))
            own_rows = warpgroup if split_rows else 0
            own_columns = pl.ds(0 if split_rows else warpgroup * dq_shape[1], dq_shape[1])

            def show_ds(turn, ds):
                for c in range(halves):
                    ds_smem[turn, warpgroup, c] = ds[:, c * ROWS : (c + 1) * ROWS]
                plgpu.commit_smem()
                plgpu.barrier_arrive(ds_ready)

            def multiply_dq(dq_acc, turn):
                for w in range(warpgroups):
                    ds = ds_smem.at[turn, w, own_rows].transpose((1, 0))
                    plgpu.wgmma(dq_acc, ds, k_smem.at[w, :, own_columns])

            def add_dq(part, h, i):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dq_smem[warpgroup] = part * spec.scale
                plgpu.commit_smem()
                rows = pl.ds(i * tiles.q + own_rows * ROWS, ROWS)
                to = dq_gmem.at[b, rows, h, own_columns]
                plgpu.copy_smem_to_gmem(dq_smem.at[warpgroup], to, reduction_op="add")

            def step(grads, masked, h, before, i, last):
                n = before + i
                slot, do_slot, turn = lax.rem(n, stages), lax.rem(n, do_stages), lax.rem(n, 2)
                q_tile, do_tile = q_smem.at[slot], do_smem.at[do_slot]

                def multiply_scores(s_acc):
                    plgpu.barrier_wait(q_full.at[slot])
                    plgpu.wgmma(s_acc, k_smem.at[warpgroup], q_tile.transpose((1, 0)))

                def finish_step_before(s_acc, dq_acc):
                    multiply_dq(dq_acc, 1 - turn)
                    multiply_scores(s_acc)
                    add_dq(plgpu.wgmma_accumulator_load(dq_acc, wait_n=1), *last)

                def probabilities(s_acc, wait_n):
                    t = capped(plgpu.wgmma_accumulator_load(s_acc, wait_n=wait_n), spec)
                    base = plgpu.load(lse_smem.at[slot], layout=PER_COLUMN)
                    p = jnp.exp2(t * exponent_scale(spec) - per_column(base, shape))
                    if masked:
                        mask = seen(spec, ranges, b, h, shape, 1, i * tiles.q, first_key)
                        p = jnp.where(mask, p, 0.0)
                    if with_dv:
                        accumulate(grads["dv"], p.astype(q.dtype), do_tile, spares["p"])
                    return p, t

                def score_gradients(s_acc, dp_acc):
                    delta = per_column(plgpu.load(delta_smem.at[slot], layout=PER_COLUMN), shape)
                    if interpret is None:  # the sum starts from -delta: fewer registers
                        dp_acc[...] = -delta
                    plgpu.wgmma(dp_acc, v_smem.at[warpgroup], do_tile.transpose((1, 0)))
                    p, t = probabilities(s_acc, 1)
                    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1 if with_dv else 0)
                    ds = p * (dp if interpret is None else dp - delta)
                    ds = (ds if spec.soft_cap is None else ds * (1 - t * t)).astype(q.dtype)
                    if not with_dv:
                        plgpu.barrier_arrive(do_empty.at[do_slot])
                    return ds

                def multiply(s_acc):
                    if dq is None:
                        multiply_scores(s_acc)
                    else:
                        plgpu.barrier_wait(ds_ready)
                        run = functools.partial(finish_step_before, s_acc)
                        pl.run_scoped(run, plgpu.ACC(dq_shape, jnp.float32))
                    plgpu.barrier_wait(do_full.at[do_slot])
                    if with_ds:
                        run = functools.partial(score_gradients, s_acc)
                        return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))
                    probabilities(s_acc, 0)
                    return None

                ds = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
                if "dk" in want:
                    accumulate(grads["dk"], ds, q_tile, spares["p"])
                if dq is not None:
                    show_ds(turn, ds)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(q_empty.at[slot])
                if with_dv:
                    plgpu.barrier_arrive(do_empty.at[do_slot])
                return h, i

            def compute(*accs):
                for w in range(1 if dq is None else warpgroups):
                    plgpu.barrier_wait(kv_full.at[lax.rem(warpgroup + w, warpgroups)])
                if dq is not None:  # the step before the first has no ds
                    show_ds(1, jnp.zeros(shape, q.dtype))
                grads = dict(zip(want, accs, strict=True))
                last_tile = length // tiles.q - 1
                last = kv_head * spec.group, jnp.minimum(tile, last_tile)
                steps, last = walk(functools.partial(step, grads), last)
                if dq is not None:
                    plgpu.barrier_wait(ds_ready)

                    def finish(dq_acc):
                        multiply_dq(dq_acc, lax.rem(steps + 1, 2))
                        return dq_acc[...]

                    add_dq(pl.run_scoped(finish, plgpu.ACC(dq_shape, jnp.float32)), *last)
                return tuple(acc[...] for acc in accs)

            widths = {"dk": width, "dv": value_width}
            found = accumulators(
                compute, [(ROWS, widths[x]) for x in want], [spares[x] for x in want]
            )
            at = b, pl.ds(first_key, ROWS), kv_head
            for name, gmem, value in zip(want, out_gmem, found, strict=True):
                value = value * spec.scale if name == "dk" else value
                if name in sums_gmem:
                    value += plgpu.load(sums_gmem[name].at[*at], layout=WGMMA, optimized=False)
                gmem.at[*at][...] = value.astype(gmem.dtype)
            plgpu.wait_smem_to_gmem(0)

    operand = functools.partial(smem, dtype=q.dtype, transforms=SWIZZLED)
    numbers = functools.partial(smem, dtype=jnp.float32)
    like = {"dk": k.shape, "dv": v.shape}
    return plgpu.kernel(
        kernel,
        out_type=tuple(
            jax.ShapeDtypeStruct(like[x], jnp.float32 if sums else spec.out_dtype) for x in want
        ),
        scratch_types=(
            (
                operand(warpgroups, ROWS, width),
                operand(warpgroups, ROWS, value_width) if with_ds else None,
            ),
            (
                operand(stages, tiles.q, width),
                numbers(stages, tiles.q),
                numbers(stages, tiles.q) if with_ds else None,
                operand(do_stages, tiles.q, value_width),
            ),
            None if dq is None else operand(2, warpgroups, halves, ROWS, ROWS),
            None if dq is None else numbers(warpgroups, *dq_shape, transforms=SWIZZLED_FLOAT32),
            (
                plgpu.Barrier(num_arrivals=2 if with_ds else 1, num_barriers=warpgroups),
                plgpu.Barrier(num_arrivals=3 if with_ds else 2, num_barriers=stages),
                plgpu.Barrier(num_barriers=do_stages),
            ),
            tuple(
                plgpu.Barrier(num_arrivals=warpgroups, num_barriers=n) for n in (stages, do_stages)
            ),
            None if dq is None else plgpu.Barrier(num_arrivals=warpgroups),
            (None, None, None)
            if interpret is None
            else (
                operand(warpgroups, *shape),
                numbers(warpgroups, ROWS, width),
                numbers(warpgroups, ROWS, value_width),
            ),
        ),
        grid=(batch * kv_heads // heads_per_group, kv_length // tiles.kv, heads_per_group),
        grid_names=("group", "tile", "head"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        # Nothing that a thread stores to SMEM is read back by it, other than in the interpreter.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(*arrays)


def backward_rows(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    visible: Visible | None,
    do: Float[Array, "B T H E"],
    lse: Float[Array, "B H T"],
    delta: Float[Array, "B H T"],
    dq_sum: Float[Array, "B T H D"] | None,
    *,
    spec: Spec,
    tiles: KernelTiles,
    interpret: Any = None,
) -> Float[Array, "B T H D"]:
    """dq, added to the float32 dq_sum if there is one; lse as for `backward_keys`."""
    batch, length, heads, width = q.shape
    value_width = v.shape[-1]
    warpgroups, stages, v_stages = tiles.q // ROWS, tiles.stages, tiles.early_stages
    group = tiles.head_group(spec)
    shape = (ROWS, tiles.kv)
    arrays, structure = jax.tree.flatten((q, k, v, visible, do, lse, delta, dq_sum))

    def kernel(*refs):
        q_gmem, k_gmem, v_gmem, ranges, do_gmem, lse_gmem, delta_gmem, sum_gmem = (
            jax.tree.unflatten(structure, refs[: len(arrays)])
        )
        dq_gmem, own_smem, rings, full, empty, spare = refs[len(arrays) :]
        q_smem, do_smem = own_smem
        k_smem, v_smem = rings
        q_full, k_full, v_full = full
        k_empty, v_empty = empty
        index = lax.axis_index("group") * group + lax.axis_index("head")
        b, h = lax.div(index, heads), lax.rem(index, heads)
        tile = length // tiles.q - 1 - lax.axis_index("tile")
        warpgroup = lax.axis_index("warpgroup")
        start, full_start, full_stop, stop = tile_bounds(
            ranges, b, h, tile, lambda: row_tile_bounds(spec, tiles, tile)
        )

        @pl.when(warpgroup == warpgroups)
        def _load():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            for w in range(warpgroups):
                at = b, pl.ds(tile * tiles.q + w * ROWS, ROWS), h
                plgpu.copy_gmem_to_smem(q_gmem.at[*at], q_smem.at[w], q_full.at[w])
                plgpu.copy_gmem_to_smem(do_gmem.at[*at], do_smem.at[w], q_full.at[w])

            def load(i, _):
                n, at = i - start, (b, pl.ds(i * tiles.kv, tiles.kv), lax.div(h, spec.group))
                for gmem, ring, ready, free, depth in (
                    (k_gmem, k_smem, k_full, k_empty, stages),
                    (v_gmem, v_smem, v_full, v_empty, v_stages),
                ):
                    slot = lax.rem(n, depth)
                    pl.when(n >= depth)(functools.partial(plgpu.barrier_wait, free.at[slot]))
                    plgpu.copy_gmem_to_smem(gmem.at[*at], ring.at[slot], ready.at[slot])

            lax.fori_loop(start, stop, load, None)
            awaited(k_empty, stop - start, stages)
            awaited(v_empty, stop - start, v_stages)

        @pl.when(warpgroup < warpgroups)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS[warpgroups], action="increase")
            first_row = tile * tiles.q + warpgroup * ROWS
            rows = pl.ds(first_row, ROWS)
            ds_spare, dq_spare = (None if x is None else x.at[warpgroup] for x in spare)
            base, delta = (
                plgpu.load(x.at[b, h, rows], layout=PER_ROW, optimized=False)
                for x in (lse_gmem, delta_gmem)
            )

            def step(dq_acc, masked, i, _):
                slot, v_slot = lax.rem(i - start, stages), lax.rem(i - start, v_stages)
                # Always `warpgroup`, but the compiler must not know: it would keep every
                # descriptor of q and do in registers over the loop, and spill dq.
                own = warpgroup + lax.div(i, 1 << 30)

                def multiply(s_acc, dp_acc):
                    plgpu.barrier_wait(k_full.at[slot])
                    k_tile = k_smem.at[slot].transpose((1, 0))
                    plgpu.wgmma(s_acc, q_smem.at[own], k_tile)
                    plgpu.barrier_wait(v_full.at[v_slot])
                    v_tile = v_smem.at[v_slot].transpose((1, 0))
                    plgpu.wgmma(dp_acc, do_smem.at[own], v_tile)
                    t = capped(plgpu.wgmma_accumulator_load(s_acc, wait_n=1), spec)
                    p = jnp.exp2(t * exponent_scale(spec) - per_row(base, shape))
                    if masked:
                        mask = seen(spec, ranges, b, h, shape, 0, first_row, i * tiles.kv)
                        p = jnp.where(mask, p, 0.0)
                    dp = dp_acc[...]
                    plgpu.barrier_arrive(v_empty.at[v_slot])
                    ds = p * (dp - per_row(delta, shape))
                    return (ds if spec.soft_cap is None else ds * (1 - t * t)).astype(q.dtype)

                ds = pl.run_scoped(multiply, *[plgpu.ACC(shape, jnp.float32)] * 2)
                accumulate(dq_acc, ds, k_smem.at[slot], ds_spare)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(k_empty.at[slot])

            def compute(dq_acc):
                plgpu.barrier_wait(q_full.at[warpgroup])
                for first, last, masked in (
                    (start, full_start, True),
                    (full_start, full_stop, False),
                    (full_stop, stop, True),
                ):
                    lax.fori_loop(first, last, functools.partial(step, dq_acc, masked), None)
                return dq_acc[...]

            dq = accumulators(compute, [(ROWS, width)], [dq_spare]) * spec.scale
            if dq_sum is not None:
                dq += plgpu.load(sum_gmem.at[b, rows, h], layout=WGMMA, optimized=False)
            dq_gmem.at[b, rows, h][...] = dq.astype(dq_gmem.dtype)

    operand = functools.partial(smem, dtype=q.dtype, transforms=SWIZZLED)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, spec.out_dtype if dq_sum is None else jnp.float32),
        scratch_types=(
            (operand(warpgroups, ROWS, width), operand(warpgroups, ROWS, value_width)),
            (operand(stages, tiles.kv, width), operand(v_stages, tiles.kv, value_width)),
            (
                plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=v_stages),
            ),
            tuple(
                plgpu.Barrier(num_arrivals=warpgroups, num_barriers=n) for n in (stages, v_stages)
            ),
            (None, None)
            if interpret is None
            else (operand(warpgroups, *shape), smem(warpgroups, ROWS, width, dtype=jnp.float32)),
        ),
        grid=(batch * heads // group, length // tiles.q, group),
        grid_names=("group", "tile", "head"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*arrays)
