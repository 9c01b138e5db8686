"""The two published families of decay slopes, as `log_decay` = -slope per head."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def printed_log_decay(
    heads: int, layer: int, layers: int, *, temperature: bool = True
) -> Float[Array, "H"]:
    """The papers' printed slopes: -(8 h / H) (1 - l / L) for h = 0..H-1, l = `layer` in 0..L-1.

    Head 0 never decays. `temperature=False` drops the layer's factor. Source: arXiv 2405.17381
    eq. 10 and arXiv 2307.14995 eq. 2; the index origins, which print leaves open, follow
    flash-linear-attention.

    Raises:
      ValueError: a count is below 1, or `layer` is not in 0..layers-1.
    """
    _check(heads, layer, layers)
    factor = 1 - layer / layers if temperature else 1.0
    return jnp.asarray(-8 * np.arange(heads) / heads * factor, jnp.float32)


def alibi_log_decay(
    heads: int, layer: int, layers: int, *, temperature: bool = True
) -> Float[Array, "H"]:
    """The slopes of the authors' released code: -a_h (1 - l / (L-1) + 1e-5), l = `layer`.

    a_h = 2^(-8 (h+1) / H), h = 0..H-1, where H is a power of two. Otherwise the slopes of the
    next lower power of two P come first, then every second one of 2P. A single layer has factor
    1 + 1e-5. `temperature=False` drops the layer's factor. Source: OpenNLPLab's TransNormerLLM
    and MiniMax-01 (arXiv 2501.08313); a_h is ALiBi's (arXiv 2108.12409).

    Raises:
      ValueError: a count is below 1, or `layer` is not in 0..layers-1.
    """
    _check(heads, layer, layers)
    lower = 2 ** math.floor(math.log2(heads))
    slopes = np.concatenate([_power_of_two(lower), _power_of_two(2 * lower)[::2]])[:heads]
    factor = 1 - layer / max(layers - 1, 1) + 1e-5 if temperature else 1.0
    return jnp.asarray(-slopes * factor, jnp.float32)


def _power_of_two(heads: int) -> np.ndarray:
    return 2.0 ** (-8 * np.arange(1, heads + 1) / heads)


def _check(heads: int, layer: int, layers: int) -> None:
    if heads < 1 or layers < 1:
        raise ValueError(f"{heads=} and {layers=} must be at least 1")
    if not 0 <= layer < layers:
        raise ValueError(f"{layer=} must be in 0..{layers - 1}")
