"""Sparse Flash Attention (arXiv 2306.01160): dropped queries and keys, and hash buckets.

Both are one thing, in `intervals.py`: reorder the rows of every head so that the keys a query may
see become one interval `[lo, hi)`, run `flash_attention` on the intervals, and put the outputs
back. A query that may see no key gives 0.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from longctx.attention.intervals import attend, check_call, plan_drop, plan_hash
from longctx.parallel.placement import placed_by_xla, split_of


def overflow(keep: Bool[Array, "B T H"], capacity: int) -> Int[Array, "B H"]:
    """How many kept rows of each head lie beyond `capacity` and are dropped after all."""
    return jnp.maximum(keep.sum(1, dtype=jnp.int32) - capacity, 0)


def qk_sparse_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    keep_q: Bool[Array, "B T H"],
    keep_k: Bool[Array, "B T H"],
    *,
    capacity_q: int,
    capacity_k: int,
    doc_start: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Array, "B T H E"]:
    """Causal attention of the kept queries to the kept keys; a dropped query gives 0.

        o_t = sum_s softmax_s(scale q_t.k_s) v_s    over s <= t with keep_k[s], if keep_q[t]

    A kept query sees itself only if its own key is kept, and gives 0 if it sees no key. Shapes
    are static, so each head computes on `capacity_q` queries and `capacity_k` keys: of the kept
    rows beyond a capacity the *latest* are dropped, and `overflow` counts them. For keep masks
    drawn with probability p, `p T` and a few hundred more rows are ample. `doc_start[b, t]`, the
    position of the first token of t's document, hides the keys before it.

    Warning: the operator is causal, a mask need not be. Random masks and thresholds on a token's
    own score are; choosing the top k of a sequence is not, because whether an early token is kept
    then depends on later ones.

    Gradients flow to q, k and v. Source: arXiv 2306.01160, section 3 (QK-sparse).

    Raises:
      ValueError: a capacity is not positive, a keep mask is not bool, doc_start is not integer,
        an axis is empty, or the shapes disagree.
    """
    check_call(q, k, v, doc_start)
    _check_rows(q, keep_q=keep_q, keep_k=keep_k)
    for name, keep in (("keep_q", keep_q), ("keep_k", keep_k)):
        if keep.dtype != bool:
            raise ValueError(f"{name} must be bool, got {keep.dtype}")
    plan = plan_drop(
        keep_q, keep_k, capacity_q=capacity_q, capacity_k=capacity_k, doc_start=doc_start
    )
    return attend(plan, q, k, v, scale=scale, backend=backend)


def hash_matrix(key: Array, heads: int, width: int, num_buckets: int) -> Float[Array, "H D N"]:
    """Random unit columns, `num_buckets / 2` for each head, for `hash_rows`.

    Raises:
      ValueError: `num_buckets` is neither 1 nor even.
    """
    if num_buckets != 1 and (num_buckets < 2 or num_buckets % 2):
        raise ValueError(f"{num_buckets=} must be 1 or even: each direction makes two buckets")
    matrix = jax.random.normal(key, (heads, width, num_buckets // 2))
    return matrix / jnp.linalg.norm(matrix, axis=1, keepdims=True)


def hash_rows(x: Float[Array, "B T H D"], matrix: Float[Array, "H D N"]) -> Int[Array, "B T H"]:
    """The bucket of every row: argmax of [x R, -x R], the cross-polytope hash (arXiv 1509.02897).

    Rows of nearly one direction share a bucket; the length does not matter. No gradient.
    """
    if matrix.shape[-1] == 0:
        return jnp.zeros(x.shape[:3], jnp.int32)
    x = jax.lax.stop_gradient(x)

    def bucket(x: Array, matrix: Array) -> Array:
        along = jnp.einsum("bthd,hdn->bthn", x, matrix.astype(x.dtype))
        return jnp.argmax(jnp.concatenate([along, -along], axis=-1), axis=-1).astype(jnp.int32)

    return placed_by_xla(bucket, x, matrix, split=P(*split_of(x)[:3]))


def _check_rows(q: Float[Array, "B T H D"], **rows: Array) -> None:
    for name, x in rows.items():
        if x.shape != q.shape[:3]:
            raise ValueError(f"{name} has shape {x.shape}; it must be q's [B, T, H] {q.shape[:3]}")


def _check_hashes(q: Array, hashes: tuple[Array, ...], num_buckets: int) -> None:
    for x in hashes:
        _check_rows(q, hashes=x)
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"hashes must be integer, got {x.dtype}")
        if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
            continue  # not known here
        least, most = np.min(np.asarray(x)), np.max(np.asarray(x))
        if least < 0 or most >= num_buckets:
            raise ValueError(
                f"hashes reach from {least} to {most}; all must lie in [0, {num_buckets})"
            )


def hash_sparse_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    *,
    num_buckets: int,
    key: Array | None = None,
    hashes: Int[Array, "B T H"] | tuple[Array, Array] | None = None,
    tied: bool = True,
    strict: bool = True,
    doc_start: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Array, "B T H E"]:
    """Causal attention of every query to the earlier keys of its own bucket, all of them.

        o_t = sum_s softmax_s(scale q_t.k_s) v_s    over s < t with k_hash[s] == q_hash[t]

    `strict=False` admits s = t. The first query of a bucket sees no key and gives 0. `tied` means
    one hash per token, taken from q (the published model, whose keys are the normalised queries);
    untied, k is hashed by the same directions. Buckets come from `key` (the same key draws the
    same buckets again, so rematerialisation is safe) or are given: `hashes` is integer `[B, T, H]`
    below `num_buckets`, or a pair of them for q and k when untied. `doc_start[b, t]`, the position
    of the first token of t's document, hides the keys before it.

    Gradients flow to q, k and v, none through the buckets. Source: arXiv 2306.01160, section 3
    (Hash-sparse); strict as in its language models, inclusive as in its timings.

    Raises:
      ValueError: not exactly one of `key` and `hashes`; hashes that are not integer, do not fit
        `tied` or (where they are known) lie outside [0, num_buckets); `num_buckets` neither 1 nor
        even with `key`; too many buckets for int32; doc_start is not integer; an axis is empty;
        shapes disagree.
    """
    check_call(q, k, v, doc_start)
    if hashes is not None and tied == isinstance(hashes, tuple):
        raise ValueError(f"{tied=} takes {'one array of' if tied else 'a pair of'} hashes")
    if num_buckets * q.shape[1] >= 2**31:
        raise ValueError(f"{num_buckets=} times length {q.shape[1]} must fit int32")
    if key is None and hashes is not None:
        given = hashes if isinstance(hashes, tuple) else (hashes,)
        _check_hashes(q, given, num_buckets)
        # A narrow dtype cannot hold the codes times the length, nor the count of buckets.
        q_hashes, *rest = (jnp.asarray(x, jnp.int32) for x in given)
        k_hashes = rest[0] if rest else None
    elif key is None or hashes is not None:
        raise ValueError("give exactly one of key and hashes")
    else:
        matrix = hash_matrix(key, q.shape[2], q.shape[3], num_buckets)
        q_hashes = hash_rows(q, matrix)
        k_hashes = None if tied else hash_rows(k, matrix)
    plan = plan_hash(
        q_hashes, k_hashes, num_buckets=num_buckets, strict=strict, doc_start=doc_start
    )
    return attend(plan, q, k, v, scale=scale, backend=backend)
