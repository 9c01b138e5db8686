"""The optimizer of a run."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from longctx.train.config import OptimConfig

# Names, in the last part of a parameter's path, of the matrices that weight decay pulls to zero.
DECAYED = frozenset({"kernel", "table"})


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of the step after `count` others: a linear rise to the peak, then the decay.

    The first step already moves (peak / warmup_steps); the last one of a cosine has the final
    rate, and with "inverse_sqrt" step n has peak * sqrt(warmup_steps / n).
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    rise = optax.linear_schedule(0.0, peak, warmup)
    if config.decay == "inverse_sqrt":
        first = max(warmup, 1)

        def fall(count: jax.typing.ArrayLike) -> jax.Array:
            return peak * jnp.sqrt(first / (count + first))
    else:
        fall = optax.cosine_decay_schedule(
            peak, max(steps - warmup, 1), alpha=config.final_fraction
        )
    joined = optax.join_schedules([rise, fall], [warmup])
    return lambda count: joined(count + 1)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW (1711.05101) on the schedule."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=_decay_mask,
        ),
    )


def _decay_mask(params: Any) -> Any:
    def decays(path: tuple[Any, ...], _: Any) -> bool:
        names = {getattr(entry, "key", getattr(entry, "name", None)) for entry in path}
        return not DECAYED.isdisjoint(names)

    return jax.tree_util.tree_map_with_path(decays, params)
