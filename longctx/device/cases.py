"""What `longctx check-device` checks: every feature of the two kernel families, once.

An operator is called with the name of a backend and with arrays. All floating arrays are
differentiated, unless the operator is one that has no derivative.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.flash_attention import block_backward, block_forward, flash_attention
from pallas_kernels.lightning_attention import (
    alibi_log_decay,
    lightning_attention,
    lightning_dstate,
    lightning_state,
    lightning_step,
)


@dataclasses.dataclass(frozen=True)
class Check:
    """One configuration of an operator.

    Attributes:
      operator: (backend, *arrays) -> outputs.
      shapes: heads and width of q, k and v.
      lightning: whether a decay and an initial state follow q, k and v.
      kv_length: length of k and v over that of q.
      gradients: whether the operator is differentiable.
      timed: whether it is worth a time: what compiles longer is not.
    """

    name: str
    operator: Callable[..., Any]
    shapes: tuple[tuple[int, int], ...]
    dtype: str = "bfloat16"
    lightning: bool = False
    kv_length: float = 1.0
    gradients: bool = True
    timed: bool = False

    def draw(self, length: int, batch: int) -> list[jax.Array]:
        """Random q, k, v and, for lightning attention, log_decay and state."""
        keys = jax.random.split(jax.random.key(0), 4)
        lengths = (length, *(round(length * self.kv_length),) * 2)
        arrays = [
            jax.random.normal(key, (batch, n, *shape)).astype(self.dtype)
            for key, n, shape in zip(keys, lengths, self.shapes, strict=False)
        ]
        if self.lightning:
            heads = self.shapes[0][0]
            state = (batch, heads, self.shapes[1][1], self.shapes[2][1])
            arrays += [alibi_log_decay(heads, 0, 2), jax.random.normal(keys[3], state)]
        return arrays


def checks() -> list[Check]:
    """Every feature once, and every width that the kernels are made for in every dtype."""
    found = []
    for dtype in ("bfloat16", "float16", "float32"):
        for width in (64, 128, 256):
            timed = dtype == "bfloat16" or width == 128
            check = functools.partial(Check, dtype=dtype, timed=timed)
            same = ((4, width),) * 3
            found += [
                check(f"lightning, width {width}", _lightning, same, lightning=True),
                check(f"flash, width {width}", _flash, same),
            ]
    return [*found, *_lightning_checks(), *_flash_checks()]


def _lightning_checks() -> list[Check]:
    check = functools.partial(Check, lightning=True)
    same = ((4, 128),) * 3
    return [
        check("lightning, D 256, E 128", _lightning, ((4, 256), (4, 256), (4, 128))),
        check("lightning, D 192, E 96", _lightning, ((4, 192), (4, 192), (4, 96))),
        check("lightning, two heads in all", _lightning, ((1, 128),) * 3),
        check("lightning, packed", functools.partial(_lightning, packed=True), same),
        check("lightning, final state alone", _final_state, same),
        check("lightning, cotangent of the state alone", _dstate, same, gradients=False),
        check("lightning, decoding", _decode, same),
    ]


def _flash_checks() -> list[Check]:
    def check(name: str, shapes: Any = ((4, 128),) * 3, kv_length: float = 1.0, **options: Any):
        operator = functools.partial(_flash, **options)
        return Check(f"flash, {name}", operator, shapes, kv_length=kv_length)

    return [
        check("width 96", ((4, 96),) * 3),
        check("D 192, E 64", ((4, 192), (4, 192), (4, 64))),
        check("grouped heads", ((4, 128), (2, 128), (2, 128))),
        check("one key head", ((4, 64), (1, 64), (1, 64))),
        check("not causal", causal=False),
        check("window", window=100),
        check("soft cap, scale", soft_cap=5.0, scale=0.1),
        check("more keys, offset", kv_length=1.5, offset=True),
        check("fewer keys", kv_length=0.5, causal=False),
        check("packed", packed=True),
        check("any intervals", ((4, 128), (2, 128), (2, 128)), scattered=True, causal=False),
        check("deterministic", deterministic=True),
        Check("flash, two hops of a ring", _two_hops, ((4, 128),) * 3, gradients=False),
    ]


def _lightning(backend: str, q, k, v, log_decay, state, *, packed: bool = False) -> Any:
    return lightning_attention(
        q,
        k,
        v,
        log_decay,
        state=state,
        doc_start=_documents(q) if packed else None,
        return_state=True,
        backend=backend,
    )


def _final_state(backend: str, q, k, v, log_decay, state) -> Any:
    del q
    return lightning_state(k, v, log_decay, state=state, backend=backend)


def _dstate(backend: str, q, k, v, log_decay, state) -> Any:
    del k, state
    return lightning_dstate(q, v, log_decay, backend=backend)


def _decode(backend: str, q, k, v, log_decay, state) -> Any:
    """The first token; `lightning_step` is the same on every platform."""
    if backend == "reference":
        o, state = _lightning(backend, q[:, :1], k[:, :1], v[:, :1], log_decay, state)
        return o[:, 0], state
    return lightning_step(q[:, 0], k[:, 0], v[:, 0], log_decay, state)


def _flash(
    backend: str,
    q,
    k,
    v,
    *,
    offset: bool = False,
    packed: bool = False,
    scattered: bool = False,
    **options: Any,
) -> Any:
    if offset:
        options["q_offset"] = k.shape[1] - q.shape[1]
    if packed:
        options["lo"] = _documents(q)
    if scattered:
        options["lo"], options["hi"] = _scattered(q, k.shape[1])
    return flash_attention(q, k, v, return_lse=True, backend=backend, **options)


def _two_hops(backend: str, q, k, v) -> Any:
    """Forward with a carry and backward into sums, over the keys in two blocks."""
    half = k.shape[1] // 2
    blocks = [(slice(half), 0), (slice(half, None), -half)]
    how = functools.partial(dict, causal=True, backend=backend)
    carry = None
    for keys, offset in blocks:
        carry = block_forward(q, k[:, keys], v[:, keys], carry=carry, **how(q_offset=offset))
    assert carry is not None
    o, lse = carry
    do = v  # as good as any
    delta = jnp.einsum("bthe,bthe->bht", do.astype(o.dtype), o, precision="highest")
    dq, dk, dv = (jnp.ones(x.shape, o.dtype) for x in (q, k, v))
    found = []
    for keys, offset in blocks:
        before = (dq, dk[:, keys], dv[:, keys])
        dq, *dk_dv = block_backward(
            q, k[:, keys], v[:, keys], do, lse, delta, accumulate=before, **how(q_offset=offset)
        )
        found.append(dk_dv)
    return o, lse, dq, *(jnp.concatenate(x, axis=1) for x in zip(*found, strict=True))


def _documents(q: Array, size: int = 300) -> Int[Array, "B T"]:
    """Documents of `size` tokens: where each token's begins."""
    position = jnp.arange(q.shape[1], dtype=jnp.int32)
    return jnp.broadcast_to(position // size * size, q.shape[:2])


def _scattered(q: Array, kv_length: int) -> tuple[Int[Array, "B H T"], Int[Array, "B H T"]]:
    """Intervals without order: some rows see nothing, some one key, columns have gaps."""
    batch, length, heads, _ = q.shape
    start, size = jax.random.split(jax.random.key(2))
    shape = (batch, heads, length)
    lo = jax.random.randint(start, shape, 0, kv_length, jnp.int32)
    sizes = jnp.asarray([0, 1, 20, kv_length // 3], jnp.int32)
    return lo, lo + sizes[jax.random.randint(size, shape, 0, len(sizes), jnp.int32)]
