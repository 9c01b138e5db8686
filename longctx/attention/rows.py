"""Stable reordering of rows, per batch element and head: ranks, inverses and the moves themselves.

Time before heads for activations `[B, T, H, D]`; codes, slots and sources keep time last,
`[B, H, T]`, where sums along it are contiguous. A row that has no place in the new order carries
a slot beyond its end, and an empty place carries a source beyond the end of the old order.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

CHUNK = 64  # tokens compared with each other directly; counts up to it are exact in any dtype


def one_hot(codes: Int[Array, "*A"], num_codes: int) -> Bool[Array, "*A N"]:
    """Whether each row carries each code; to be reduced at once, where it fuses."""
    return codes[..., None] == lax.broadcasted_iota(
        codes.dtype, (*codes.shape, num_codes), codes.ndim
    )


def of_code(table: Int[Array, "*A N"], codes: Int[Array, "*B"]) -> Int[Array, "*B"]:
    """`table[..., codes]` by comparison, which fuses where a gather does not: codes are few."""
    return jnp.where(one_hot(codes, table.shape[-1]), table, 0).sum(-1)


def count_earlier(
    q_codes: Int[Array, "B H T"], k_codes: Int[Array, "B H T"], num_codes: int
) -> tuple[Int[Array, "B H T"], Int[Array, "B H N"]]:
    """How many keys before `t` carry the code of query `t`, and how many carry each code at all.

    Chunk histograms and their running sum, then direct comparison inside the chunk:
    O(T (CHUNK + num_codes)) comparisons that fuse into the reductions, no `[T, num_codes]` array.
    """
    batch, heads, length = q_codes.shape
    chunks = -(-length // CHUNK)

    def split(codes: Array) -> Array:
        padding = [(0, 0), (0, 0), (0, chunks * CHUNK - length)]
        codes = jnp.pad(codes, padding, constant_values=num_codes)  # a code nobody asks for
        return codes.reshape(batch, heads, chunks, CHUNK)

    q_chunk, k_chunk = split(q_codes), split(k_codes)
    held = one_hot(k_chunk, num_codes).sum(-2, dtype=jnp.int32)
    until = jnp.cumsum(held, axis=2)
    before = of_code((until - held)[..., None, :], q_chunk)
    same = q_chunk[..., :, None] == k_chunk[..., None, :]
    earlier = jnp.tril(jnp.ones((1, 1, 1, CHUNK, CHUNK), bool), -1)
    within = (same & earlier).sum(-1, dtype=jnp.int32)
    count = (before + within).reshape(batch, heads, -1)[..., :length]
    return count, until[:, :, -1]


def look_up(table: Int[Array, "B H N"], index: Int[Array, "B H T"]) -> Int[Array, "B H T"]:
    """`table[b, h, index[b, h, t]]`, and 0 where the index lies beyond the table."""
    return jnp.take_along_axis(table, index, axis=-1, mode="fill", fill_value=0)


def invert(slot: Int[Array, "B H T"], capacity: int) -> Int[Array, "B H R"]:
    """The row that goes to each of `capacity` places; `T` for a place that stays empty."""
    length = slot.shape[-1]

    def one(slot: Array) -> Array:
        places = jnp.full((capacity,), length, jnp.int32)
        rows = jnp.arange(length, dtype=jnp.int32)
        return places.at[slot].set(rows, mode="drop", unique_indices=True)

    return jax.vmap(jax.vmap(one))(slot)


@jax.custom_vjp
def move(
    x: Float[Array, "B T H D"], source: Int[Array, "B H R"], slot: Int[Array, "B H T"]
) -> Float[Array, "B R H D"]:
    """Row r of head h becomes row `source[r]` of `x`, or zeros where that lies beyond `x`.

    `slot` is the inverse of `source`: the gradient is a gather by it, so that no scatter-add is
    ever emitted.
    """
    return _gather(x, source)


def _gather(x: Float[Array, "B T H D"], source: Int[Array, "B H R"]) -> Float[Array, "B R H D"]:
    dtype, width = x.dtype, x.shape[-1]
    words = dtype.itemsize == 2 and width % 2 == 0
    if words:  # 16 bytes a thread instead of 8 on a GPU, whose copies are bound by loads in flight
        x = lax.bitcast_convert_type(x.reshape(*x.shape[:-1], width // 2, 2), jnp.uint32)
    index = jnp.swapaxes(source, 1, 2)[..., None]
    x = jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)
    return lax.bitcast_convert_type(x, dtype).reshape(*x.shape[:-1], width) if words else x


def _move_fwd(x: Array, source: Array, slot: Array) -> tuple[Array, Array]:
    return _gather(x, source), slot


def _move_bwd(slot: Array, dy: Array) -> tuple[Array, None, None]:
    return _gather(dy, slot), None, None


move.defvjp(_move_fwd, _move_bwd)
