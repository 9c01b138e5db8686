"""Handing on to the next GPU of a ring from within a kernel, while it computes.

XLA gives a kernel the addresses of the same kernel's arrays on the other GPUs of the process
(`plgpu.remote_ref`), and starts it once all of them have come to it. What a GPU sends lands in
outputs of the next one's kernel, which ends after the last of it has arrived: every sender counts
up a semaphore of the receiver once its part is there.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels._pallas import pl, plgpu
from pallas_kernels.flash_attention.tiles import Ring

SENDERS = 4  # blocks that do nothing else: a few reach the rate of the links in a hop's time


class Next:
    """The next device along the ring, seen from within a kernel."""

    def __init__(self, ring: Ring):
        place = lax.axis_index(ring.axis) + ring.stride
        self.device: Any = {ring.axis: lax.rem(place, jnp.int32(ring.devices))}
        self.arrived = pl.get_global(plgpu.SemaphoreType.REGULAR)

    def place_of(self, ref: Any) -> Any:
        """The array on the next device that has the place of `ref` on this one."""
        return plgpu.remote_ref(ref, self.device)

    def tell(self) -> None:
        """Tell the next device that what this warpgroup sent is there."""
        plgpu.commit_smem()  # one thread tells: after all of them
        pl.semaphore_signal(self.arrived, device_id=self.device)

    def wait(self, senders: Any) -> None:
        """Wait for the device before: so many warpgroups of it will tell."""
        pl.semaphore_wait(self.arrived, value=senders, decrement=False)


def send_tiles(
    neighbour: Next,
    part: Any,
    sources: Sequence[Any],
    targets: Sequence[Any],
    rings: Sequence[tuple[Any, Any]],
) -> None:
    """Copy every `SENDERS`-th tile of rows, from the `part`-th on, by way of SMEM.

    `sources` and `targets` are arrays [B, S, K, width] of one S; each has a ring `(slots, full)`
    of tiles in SMEM with a barrier for each.
    """
    batch, length, heads, _ = sources[0].shape
    stages, rows, _ = rings[0][0].shape
    per_head = pl.cdiv(length, rows)
    steps = lax.div(batch * heads * per_head - part + (SENDERS - 1), SENDERS)
    there = [neighbour.place_of(target) for target in targets]

    def at(step):
        tile = part + step * SENDERS
        index, row = lax.div(tile, per_head), lax.rem(tile, per_head)
        return lax.div(index, heads), pl.ds(row * rows, rows), lax.rem(index, heads)

    def load(step):
        slot = lax.rem(step, stages)
        for source, (slots, full) in zip(sources, rings, strict=True):
            plgpu.copy_gmem_to_smem(source.at[*at(step)], slots.at[slot], full.at[slot])

    def send(step, _):
        @pl.when(step + 1 < steps)
        def _():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the slot's last tile has left it
            load(step + 1)

        slot = lax.rem(step, stages)
        for target, (slots, full) in zip(there, rings, strict=True):
            plgpu.barrier_wait(full.at[slot])
            plgpu.copy_smem_to_gmem(slots.at[slot], target.at[*at(step)])

    pl.when(steps > 0)(lambda: load(0))
    lax.fori_loop(0, steps, send, None)
    plgpu.wait_smem_to_gmem(0)
    neighbour.tell()
    neighbour.wait(SENDERS)
