"""The backward pass on Hopper over key tiles, for wide heads: one warpgroup makes dv, another dk.

dk and dv of 64 keys and 256 columns fill the registers of a warpgroup each. So two share a tile of
64 keys: the first multiplies the scores, the second the gradients of p, and p goes from the one
to the other. Nothing is multiplied twice: two products each, where a kernel of its own for dv
would multiply the scores again.

    grid        (head groups, key tiles, heads of a group), heavy key tiles first
    SMEM        k, v: 64 keys; q, lse and do, -delta: rings of query tiles; p^T, float32, twice
    registers   warpgroup 0: dv [64, E] float32, s^T and p^T [64, q]
                warpgroup 1: dk [64, D] float32, dp^T and ds^T [64, q]
                warpgroup 2 loads
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels._pallas import PER_COLUMN, WGMMA, pl, plgpu
from pallas_kernels.flash_attention.gpu_common import (
    COMPUTE_REGISTERS,
    MEMORY_REGISTERS,
    ROWS,
    SWIZZLED,
    SWIZZLED_FLOAT32,
    Visible,
    accumulate,
    accumulators,
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

DV, DK, LOADS = range(3)  # the warpgroups
TURNS = 2  # tiles of p in flight


def backward_keys_by_role(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    visible: Visible | None,
    do: Float[Array, "B T H E"],
    lse: Float[Array, "B H T"],
    minus_delta: Float[Array, "B H T"],
    sums: dict[str, Array],
    *,
    spec: Spec,
    tiles: KernelTiles,
    interpret: Any = None,
) -> tuple[Array, ...]:
    """dk `[B, S, K, D]` and dv `[B, S, K, E]`, added to `sums["dk"]` and `sums["dv"]` if given.

    lse is in base 2, less that of `probability_scale`, and inf for rows that see nothing. One array
    `[2, B, S, K, D]` if `key_gradients` says so.
    """
    batch, _, _, width = q.shape
    kv_length, kv_heads = k.shape[1:3]
    value_width = v.shape[-1]
    stages = tiles.stages
    heads_per_group = max(tiles.head_group(spec) // spec.group, 1)
    shape = (ROWS, tiles.q)
    arrays, structure = jax.tree.flatten((q, k, v, visible, do, lse, minus_delta, sums))

    def kernel(*refs):
        q_gmem, k_gmem, v_gmem, ranges, do_gmem, lse_gmem, minus_delta_gmem, sums_gmem = (
            jax.tree.unflatten(structure, refs[: len(arrays)])
        )
        *written, own_smem, rings, p_smem, full, empty, spare = refs[len(arrays) :]
        k_smem, v_smem = own_smem
        q_smem, lse_smem, do_smem, minus_delta_smem = rings
        k_full, v_full, q_full, do_full, p_full = full
        q_empty, do_empty, p_empty = empty
        p_spare, ds_spare, dk_spare, dv_spare = spare
        index = lax.axis_index("group") * heads_per_group + lax.axis_index("head")
        b, kv_head = lax.div(index, kv_heads), lax.rem(index, kv_heads)
        tile = lax.axis_index("tile")
        keys = b, pl.ds(tile * ROWS, ROWS), kv_head
        warpgroup = lax.axis_index("warpgroup")
        walk = functools.partial(walk_rows, spec, tiles, ranges, b, kv_head, tile)

        @pl.when(warpgroup == LOADS)
        def _load():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            plgpu.copy_gmem_to_smem(k_gmem.at[*keys], k_smem, k_full)
            plgpu.copy_gmem_to_smem(v_gmem.at[*keys], v_smem, v_full)

            def load(_, h, before, i, state):
                n, rows = before + i, pl.ds(i * tiles.q, tiles.q)
                slot = lax.rem(n, stages)
                for gmem, ring, numbers, numbers_ring, ready, free in (
                    (q_gmem, q_smem, lse_gmem, lse_smem, q_full, q_empty),
                    (do_gmem, do_smem, minus_delta_gmem, minus_delta_smem, do_full, do_empty),
                ):
                    pl.when(n >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
                    plgpu.copy_gmem_to_smem(gmem.at[b, rows, h], ring.at[slot], ready.at[slot])
                    plgpu.copy_gmem_to_smem(
                        numbers.at[b, h, rows], numbers_ring.at[slot], ready.at[slot]
                    )
                return state

            steps, _ = walk(load, None)
            awaited(q_empty, steps, stages)
            awaited(do_empty, steps, stages)

        def probabilities(s_acc, slot, masked, h, i):
            """p^T, and what it passes on: p^T times the slope of the soft cap."""
            plgpu.wgmma(s_acc, k_smem, q_smem.at[slot].transpose((1, 0)))
            base = plgpu.load(lse_smem.at[slot], layout=PER_COLUMN)
            t = capped(s_acc[...], spec)
            p = jnp.exp2(t * exponent_scale(spec) - per_column(base, shape))
            if masked:
                mask = seen(spec, ranges, b, h, shape, 1, i * tiles.q, tile * ROWS)
                p = jnp.where(mask, p, 0.0)
            return p, p if spec.soft_cap is None else p * (1 - t * t)

        def score_gradients(dp_acc, slot, turn):
            """ds^T."""
            start = per_column(plgpu.load(minus_delta_smem.at[slot], layout=PER_COLUMN), shape)
            if interpret is None:  # fewer registers than to add it
                dp_acc[...] = start
            plgpu.wgmma(dp_acc, v_smem, do_smem.at[slot].transpose((1, 0)))
            plgpu.barrier_wait(p_full.at[turn])
            p = plgpu.load(p_smem.at[turn], layout=WGMMA)
            dp = dp_acc[...]
            return (p * (dp if interpret is None else dp + start)).astype(q.dtype)

        def dv_step(dv_acc, masked, h, before, i, state):
            n = before + i
            slot, turn = lax.rem(n, stages), lax.rem(n, TURNS)
            plgpu.barrier_wait(q_full.at[slot])
            run = functools.partial(probabilities, slot=slot, masked=masked, h=h, i=i)
            p, passed = pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))
            plgpu.barrier_arrive(q_empty.at[slot])
            pl.when(n >= TURNS)(lambda: plgpu.barrier_wait(p_empty.at[turn]))
            p_smem[turn] = passed
            plgpu.barrier_arrive(p_full.at[turn])
            plgpu.barrier_wait(do_full.at[slot])
            accumulate(dv_acc, p.astype(q.dtype), do_smem.at[slot], p_spare)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(do_empty.at[slot])
            return state

        def dk_step(dk_acc, _, h, before, i, state):
            del h
            n = before + i
            slot, turn = lax.rem(n, stages), lax.rem(n, TURNS)
            plgpu.barrier_wait(do_full.at[slot])
            run = functools.partial(score_gradients, slot=slot, turn=turn)
            ds = pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))
            plgpu.barrier_arrive(p_empty.at[turn])
            plgpu.barrier_arrive(do_empty.at[slot])
            plgpu.barrier_wait(q_full.at[slot])
            accumulate(dk_acc, ds, q_smem.at[slot], ds_spare)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(q_empty.at[slot])
            return state

        @pl.when(warpgroup == DV)
        def _dv():
            plgpu.set_max_registers(COMPUTE_REGISTERS[2], action="increase")
            plgpu.barrier_wait(k_full)

            def compute(dv_acc):
                steps, _ = walk(functools.partial(dv_step, dv_acc), None)
                awaited(p_empty, steps, TURNS)
                return dv_acc[...]

            dv = accumulators(compute, [(ROWS, value_width)], [dv_spare])
            dv /= probability_scale(spec)
            write_gradient(written, dv, sums_gmem, "dv", keys)

        @pl.when(warpgroup == DK)
        def _dk():
            plgpu.set_max_registers(COMPUTE_REGISTERS[2], action="increase")
            plgpu.barrier_wait(v_full)

            def compute(dk_acc):
                walk(functools.partial(dk_step, dk_acc), None)
                return dk_acc[...]

            dk = accumulators(compute, [(ROWS, width)], [dk_spare])
            dk *= spec.scale / probability_scale(spec)
            write_gradient(written, dk, sums_gmem, "dk", keys)

    operand = functools.partial(smem, dtype=q.dtype, transforms=SWIZZLED)
    numbers = functools.partial(smem, dtype=jnp.float32)
    return plgpu.kernel(
        kernel,
        out_type=key_gradients(k, v, sums, spec),
        scratch_types=(
            (operand(ROWS, width), operand(ROWS, value_width)),
            (
                operand(stages, tiles.q, width),
                numbers(stages, tiles.q),
                operand(stages, tiles.q, value_width),
                numbers(stages, tiles.q),
            ),
            numbers(TURNS, *shape, transforms=SWIZZLED_FLOAT32),
            (
                plgpu.Barrier(),
                plgpu.Barrier(),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(num_barriers=TURNS),
            ),
            (
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(num_barriers=TURNS),
            ),
            (None,) * 4
            if interpret is None
            else (
                operand(*shape),
                operand(*shape),
                numbers(ROWS, width),
                numbers(ROWS, value_width),
            ),
        ),
        grid=(batch * kv_heads // heads_per_group, kv_length // ROWS, heads_per_group),
        grid_names=("group", "tile", "head"),
        num_threads=3,
        thread_name="warpgroup",
        # Nothing that a thread stores to SMEM is read back by it, other than in the interpreter.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(*arrays)
