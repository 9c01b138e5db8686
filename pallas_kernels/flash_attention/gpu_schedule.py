"""Which items a block works on: where there are more than fit at once, one after another.

The first item of a block is the one of its index. For the next ones there is a counter in GMEM:
the warpgroup that loads takes a number from it when it has begun the last load of the item before,
and tells the others by SMEM. So a block begins an item while it ends another, and one whose SM was
busy with something else takes fewer. The interpreter has no such counter: there the items of a
block lie as many apart as there are blocks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels._pallas import pl, plgpu
from pallas_kernels._ptx import fetch_add, uniform


def telling(listeners: int) -> tuple:
    """The scratch of a block with so many warpgroups besides the one that takes items.

    Barriers of an item that is told and of one that all have heard, and the item itself.
    """
    return plgpu.Barrier(), plgpu.Barrier(num_arrivals=listeners), plgpu.SMEM((1,), jnp.int32)


def each_item(items: int, blocks: int, scratch: Any, visit: Callable, *, takes: bool) -> Any:
    """`steps = visit(item, steps)`, which adds to steps, for each item of this block; the last.

    `blocks` are in the grid, along its axis "block": as many as run at once, or one per item. All
    warpgroups of a block call this; one of them `takes`. `scratch` is as `telling` declares it, or
    None in the interpreter.
    """

    def next_item(item, steps):
        if scratch is None:
            return item + blocks
        told, heard, number = scratch
        if takes:
            pl.when(steps > 0)(functools.partial(plgpu.barrier_wait, heard))
            fetch_add(pl.get_global(plgpu.SemaphoreType.REGULAR(())), number)
            plgpu.barrier_arrive(told)
        plgpu.barrier_wait(told)
        item = blocks + uniform(number[0])
        if not takes:
            plgpu.barrier_arrive(heard)
        return item

    def one(state):
        item, steps = state
        after = visit(item, steps)
        return next_item(item, steps), after

    first = lax.axis_index("block"), jnp.int32(0)
    if items == blocks:
        return visit(*first)
    _, steps = lax.while_loop(lambda state: state[0] < items, one, first)
    if takes and scratch is not None:
        plgpu.barrier_wait(scratch[1])  # every completion has to be awaited
    return steps
