"""Inputs for the tests of the family, and the calls that they compare."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lightning_attention import (
    lightning_attention,
    lightning_dstate,
    lightning_state,
)

# Relative RMS error against the float32 recurrence, for values, states and every gradient.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 5e-3}


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call; widths differ so that a mixed-up axis cannot pass."""

    length: int
    batch: int = 2
    heads: int = 3
    key_width: int = 8
    value_width: int = 12
    dtype: Any = jnp.float32

    def draw(self, seed: int = 0) -> tuple[jax.Array, ...]:
        """Random (q, k, v, log_decay, state); the decays reach from none to a few tokens."""
        random = np.random.default_rng(seed)
        heads = (self.batch, self.length, self.heads)
        q, k = (random.standard_normal((*heads, self.key_width)) for _ in range(2))
        v = random.standard_normal((*heads, self.value_width))
        state = random.standard_normal(
            (self.batch, self.heads, self.key_width, self.value_width), np.float32
        )
        log_decay = -0.7 * np.linspace(0, 1, self.heads, dtype=np.float32) ** 2
        q, k, v = (jnp.asarray(x.astype(self.dtype)) for x in (q, k, v))
        return q, k, v, jnp.asarray(log_decay), jnp.asarray(state)

    def documents(self, seed: int = 0, every: int = 40) -> jax.Array:
        """Random doc_start; the first document of row 0 began before the array."""
        random = np.random.default_rng(seed)
        begins = random.random((self.batch, self.length)) < 1 / every
        begins[:, 0] = np.arange(self.batch) > 0
        starts = np.where(begins, np.arange(self.length), -1)
        return jnp.asarray(np.maximum.accumulate(starts, axis=1), jnp.int32)


@functools.cache
def attend(backend: str, **options: Any) -> Callable[..., Any]:
    """`lightning_attention` with the final state, all arguments positional, jitted once."""

    def run(q, k, v, log_decay, state=None, doc_start=None):
        return lightning_attention(
            q,
            k,
            v,
            log_decay,
            state=state,
            doc_start=doc_start,
            return_state=True,
            backend=backend,
            **options,
        )

    return jax.jit(run)


@functools.cache
def final_state(backend: str) -> Callable[..., Any]:
    """`lightning_state`, all arguments positional, jitted once."""

    def run(k, v, log_decay, state=None, doc_start=None):
        return lightning_state(k, v, log_decay, state=state, doc_start=doc_start, backend=backend)

    return jax.jit(run)


@functools.cache
def initial_cotangent(backend: str) -> Callable[..., Any]:
    """`lightning_dstate`, all arguments positional, jitted once."""

    def run(q, do, log_decay, doc_start=None):
        return lightning_dstate(q, do, log_decay, doc_start=doc_start, backend=backend)

    return jax.jit(run)
