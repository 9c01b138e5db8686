"""Sparse flash attention against dense: `python -m experiments.bench.sparse --lengths 8192`.

Forward and forward + backward of causal attention, 16 heads of 64 in bf16: dense by cuDNN (through
jax.nn) and by our own kernel, hash-sparse with 16 and 64 buckets, and 25%, 50%, 75% of queries and
keys dropped. Every sparse time includes hashing, ordering and all row moves; keep masks are given.
Beside the times stand the tiles of 128 x 128 scores each visits, which no hardware changes, and the
kept rows lost to capacities. One arm orders by a general sort instead of by counting.

With --parts the pieces of one hash-sparse call alone: hashing, both ways of ordering, moving q, k
and v, and the attention between them.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from experiments.bench._claims import Claim, claims_table
from experiments.bench._passes import with_gradients
from experiments.bench._timing import time_ms
from longctx.attention import rows as row_moves
from longctx.attention import sparse
from longctx.attention.intervals import Plan, attend, places, plan_drop, plan_hash, visited_tiles
from longctx.device.programs import compile_all
from longctx.provenance import write_rows
from pallas_kernels.flash_attention import flash_attention

TOKENS, HEADS, WIDTH, TILE = 32768, 16, 64, 128
RESULTS = Path(__file__).parent / "results"
# What is aimed at: times as fast as cuDNN, forward + backward, by operator and length.
AIMS = {
    ("hash nb=16", 8192): 2.0, ("hash nb=16", 16384): 3.3, ("hash nb=16", 32768): 5.0,
    ("drop 0.5", 8192): 2.0, ("drop 0.5", 16384): 2.8, ("drop 0.5", 32768): 3.0,
}  # fmt: skip


class Arm(NamedTuple):
    """One operator: `function(q, k, v, *rest)`, the tiles that a head visits, the rows lost."""

    name: str
    function: Callable[..., Array]
    rest: tuple[Array, ...]
    tiles: float
    overflow: int = 0


def inputs(batch: int, length: int, heads: int = HEADS, width: int = WIDTH) -> list[Array]:
    """Random q, k, v and do."""
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (batch, length, heads, width), jnp.bfloat16) for key in keys]


def dense_arms(length: int) -> Iterator[Arm]:
    """cuDNN where there is a GPU, and our own kernel."""
    tiles = -(-length // TILE)
    if jax.default_backend() == "gpu":
        cudnn = functools.partial(
            jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
        )
        yield Arm("cudnn dense", cudnn, (), tiles * (tiles + 1) / 2)

    def dense(q: Array, k: Array, v: Array) -> Array:
        return cast(Array, flash_attention(q, k, v))

    yield Arm("our dense", dense, (), tiles * (tiles + 1) / 2)


def hash_arm(
    buckets: int, hashes: Int[Array, "B T H"], key: Array | None = None, *, strict: bool = True
) -> Arm:
    """Hash-sparse attention; with `key`, which makes `hashes`, hashing is part of the operator."""
    attention = functools.partial(sparse.hash_sparse_attention, num_buckets=buckets, strict=strict)

    def of_hashes(q: Array, k: Array, v: Array, hashes: Array) -> Array:
        return attention(q, k, v, hashes=hashes)

    def of_key(q: Array, k: Array, v: Array, key: Array) -> Array:
        return attention(q, k, v, key=key)

    function, given = (of_hashes, hashes) if key is None else (of_key, key)
    plan = functools.partial(plan_hash, num_buckets=buckets, strict=strict)
    return Arm(f"hash nb={buckets}", function, (given,), _mean_tiles(plan, hashes, None))


def drop_arm(share: float, rows: tuple[int, int, int], key: Array) -> Arm:
    """Dropping a share of queries and keys, rows [B, T, H], with 256 places to spare."""
    capacity = min(rows[1], int((1 - share) * rows[1]) + 256)
    sizes = {"capacity_q": capacity, "capacity_k": capacity}
    keep = tuple(jax.random.uniform(k, rows) >= share for k in jax.random.split(key))
    tiles = _mean_tiles(functools.partial(plan_drop, **sizes), *keep)
    lost = sum(int(sparse.overflow(x, capacity).sum()) for x in keep)
    drop = functools.partial(sparse.qk_sparse_attention, **sizes)
    return Arm(f"drop {share}", drop, keep, tiles, lost)


def _mean_tiles(plan: Callable[..., Plan], *arrays: Array | None) -> float:
    """Tiles a head of the plan of `arrays`, made on the CPU: for a GPU XLA may compile minutes."""
    local = jax.device_put(arrays, jax.local_devices(backend="cpu")[0])
    return float(visited_tiles(jax.jit(plan)(*local), TILE).mean())


def plan_by_sort(hashes: Int[Array, "B T H"]) -> Plan:
    """The tied, strict plan of `plan_hash`, ordered by a general sort."""
    codes = jnp.swapaxes(hashes, 1, 2)
    length = codes.shape[-1]
    time = jax.lax.broadcasted_iota(jnp.int32, codes.shape, 2)
    ordered = jax.lax.sort(codes * length + time, is_stable=False)
    source, bucket = ordered % length, ordered // length
    begins = jnp.diff(bucket, axis=-1, prepend=-1) != 0
    lo = jax.lax.cummax(jnp.where(begins, time, 0), axis=2)
    slot = row_moves.invert(source, length)
    empty = [(0, 0), (0, 0), (0, places(length) - length)]
    q_source = jnp.pad(source, empty, constant_values=length)
    return Plan(q_source, slot, source, slot, jnp.pad(lo, empty), jnp.pad(time, empty))


def sort_arm(buckets: int, hashes: Int[Array, "B T H"], key: Array) -> Arm:
    """`hash_arm` with the order from a general sort."""

    def sorted_hash(q: Array, k: Array, v: Array, key: Array) -> Array:
        matrix = sparse.hash_matrix(key, q.shape[2], q.shape[3], buckets)
        return attend(plan_by_sort(sparse.hash_rows(q, matrix)), q, k, v)

    tiles = _mean_tiles(plan_by_sort, hashes)
    return Arm(f"hash nb={buckets}, general sort", sorted_hash, (key,), tiles)


def arms(batch: int, length: int) -> Iterator[Arm]:
    """Dense first, then what targets are set for, then the rest: a run cut short has those."""
    yield from dense_arms(length)
    q, key, rows = inputs(batch, length)[0], jax.random.key(1), (batch, length, HEADS)
    hashes = {n: sparse.hash_rows(q, sparse.hash_matrix(key, HEADS, WIDTH, n)) for n in (16, 64)}
    yield hash_arm(16, hashes[16], key)
    yield drop_arm(0.5, rows, key)
    yield hash_arm(64, hashes[64], key)
    yield sort_arm(16, hashes[16], key)
    yield drop_arm(0.25, rows, key)
    yield drop_arm(0.75, rows, key)


def compare(batch: int, length: int, only: str) -> Iterator[dict[str, Any]]:
    """One row per operator; ratios are to the first, cuDNN where there is a GPU.

    Beside the first, operators whose name lacks `only` are left out.
    """
    q, k, v, do = inputs(batch, length)
    first, *others = arms(batch, length)
    chosen = [first, *(arm for arm in others if only in arm.name)]
    args = [((q, k, v, *arm.rest), (q, k, v, do, *arm.rest)) for arm in chosen]
    programs = compile_all(
        functools.partial(program.lower, *part)
        for arm, pair in zip(chosen, args, strict=True)
        for program, part in zip(
            map(jax.jit, (arm.function, with_gradients(arm.function))), pair, strict=True
        )
    )
    dense = None
    for arm, pair, forward, total in zip(chosen, args, programs[::2], programs[1::2], strict=True):
        ms = time_ms(forward, *pair[0]), time_ms(total, *pair[1])
        dense = dense or ms
        yield {
            "operator": arm.name,
            "forward_ms": ms[0],
            "forward_backward_ms": ms[1],
            "speedup_forward": dense[0] / ms[0],
            "speedup_forward_backward": dense[1] / ms[1],
            "tiles": arm.tiles,
            "overflow": arm.overflow,
        }


def claims(rows: Sequence[dict[str, Any]]) -> Iterator[Claim]:
    """The aims for the lengths of `rows`, where cuDNN was measured."""
    cudnn = {r["length"] for r in rows if r["operator"] == "cudnn dense"}
    speed = {(r["operator"], r["length"]): r["speedup_forward_backward"] for r in rows}
    for (operator, length), aim in AIMS.items():
        if length in cudnn:
            what = f"{operator}, forward + backward, {length} tokens: times as fast as cuDNN"
            yield Claim(what, speed.get((operator, length)), aim, at_least=True)


def pieces(batch: int, length: int, buckets: int = 16) -> Iterator[dict[str, Any]]:
    """One row per piece of a hash-sparse call."""
    q, k, v, do = inputs(batch, length)
    matrix = sparse.hash_matrix(jax.random.key(1), HEADS, WIDTH, buckets)
    codes = sparse.hash_rows(q, matrix)
    plan_of = jax.jit(functools.partial(plan_hash, k_hashes=None, num_buckets=buckets))
    plan = plan_of(codes)

    def move_all(q: Array, k: Array, v: Array, plan: Plan) -> tuple[Array, ...]:
        moved = [row_moves.move(x, plan.k_source, plan.k_slot) for x in (k, v)]
        return row_moves.move(q, plan.q_source, plan.q_slot), *moved

    def attention(q: Array, k: Array, v: Array, lo: Array, hi: Array) -> Array:
        return cast(Array, flash_attention(q, k, v, causal=False, lo=lo, hi=hi))

    moved = jax.jit(move_all)(q, k, v, plan)
    do = jax.jit(row_moves.move)(do, plan.q_source, plan.q_slot)
    limits = (plan.lo, plan.hi)
    for name, function, args in (
        ("hash q", jax.jit(sparse.hash_rows), (q, matrix)),
        ("order and intervals by counting", plan_of, (codes,)),
        ("order and intervals by a general sort", jax.jit(plan_by_sort), (codes,)),
        ("invert the order", jax.jit(lambda s: row_moves.invert(s, length)), (plan.q_slot,)),
        ("move q, k and v", jax.jit(move_all), (q, k, v, plan)),
        ("copy q, k and v", jax.jit(lambda *x: [-y for y in x]), (q, k, v)),
        ("attend, forward", jax.jit(attention), (*moved, *limits)),
        ("attend, forward and backward", jax.jit(with_gradients(attention)), (*moved, do, *limits)),
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
            numbers = (x if isinstance(x, str) else f"{k} {x:.4g}" for k, x in row.items())
            print(f"{batch} x {length}", *numbers, sep="  ", flush=True)
            write_rows(options.out / f"{name}_{length}{chosen}.jsonl", rows)
        if not options.parts:
            print(claims_table(claims(rows)), flush=True)


if __name__ == "__main__":
    main()
