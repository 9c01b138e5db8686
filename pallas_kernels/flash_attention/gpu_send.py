"""Handing on to the next GPU of a ring from within a kernel, while it computes.

XLA gives a kernel the addresses of the same kernel's arrays on the other GPUs of the process
(`plgpu.remote_ref`), and starts it once all of them have come to it. What a GPU sends lands in
outputs of the next one's kernel, which ends after the last of it has arrived: every sender counts
up a semaphore of the receiver once its part is there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels._pallas import pl, plgpu
from pallas_kernels.flash_attention.gpu_common import ROWS
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

    def send(
        self,
        worker: Any,
        workers: int,
        tiles: int,
        at: Callable[[Any], tuple],
        pairs: Sequence[tuple[Any, Any]],
        ready: Callable[[Any], None] = lambda _: None,
    ) -> None:
        """Copy every `workers`-th tile, from the `worker`-th on, through a warpgroup's registers.

        Each of `pairs` is a source and a target, arrays [B, S, K, width]; `at(tile)` says where a
        tile of 64 rows lies in them, once `ready(tile)` returns.
        """
        there = [(source, self.place_of(target)) for source, target in pairs]

        def copy(step, _):
            tile = worker + step * workers
            ready(tile)
            for source, target in there:
                layout = plgpu.Layout.SMEM_GMEM_COPY((ROWS, source.shape[-1]), source.dtype, 128)
                rows = plgpu.load(source.at[*at(tile)], layout=layout, optimized=False)
                target.at[*at(tile)][...] = rows

        lax.fori_loop(0, lax.div(tiles - worker + (workers - 1), workers), copy, None)

    def finish(self, workers: int) -> None:
        """Tell the next device that all of this warpgroup is there; wait for the one before.

        So many warpgroups of it will tell.
        """
        plgpu.commit_smem()  # one thread tells: after all of them
        pl.semaphore_signal(self.arrived, device_id=self.device)
        pl.semaphore_wait(self.arrived, value=workers, decrement=False)


class Done:
    """Which tiles are written, for blocks of the same kernel that wait for them."""

    def __init__(self, tiles: int):
        self.written = pl.get_global(plgpu.SemaphoreType.REGULAR((tiles,)))

    def tell(self, tile: Any) -> None:
        """All that this warpgroup writes of the tile is written."""
        plgpu.commit_smem()
        plgpu.semaphore_signal(self.written.at[tile], memory_scope="gpu")

    def wait(self, tile: Any) -> None:
        """Until the tile is written."""
        plgpu.semaphore_wait(self.written.at[tile], decrement=False, memory_scope="gpu")
