"""The program that benchmarks time beside a forward."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array


def with_gradients(attend: Callable[..., Any]) -> Callable[..., tuple[Array, ...]]:
    """(q, k, v, do, *rest) -> (o, dq, dk, dv) of `attend(q, k, v, *rest)`."""

    def both(q: Array, k: Array, v: Array, do: Array, *rest: Any) -> tuple[Array, ...]:
        o, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *rest), q, k, v)
        return o, *pull(do)

    return both
