"""Sparse flash attention against dense: `python -m experiments.bench.sparse --lengths 8192`.

Forward and forward + backward of causal attention, 16 heads of 64 in bf16: dense by cuDNN (through
jax.nn) and by our own kernel, hash-sparse with 16 and 64 buckets, and 25%, 50%, 75% of queries and
keys dropped. Every sparse time includes hashing, ordering and all row moves; keep masks are given.
Beside the times stand the tiles of 128 x 128 scores each visits, which no hardware changes.

With --parts the pieces of one hash-sparse call alone: hashing, ordering by counting and by a
general sort, moving q, k and v, and the attention between them.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.bench._timing import time_ms, write_rows
from longctx.attention import rows as row_moves
from longctx.attention import sparse
from pallas_kernels.flash_attention import flash_attention

TOKENS, HEADS, WIDTH, TILE = 32768, 16, 64, 128
RESULTS = Path(__file__).parent / "results"


def inputs(batch: int, length: int) -> list[Array]:
    """Random q, k, v and do."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (batch, length, HEADS, WIDTH)
    return [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]


def both(operator: Callable[..., Array]) -> Callable[..., Any]:
    """Forward and backward of `operator(q, k, v, *rest)` for a given cotangent."""

    def run(q: Array, k: Array, v: Array, do: Array, *rest: Array) -> Any:
        o, pull = jax.vjp(lambda q, k, v: operator(q, k, v, *rest), q, k, v)
        return o, *pull(do)

    return jax.jit(run)


def operators(batch: int, length: int) -> Iterator[tuple[str, Callable[..., Array], list, float]]:
    """Name, operator, its further arguments, tiles visited by one head."""
    dense_tiles = length // TILE * (length // TILE + 1) / 2
    if jax.default_backend() == "gpu":
        cudnn = functools.partial(
            jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
        )
        yield "cudnn dense", cudnn, [], dense_tiles

    def dense(q: Array, k: Array, v: Array) -> Array:
        return cast(Array, flash_attention(q, k, v))

    yield "our dense", dense, [], dense_tiles
    q, key = inputs(batch, length)[0], jax.random.key(1)
    for buckets in (16, 64):

        def hashed(q: Array, k: Array, v: Array, key: Array, buckets: int = buckets) -> Array:
            return sparse.hash_sparse_attention(q, k, v, num_buckets=buckets, key=key)

        codes = sparse.hash_rows(q, sparse.hash_matrix(key, HEADS, WIDTH, buckets))
        plan = jax.jit(functools.partial(sparse.plan_hash, k_hashes=None, num_buckets=buckets))
        yield f"hash nb={buckets}", hashed, [key], mean_tiles(plan(codes))
    for dropped in (0.25, 0.5, 0.75):
        capacity = min(length, int((1 - dropped) * length) + 256)
        keep = [
            jax.random.uniform(key, (batch, length, HEADS)) >= dropped
            for key in jax.random.split(key)
        ]
        sizes = {"capacity_q": capacity, "capacity_k": capacity}
        plan = jax.jit(functools.partial(sparse.plan_drop, **sizes))(*keep)
        drop = functools.partial(sparse.qk_sparse_attention, **sizes)
        yield f"drop {dropped}", drop, keep, mean_tiles(plan)


def mean_tiles(plan: sparse.Plan) -> float:
    """Tiles visited, per head."""
    return float(sparse.visited_tiles(plan, TILE).mean())


def compare(batch: int, length: int, only: str) -> Iterator[dict[str, Any]]:
    """One row per operator; ratios are to the first, cuDNN where there is a GPU.

    Beside the first, operators whose name lacks `only` are left out.
    """
    q, k, v, do = inputs(batch, length)
    dense = None
    for name, operator, rest, tiles in operators(batch, length):
        if dense is not None and only not in name:
            continue
        forward = time_ms(jax.jit(operator), q, k, v, *rest)
        total = time_ms(both(operator), q, k, v, do, *rest)
        dense = dense or (forward, total)
        yield {
            "operator": name,
            "forward_ms": forward,
            "forward_backward_ms": total,
            "speedup_forward": dense[0] / forward,
            "speedup_forward_backward": dense[1] / total,
            "tiles": tiles,
        }


def pieces(batch: int, length: int, buckets: int = 16) -> Iterator[dict[str, Any]]:
    """One row per piece of a hash-sparse call."""
    q, k, v, do = inputs(batch, length)
    matrix = sparse.hash_matrix(jax.random.key(1), HEADS, WIDTH, buckets)
    codes = sparse.hash_rows(q, matrix)
    by_head = jnp.swapaxes(codes, 1, 2)
    plan_of = jax.jit(functools.partial(sparse.plan_hash, k_hashes=None, num_buckets=buckets))
    plan = plan_of(codes)

    def general_sort(codes: Array) -> Array:
        time = jax.lax.broadcasted_iota(jnp.int32, codes.shape, 2)
        return jax.lax.sort(codes * length + time, is_stable=False) % length

    def move_all(q: Array, k: Array, v: Array, plan: sparse.Plan) -> tuple[Array, ...]:
        moved = [row_moves.move(x, plan.k_source, plan.k_slot) for x in (k, v)]
        return row_moves.move(q, plan.q_source, plan.q_slot), *moved

    def attend(q: Array, k: Array, v: Array, lo: Array, hi: Array) -> Array:
        return cast(Array, flash_attention(q, k, v, causal=False, lo=lo, hi=hi))

    moved = jax.jit(move_all)(q, k, v, plan)
    do = jax.jit(row_moves.move)(do, plan.q_source, plan.q_slot)
    limits = (plan.lo, plan.hi)
    for name, function, args in (
        ("hash q", jax.jit(sparse.hash_rows), (q, matrix)),
        ("order by counting, with intervals", plan_of, (codes,)),
        ("order by a general sort, without", jax.jit(general_sort), (by_head,)),
        ("invert the order", jax.jit(lambda s: row_moves.invert(s, length)), (plan.q_slot,)),
        ("move q, k and v", jax.jit(move_all), (q, k, v, plan)),
        ("copy q, k and v", jax.jit(lambda *x: [-y for y in x]), (q, k, v)),
        ("attend, forward", jax.jit(attend), (*moved, *limits)),
        ("attend, forward and backward", both(attend), (*moved, do, *limits)),
    ):
        yield {"piece": name, "ms": time_ms(function, *args)}


def main() -> None:
    """Time, print, and write one file of rows per length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--tokens", type=int, default=TOKENS, help="batch x length")
    parser.add_argument("--only", default="", help="names of operators to time, as a substring")
    parser.add_argument("--parts", action="store_true", help="the pieces of a hash-sparse call")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the rows")
    options = parser.parse_args()
    name = "sparse_parts" if options.parts else "sparse"
    chosen = "".join(c if c.isalnum() else "_" for c in options.only and f"_{options.only}")
    for length in options.lengths:
        batch = max(1, options.tokens // length)
        shape = {"batch": batch, "length": length, "heads": HEADS, "width": WIDTH}
        rows = []
        measured = pieces(batch, length) if options.parts else compare(batch, length, options.only)
        for row in measured:
            rows.append(shape | row)
            numbers = (f"{x:.3f}" if isinstance(x, float) else x for x in row.values())
            print(f"{batch} x {length}", *numbers, flush=True)
            write_rows(options.out / f"{name}_{length}{chosen}.jsonl", rows)


if __name__ == "__main__":
    main()
