"""The backward pass on Hopper over key tiles: dk and dv, and dq by reduction.

A block owns `64 n` keys of one key/value head:
    grid        (head groups, key tiles, heads of a group), heavy key tiles first
    SMEM        k, v: 64 keys per warpgroup; q, do, lse, -delta: rings of query tiles;
                ds of all the block's keys, twice; dq: the part of each warpgroup
    registers   per compute warpgroup: dk [64, D] and dv [64, E] float32, p^T and ds^T [64, q]

With dq, the warpgroups show each other their ds; in the next step each multiplies `dq = ds k` for
its part of the rows or columns and TMA adds it to float32 dq in GMEM, in no certain order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels._pallas import PER_COLUMN, pl, plgpu
from pallas_kernels.flash_attention.gpu_common import (
    COMPUTE_REGISTERS,
    MEMORY_REGISTERS,
    ROWS,
    SWIZZLED,
    SWIZZLED_FLOAT32,
    Visible,
    accumulate,
    accumulators,
    again,
    awaited,
    capped,
    exponent_scale,
    key_gradients,
    per_column,
    probability_scale,
    seen,
    smem,
    walk_rows,
    write_gradient,
)
from pallas_kernels.flash_attention.tiles import KernelTiles, Spec


def backward_keys(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    visible: Visible | None,
    do: Float[Array, "B T H E"],
    lse: Float[Array, "B H T"],
    minus_delta: Float[Array, "B H T"],
    dq: Any,
    sums: dict[str, Array],
    *,
    spec: Spec,
    tiles: KernelTiles,
    interpret: Any = None,
) -> tuple[Array, ...]:
    """dk `[B, S, K, D]` and dv `[B, S, K, E]`, added to `sums["dk"]` and `sums["dv"]` if given.

    lse is in base 2, less that of `probability_scale`, and inf for rows that see nothing. dq: None
    or a float32 ref `[B, T, H, D]`, to which the gradient of q is added. One array `[2, B, S, K,
    D]` if `key_gradients` says so.
    """
    batch, length, _, width = q.shape
    kv_length, kv_heads = k.shape[1:3]
    value_width = v.shape[-1]
    warpgroups, halves, stages = tiles.kv // ROWS, tiles.q // ROWS, tiles.stages
    heads_per_group = max(tiles.head_group(spec) // spec.group, 1)
    # Each warpgroup multiplies the dq of its 64 query rows, or of its part of the columns.
    split_rows = halves == warpgroups
    dq_shape = (ROWS, width if split_rows else width // warpgroups)
    if dq is not None and dq_shape[1] % ROWS:
        raise ValueError(
            f"GpuTiles: keys.q={tiles.q} must be keys.kv={tiles.kv} where heads are {width} wide"
            " and dq is reduced"
        )
    shape = (ROWS, tiles.q)
    through_smem = not sums and spec.out_dtype == v.dtype and width == value_width
    arrays, structure = jax.tree.flatten((q, k, v, visible, do, lse, minus_delta, dq, sums))

    def kernel(*refs):
        q_gmem, k_gmem, v_gmem, ranges, do_gmem, *of_rows, dq_gmem, sums_gmem = jax.tree.unflatten(
            structure, refs[: len(arrays)]
        )
        *written, own_smem, rings, ds_smem, dq_smem, full, empty, ds_ready, spare = refs[
            len(arrays) :
        ]
        k_smem, v_smem = own_smem
        q_smem, lse_smem, minus_delta_smem, do_smem = rings
        kv_full, q_full, do_full = full
        q_empty, do_empty = empty
        index = lax.axis_index("group") * heads_per_group + lax.axis_index("head")
        b, kv_head = lax.div(index, kv_heads), lax.rem(index, kv_heads)
        tile = lax.axis_index("tile")
        warpgroup = lax.axis_index("warpgroup")

        walk = functools.partial(walk_rows, spec, tiles, ranges, b, kv_head, tile)

        @pl.when(warpgroup == warpgroups)
        def _load():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            for w in range(warpgroups):
                at = b, pl.ds(tile * tiles.kv + w * ROWS, ROWS), kv_head
                plgpu.copy_gmem_to_smem(k_gmem.at[*at], k_smem.at[w], kv_full.at[w])
                plgpu.copy_gmem_to_smem(v_gmem.at[*at], v_smem.at[w], kv_full.at[w])

            def load(_, h, before, i, state):
                n, rows = before + i, pl.ds(i * tiles.q, tiles.q)
                slot = lax.rem(n, stages)
                pl.when(n >= stages)(lambda: plgpu.barrier_wait(q_empty.at[slot]))
                ready = q_full.at[slot]
                plgpu.copy_gmem_to_smem(q_gmem.at[b, rows, h], q_smem.at[slot], ready)
                for gmem, ring in zip(of_rows, (lse_smem, minus_delta_smem), strict=True):
                    plgpu.copy_gmem_to_smem(gmem.at[b, h, rows], ring.at[slot], ready)
                pl.when(n >= stages)(lambda: plgpu.barrier_wait(do_empty.at[slot]))
                ready = do_full.at[slot]
                plgpu.copy_gmem_to_smem(do_gmem.at[b, rows, h], do_smem.at[slot], ready)
                return state

            steps, _ = walk(load, None)
            awaited(q_empty, steps, stages)
            awaited(do_empty, steps, stages)

        @pl.when(warpgroup < warpgroups)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS[warpgroups], action="increase")
            first_key = tile * tiles.kv + warpgroup * ROWS
            p_spare, dk_spare, dv_spare = (None if x is None else x.at[warpgroup] for x in spare)
            rest = spec.scale / probability_scale(spec)
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
                dq_smem[warpgroup] = part * rest
                plgpu.commit_smem()
                rows = pl.ds(i * tiles.q + own_rows * ROWS, ROWS)
                to = dq_gmem.at[b, rows, h, own_columns]
                plgpu.copy_smem_to_gmem(dq_smem.at[warpgroup], to, reduction_op="add")

            def step(dk_acc, dv_acc, masked, h, before, i, state):
                own, *last = state
                n = before + i
                slot, turn = lax.rem(n, stages), lax.rem(n, 2)
                q_tile, do_tile = q_smem.at[slot], do_smem.at[slot]

                def multiply_scores(s_acc):
                    plgpu.wgmma(s_acc, k_smem.at[own], q_tile.transpose((1, 0)))

                def finish_step_before(s_acc, dq_acc):
                    multiply_dq(dq_acc, 1 - turn)
                    multiply_scores(s_acc)
                    add_dq(plgpu.wgmma_accumulator_load(dq_acc, wait_n=1), *last)

                def probabilities(s_acc):
                    t = capped(plgpu.wgmma_accumulator_load(s_acc, wait_n=1), spec)
                    base = plgpu.load(lse_smem.at[slot], layout=PER_COLUMN)
                    p = jnp.exp2(t * exponent_scale(spec) - per_column(base, shape))
                    if masked:
                        mask = seen(spec, ranges, b, h, shape, 1, i * tiles.q, first_key)
                        p = jnp.where(mask, p, 0.0)
                    accumulate(dv_acc, p.astype(q.dtype), do_tile, p_spare)
                    return p, t

                def score_gradients(s_acc, dp_acc):
                    start = plgpu.load(minus_delta_smem.at[slot], layout=PER_COLUMN)
                    start = per_column(start, shape)
                    if interpret is None:  # fewer registers than to add it
                        dp_acc[...] = start
                    plgpu.wgmma(dp_acc, v_smem.at[own], do_tile.transpose((1, 0)))
                    p, t = probabilities(s_acc)
                    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)
                    ds = p * (dp if interpret is None else dp + start)
                    return (ds if spec.soft_cap is None else ds * (1 - t * t)).astype(q.dtype)

                def multiply(s_acc):
                    if dq is None:
                        multiply_scores(s_acc)
                    else:
                        run = functools.partial(finish_step_before, s_acc)
                        pl.run_scoped(run, plgpu.ACC(dq_shape, jnp.float32))
                    run = functools.partial(score_gradients, s_acc)
                    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))

                # Before the sums begin: they start from zero only in the block that makes them.
                plgpu.barrier_wait(q_full.at[slot])
                plgpu.barrier_wait(do_full.at[slot])
                if dq is not None:
                    plgpu.barrier_wait(ds_ready)
                ds = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
                accumulate(dk_acc, ds, q_tile, p_spare)
                if dq is not None:
                    show_ds(turn, ds)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(q_empty.at[slot])
                plgpu.barrier_arrive(do_empty.at[slot])
                return again(own), h, i

            def compute(dk_acc, dv_acc):
                for w in range(1 if dq is None else warpgroups):
                    plgpu.barrier_wait(kv_full.at[lax.rem(warpgroup + w, warpgroups)])
                if dq is not None:  # the step before the first has no ds
                    show_ds(1, jnp.zeros(shape, q.dtype))
                last_tile = length // tiles.q - 1
                state = warpgroup, kv_head * spec.group, jnp.minimum(tile, last_tile)
                steps, (_, *last) = walk(functools.partial(step, dk_acc, dv_acc), state)
                if dq is not None:
                    plgpu.barrier_wait(ds_ready)

                    def finish(dq_acc):
                        multiply_dq(dq_acc, lax.rem(steps + 1, 2))
                        return dq_acc[...]

                    add_dq(pl.run_scoped(finish, plgpu.ACC(dq_shape, jnp.float32)), *last)
                return dk_acc[...], dv_acc[...]

            shapes = [(ROWS, width), (ROWS, value_width)]
            dk, dv = accumulators(compute, shapes, [dk_spare, dv_spare])
            at = b, pl.ds(first_key, ROWS), kv_head
            through = v_smem.at[warpgroup] if through_smem else None  # no one else reads it
            for name, value in (("dk", dk * rest), ("dv", dv / probability_scale(spec))):
                write_gradient(written, value, sums_gmem, name, at, through)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    operand = functools.partial(smem, dtype=q.dtype, transforms=SWIZZLED)
    numbers = functools.partial(smem, dtype=jnp.float32)
    return plgpu.kernel(
        kernel,
        out_type=key_gradients(k, v, sums, spec),
        scratch_types=(
            (operand(warpgroups, ROWS, width), operand(warpgroups, ROWS, value_width)),
            (
                operand(stages, tiles.q, width),
                numbers(stages, tiles.q),
                numbers(stages, tiles.q),
                operand(stages, tiles.q, value_width),
            ),
            None if dq is None else operand(2, warpgroups, halves, ROWS, ROWS),
            None if dq is None else numbers(warpgroups, *dq_shape, transforms=SWIZZLED_FLOAT32),
            (
                plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups),
                plgpu.Barrier(num_arrivals=3, num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
            ),
            (plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),) * 2,
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
