"""What evaluation measures and training minimises."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.nn import chunked_cross_entropy

# What of a batch goes to the device; the rest stays on the host.
MODEL_FIELDS = ("tokens", "targets", "doc_start", "positions")


def token_nll(model: Any, batch: dict[str, Int[Array, "B T"]]) -> Float[Array, "B T"]:
    """Negative log-likelihood in nats of each target of the batch; 0 where the target is -1."""
    hidden = model(batch["tokens"], doc_start=batch["doc_start"], positions=batch["positions"])
    head = model.head().astype(hidden.dtype)
    targets = batch["targets"]
    nll = chunked_cross_entropy(hidden, head, jnp.maximum(targets, 0))
    return jnp.where(targets >= 0, nll, 0.0)
