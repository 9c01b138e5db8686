"""Lightning Attention-1, the baseline, computes what Lightning Attention-2 does."""

import functools

import jax
import jax.numpy as jnp
import pytest

from experiments import lines
from experiments.bench._lightning_peers import Shape
from experiments.transnormer.lightning_generations import left_gradients, left_product
from pallas_kernels.lightning_attention import lightning_attention


@pytest.mark.parametrize("block", [16, 48])
def test_the_left_product_is_lightning_attention(block):
    arrays = Shape(2, 48, heads=4, width=8, dtype=jnp.float32).inputs()
    q, k, v, do, log_decay = (arrays[name] for name in ("q", "k", "v", "do", "log_decay"))
    attend = functools.partial(lightning_attention, log_decay=log_decay, backend="reference")
    o, pull = jax.vjp(lambda q, k, v: attend(q, k, v), q, k, v)
    wanted = (o, *pull(do))
    assert jnp.allclose(left_product(q, k, v, log_decay, block), o, atol=1e-4)
    for found, want in zip(left_gradients(q, k, v, do, log_decay, block), wanted, strict=True):
        assert jnp.allclose(found, want, atol=1e-4)


def test_rows_are_read_as_growth_and_beside_what_the_authors_print():
    def row(operator, length, ms):
        row = {"operator": operator, "length": length, "batch": 4}
        return row | {"forward_backward_ms": ms}

    rows = [row("LA2", 512, 1.0), row("LA1", 512, 2.0), row("LA2", 1024, 2.0)]
    rows.append(row("LA1", 1024, 8.0))
    found = {(line.what, line.beside): line for line in lines.lightning_generations(rows)}
    growth = "forward + backward, time per token, 1024 tokens"
    assert found[f"LA2, {growth}", "the same at 512"].ratio == pytest.approx(1.0)
    assert found[f"LA1, {growth}", "the same at 512"].ratio == pytest.approx(2.0)
    ours = "LA2, forward + backward, 4 x 1024"
    assert found[ours, "LA1"].ratio == pytest.approx(0.25)
    assert found[ours, "published, on another GPU"].theirs == "2.920 ms"
