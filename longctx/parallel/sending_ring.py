"""A ring whose kernels move what travels: on GPUs of one process no move is left to XLA.

    forward, rank r, hop t = 0 .. n-1, keys of rank r - t:

        block 0 (own keys) ─ k, v ─▶ block 1 ─ k, v ─▶ ... ─▶ block n-1

    backward, d the sum of the gradients of a block's keys so far:

        block 0 ─ k, v, d ─▶ block 1 ─ k, v, d ─▶ ... ─▶ block n-1 ─ d ─▶ home

A block of the backward adds its part to the sum that came with its keys, in float32, and writes it
to the next device; the last one rounds it and writes it to the device that the keys are of. Each
pass is n kernels, without a sum or a conversion between them.

Sources: arXiv 2310.01889 (ring), 2307.08691 (block gradients from the global lse).
"""

from typing import Any

from jaxtyping import Array

from longctx.parallel.shards import Shards
from pallas_kernels.flash_attention import block_forward, ring_backward, ring_forward, row_delta

type Pair = tuple[Array, Array]


def forward(shards: Shards, doc_start: Array | None, _: Pair, q: Array, kv: Pair) -> Pair:
    """o and lse of this rank's queries."""
    k, v, carry = *kv, None
    for hop in range(shards.hops - 1):
        block = _block(shards, hop, q, doc_start)
        o, lse, k, v = ring_forward(shards.ring(), q, k, v, carry=carry, **block)
        carry = o, lse
    block = _block(shards, shards.hops - 1, q, doc_start)
    return block_forward(q, k, v, carry=carry, out_dtype=q.dtype, **block)


def backward(
    shards: Shards,
    doc_start: Array | None,
    operands: tuple[Array, Pair],
    o: Array,
    lse: Array,
    do: Array,
    dlse: Array,
) -> tuple[Array, Pair]:
    """The gradients of the operands: of q, and of k and v."""
    q, given = operands
    k, v = (x.astype(q.dtype) for x in given)
    rows = do, lse, row_delta(o, lse, do, dlse)
    sums: tuple[Array | None, Array | None, Array | None] = (None, None, None)
    for hop in range(shards.hops - 1):
        block = _block(shards, hop, q, doc_start) | {"out_dtype": lse.dtype, "accumulate": sums}
        dq, dk, dv, k, v = ring_backward(shards.ring(), q, k, v, *rows, keys_travel=True, **block)
        sums = dq, dk, dv
    block = _block(shards, shards.hops - 1, q, doc_start)
    home = shards.ring(1 - shards.hops)
    dq, dk, dv = ring_backward(
        home, q, k, v, *rows, keys_travel=False, accumulate=sums,
        out_dtype=given[0].dtype, **block,
    )  # fmt: skip
    return dq.astype(q.dtype), (dk, dv)


def _block(shards: Shards, hop: int, q: Array, doc_start: Array | None) -> dict[str, Any]:
    """What the kernels of a hop are told of its keys."""
    batch = q.shape[0]
    mask = shards.block(hop, batch, doc_start) if hop else shards.own_block(batch, doc_start)
    return mask | shards.options
