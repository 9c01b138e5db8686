"""Generation: the same tokens as full forward passes, row by row, and sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.generate import Sampling, generate, sample
from tests.longctx.models.tiny import tiny_model

PROMPTS = jax.random.randint(jax.random.key(1), (3, 9), 0, 50)
LENGTHS = jnp.array([9, 1, 5])


def full_forward(forward, prompt, count):
    """Greedy tokens by running the whole sequence again for each; zeros wait behind them."""
    tokens, length = np.zeros((1, 15), np.int32), len(prompt)
    tokens[0, :length] = prompt
    for i in range(length, length + count):
        tokens[0, i] = np.argmax(forward(tokens)[0, i - 1])
    return tokens[0, length : length + count]


@pytest.mark.parametrize("name", ["tnl", "hybrid"])
def test_greedy_tokens_are_those_of_full_forward_passes(name):
    model = tiny_model(name)
    forward = jax.jit(lambda tokens: model.logits(model(tokens)))
    out = generate(model, PROMPTS, LENGTHS, max_new_tokens=6)
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        np.testing.assert_array_equal(out[row], full_forward(forward, prompt[:length], 6))


def test_a_sampled_row_does_not_depend_on_its_neighbours():
    model = tiny_model("tnl")
    keys = jax.random.split(jax.random.key(3), 3)
    options = {"max_new_tokens": 8, "sampling": Sampling(temperature=1.5, top_p=0.9)}
    together = generate(model, PROMPTS, LENGTHS, keys=keys, **options)
    for row in range(3):
        one = slice(row, row + 1)
        alone = generate(model, PROMPTS[one], LENGTHS[one], keys=keys[one], **options)
        np.testing.assert_array_equal(together[row], alone[0])
    assert len(np.unique(together)) > 4


def test_stop_ends_a_row():
    model = tiny_model("tnl")
    free = generate(model, PROMPTS, LENGTHS, max_new_tokens=8)
    stop = int(free[0, 2])
    stopped = generate(model, PROMPTS, LENGTHS, max_new_tokens=8, stop=stop)
    for free_row, row in zip(np.asarray(free), np.asarray(stopped), strict=True):
        ends = np.flatnonzero(free_row == stop)
        end = ends[0] if len(ends) else 8
        np.testing.assert_array_equal(row[:end], free_row[:end])
        assert (row[end:] == stop).all()


def test_tokens_that_the_tokenizer_lacks_are_not_drawn():
    model = tiny_model("tnl")
    free = generate(model, PROMPTS, LENGTHS, max_new_tokens=8)
    size = int(free.max())
    assert generate(model, PROMPTS, LENGTHS, max_new_tokens=8, vocab_size=size).max() < size


def test_sampling_follows_the_distribution():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.broadcast_to(jnp.log(probabilities), (4000, 4))
    keys = jax.random.split(jax.random.key(0), 4000)

    def frequencies(**options):
        drawn = sample(logits, Sampling(**options), keys)
        return np.bincount(drawn, minlength=4) / 4000

    np.testing.assert_allclose(frequencies(temperature=1.0), probabilities, atol=0.03)
    squared = probabilities**2 / (probabilities**2).sum()
    np.testing.assert_allclose(frequencies(temperature=0.5), squared, atol=0.03)
    nucleus = np.array([0.625, 0.375, 0, 0])
    np.testing.assert_allclose(frequencies(temperature=1.0, top_p=0.8), nucleus, atol=0.03)
    np.testing.assert_array_equal(frequencies(temperature=1.0, top_p=0.4), [1, 0, 0, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"lengths": jnp.array([0, 1, 2])}, "lengths"),
        ({"lengths": jnp.array([10, 1, 2])}, "lengths"),
        ({"sampling": Sampling(temperature=1.0)}, "keys"),
    ],
)
def test_bad_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model("tnl"), PROMPTS, **{"max_new_tokens": 1, **options})


def test_bad_sampling_is_refused():
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=-1.0)
    with pytest.raises(ValueError, match="top_p"):
        Sampling(top_p=0.0)
