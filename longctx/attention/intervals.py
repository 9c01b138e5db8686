"""Orders of rows and intervals of keys: what sparse attention is before any attention.

    drop    kept rows first, in time order      [0, kept keys not later than the query)
    hash    stable sort by bucket               [bucket start, bucket keys not later)

The orders are per batch element and per head.
"""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from longctx.attention.rows import count_earlier, invert, look_up, move, of_code
from longctx.parallel.shards import check_doc_start
from pallas_kernels.flash_attention import flash_attention

TILE_ROWS = 384  # a multiple of every GPU kernel's tile of queries, of 128 and of 192 rows


class Plan(NamedTuple):
    """An order of queries, one of keys, and the interval of ordered keys each ordered query sees.

    `q_slot[t]` is the place of query `t`, `q_source[r]` the query in place `r`, likewise for keys;
    `lo` and `hi` belong to places. A slot or source beyond the end means none.
    """

    q_source: Int[Array, "B H R"]
    q_slot: Int[Array, "B H T"]
    k_source: Int[Array, "B H C"]
    k_slot: Int[Array, "B H T"]
    lo: Int[Array, "B H R"]
    hi: Int[Array, "B H R"]


def places(rows: int) -> int:
    """Places for `rows` ordered queries: whole tiles for a long sequence.

    Places left empty cost next to nothing, a kernel that must pad its operands copies them all.
    """
    return rows if rows < 2048 else rows + -rows % TILE_ROWS


def check_call(q: Array, k: Array, v: Array, doc_start: Int[Array, "B T"] | None) -> None:
    """Raise ValueError if an axis is empty or doc_start is not one integer per token."""
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(f"no axis may be empty: q {q.shape}, k {k.shape}, v {v.shape}")
    check_doc_start(doc_start, q.shape[:2])


def attend(
    plan: Plan,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Array, "B T H E"]:
    """Attention of every query to the keys that `plan` lets it see."""
    if not q.shape[:3] == k.shape[:3] == v.shape[:3]:
        raise ValueError(
            f"q, k and v have [B, T, H] {q.shape[:3]}, {k.shape[:3]}, {v.shape[:3]}: every query "
            "head orders its own keys, so all three must agree (repeat grouped keys first)"
        )
    ordered = (
        move(q, plan.q_source, plan.q_slot),
        move(k, plan.k_source, plan.k_slot),
        move(v, plan.k_source, plan.k_slot),
    )
    o = flash_attention(
        *ordered, causal=False, lo=plan.lo, hi=plan.hi, scale=scale, backend=backend
    )
    return move(cast(Array, o), plan.q_slot, plan.q_source)


def visited_tiles(plan: Plan, tile: int = 128) -> Int[Array, "B H"]:
    """How many `tile` x `tile` tiles of scores each head computes, by the bounds of its intervals.

    A tile of queries visits the tiles of keys between the least `lo` and the greatest `hi` of
    its rows that see anything: a cost that needs no hardware to compare.
    """
    length, keys = plan.lo.shape[-1], plan.k_source.shape[-1]
    padding = [(0, 0), (0, 0), (0, -length % tile)]
    empty = plan.hi <= plan.lo

    def rows(x: Array, nothing: int) -> Array:
        x = jnp.pad(jnp.where(empty, nothing, x), padding, constant_values=nothing)
        return x.reshape(*x.shape[:2], -1, tile)

    first = rows(plan.lo, keys).min(-1) // tile
    stop = -(-rows(plan.hi, 0).max(-1) // tile)
    return jnp.maximum(stop - first, 0).sum(-1)


def plan_drop(
    keep_q: Bool[Array, "B T H"],
    keep_k: Bool[Array, "B T H"],
    *,
    capacity_q: int,
    capacity_k: int,
    doc_start: Int[Array, "B T"] | None = None,
) -> Plan:
    """The order and intervals of `qk_sparse_attention`."""
    q_slot, q_source, _ = _compact(keep_q, capacity_q)
    k_slot, k_source, kept = _compact(keep_k, capacity_k)
    lo = jnp.zeros_like(kept)
    if doc_start is not None:
        before = jnp.concatenate([lo[..., :1], kept[..., :-1]], axis=-1)
        first = jnp.maximum(doc_start[:, None], 0)
        lo = look_up(before, jnp.broadcast_to(first, kept.shape))
    lo, hi = look_up(lo, q_source), look_up(kept, q_source)
    return Plan(q_source, q_slot, k_source, k_slot, lo, hi)


def _compact(keep: Bool[Array, "B T H"], capacity: int) -> tuple[Array, Array, Array]:
    """Slots and sources of the kept rows, and how many are kept up to and with each row."""
    if capacity < 1:
        raise ValueError(f"{capacity=} must be positive")
    room = places(capacity)
    keep = jnp.swapaxes(keep, 1, 2)
    kept = jnp.cumsum(keep, axis=-1, dtype=jnp.int32)
    # Distinct places, all out of range.
    beyond = room + jnp.arange(keep.shape[-1], dtype=jnp.int32)[None, None]
    slot = jnp.where(keep & (kept <= capacity), kept - 1, beyond)
    return slot, invert(slot, room), jnp.minimum(kept, capacity)


def plan_hash(
    q_hashes: Int[Array, "B T H"],
    k_hashes: Int[Array, "B T H"] | None,
    *,
    num_buckets: int,
    strict: bool = True,
    doc_start: Int[Array, "B T"] | None = None,
) -> Plan:
    """The order and intervals of `hash_sparse_attention`; `k_hashes` is None when tied."""
    q_codes = jnp.swapaxes(q_hashes, 1, 2)
    k_codes = q_codes if k_hashes is None else jnp.swapaxes(k_hashes, 1, 2)
    length = q_codes.shape[-1]
    k_first, k_earlier = _bucket_places(k_codes, k_codes, num_buckets)
    k_slot = k_first + k_earlier
    if k_hashes is None:
        q_slot, lo, hi = k_slot, k_first, k_slot
    else:
        q_first, q_earlier = _bucket_places(q_codes, q_codes, num_buckets)
        q_slot = q_first + q_earlier
        lo, earlier = _bucket_places(q_codes, k_codes, num_buckets)
        hi = lo + earlier
    if not strict:
        hi = hi + (q_codes == k_codes)
    q_source, k_source = invert(q_slot, places(length)), invert(k_slot, length)
    if doc_start is not None:
        time = jnp.arange(length, dtype=jnp.int32)[None, None]
        ordered = look_up(k_codes * length + time, k_source)
        first = q_codes * length + jnp.maximum(doc_start[:, None], 0)
        lo = jax.vmap(jax.vmap(jnp.searchsorted))(ordered, first).astype(jnp.int32)
    return Plan(q_source, q_slot, k_source, k_slot, look_up(lo, q_source), look_up(hi, q_source))


def _bucket_places(
    q_codes: Int[Array, "B H T"], k_codes: Int[Array, "B H T"], num_buckets: int
) -> tuple[Int[Array, "B H T"], Int[Array, "B H T"]]:
    """Place of the first key of each query's bucket, and how many keys of it come before."""
    earlier, held = count_earlier(q_codes, k_codes, num_buckets)
    first = jnp.cumsum(held, axis=-1) - held
    return of_code(first[:, :, None], q_codes), earlier
