"""The backward pass on Hopper over query tiles: dq alone, in a fixed order.

A block owns `64 n` query rows:
    grid        (head groups, query tiles, heads of a group), heavy query tiles first
    SMEM        q, do: 64 rows per warpgroup; k, v: rings of key tiles
    registers   per compute warpgroup: dq [64, D] float32, p and ds [64, kv]
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels._pallas import PER_ROW, WGMMA, pl, plgpu
from pallas_kernels.flash_attention.gpu_common import (
    COMPUTE_REGISTERS,
    MEMORY_REGISTERS,
    ROWS,
    SWIZZLED,
    Visible,
    accumulate,
    accumulators,
    again,
    awaited,
    capped,
    exponent_scale,
    per_row,
    probability_scale,
    row_tile_bounds,
    seen,
    smem,
    tile_bounds,
)
from pallas_kernels.flash_attention.tiles import KernelTiles, Spec


def backward_rows(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    visible: Visible | None,
    do: Float[Array, "B T H E"],
    lse: Float[Array, "B H T"],
    minus_delta: Float[Array, "B H T"],
    dq_sum: Float[Array, "B T H D"] | None,
    *,
    spec: Spec,
    tiles: KernelTiles,
    interpret: Any = None,
) -> Float[Array, "B T H D"]:
    """dq, added to the float32 dq_sum if there is one.

    lse is in base 2, less that of `probability_scale`, and inf for rows that see nothing.
    """
    batch, length, heads, width = q.shape
    value_width = v.shape[-1]
    warpgroups, stages, v_stages = tiles.q // ROWS, tiles.stages, tiles.early_stages
    group = tiles.head_group(spec)
    shape = (ROWS, tiles.kv)
    arrays, structure = jax.tree.flatten((q, k, v, visible, do, lse, minus_delta, dq_sum))

    def kernel(*refs):
        q_gmem, k_gmem, v_gmem, ranges, do_gmem, lse_gmem, minus_delta_gmem, sum_gmem = (
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
            rest = spec.scale / probability_scale(spec)
            ds_spare, dq_spare = (None if x is None else x.at[warpgroup] for x in spare)
            base, minus_delta = (
                plgpu.load(x.at[b, h, rows], layout=PER_ROW, optimized=False)
                for x in (lse_gmem, minus_delta_gmem)
            )

            def step(dq_acc, masked, i, own):
                slot, v_slot = lax.rem(i - start, stages), lax.rem(i - start, v_stages)

                def multiply(s_acc, dp_acc):
                    k_tile = k_smem.at[slot].transpose((1, 0))
                    plgpu.wgmma(s_acc, q_smem.at[own], k_tile)
                    v_tile = v_smem.at[v_slot].transpose((1, 0))
                    plgpu.wgmma(dp_acc, do_smem.at[own], v_tile)
                    t = capped(plgpu.wgmma_accumulator_load(s_acc, wait_n=1), spec)
                    p = jnp.exp2(t * exponent_scale(spec) - per_row(base, shape))
                    if masked:
                        mask = seen(spec, ranges, b, h, shape, 0, first_row, i * tiles.kv)
                        p = jnp.where(mask, p, 0.0)
                    dp = dp_acc[...]
                    plgpu.barrier_arrive(v_empty.at[v_slot])
                    ds = p * (dp + per_row(minus_delta, shape))
                    return (ds if spec.soft_cap is None else ds * (1 - t * t)).astype(q.dtype)

                plgpu.barrier_wait(k_full.at[slot])
                plgpu.barrier_wait(v_full.at[v_slot])
                ds = pl.run_scoped(multiply, *[plgpu.ACC(shape, jnp.float32)] * 2)
                accumulate(dq_acc, ds, k_smem.at[slot], ds_spare)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(k_empty.at[slot])
                return again(own)

            def compute(dq_acc):
                plgpu.barrier_wait(q_full.at[warpgroup])
                loops = [(full_start, full_stop, False), (full_stop, stop, True)]
                if visible is not None or spec.window is not None:
                    loops.insert(0, (start, full_start, True))
                own = warpgroup
                for first, last, masked in loops:
                    own = lax.fori_loop(first, last, functools.partial(step, dq_acc, masked), own)
                return dq_acc[...]

            dq = accumulators(compute, [(ROWS, width)], [dq_spare]) * rest
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
