"""The models: sizes, decoding against full passes, scanning, ablation switches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.models import (
    MODELS,
    LightningConfig,
    ParallelConfig,
    count_parameters,
    without_gate,
)
from longctx.models.config import SparseConfig, TensorizedConfig, periods
from tests.harness import assert_close
from tests.longctx.models.tiny import CONFIGS, TINY, abstract_model, tiny_model

TOKENS = jax.random.randint(jax.random.key(0), (2, 12), 0, TINY.vocab_size)

# Millions, vocabulary 50272, embedding tied: research table of the released configurations.
MILLIONS = {"tnl-385m": 384.93, "tnl-1b": 992.15, "tnl-3b": 2875.97, "tnl-7b": 6780.49}


@pytest.mark.parametrize("name", MILLIONS)
def test_sizes_are_the_papers(name):
    assert round(count_parameters(MODELS[name]) / 1e6, 2) == MILLIONS[name]


def test_ablations_have_the_papers_sizes():
    base = MODELS["tnl-385m"]
    assert round(count_parameters(without_gate(base)) / 1e6) == 379
    absolute = dataclasses.replace(
        base,
        lightning=dataclasses.replace(base.lightning, position="absolute"),
        learned_positions=1024,
    )
    assert round(count_parameters(absolute) / 1e6) == 386


# As the released checkpoints hold them.
RELEASED = {
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "open-llama-3b": 3_426_473_600,
}


@pytest.mark.parametrize("name", RELEASED)
def test_llama_shapes_have_the_released_sizes(name):
    assert count_parameters(MODELS[name]) == RELEASED[name]


def test_our_readings_have_the_sizes_in_their_names():
    for name, billions in {"tnl-15b": 15, "tnl-175b": 175}.items():
        assert round(count_parameters(MODELS[name]) / 1e9) == billions
    for size in ("385m", "1b", "3b", "7b"):
        softmax, linear = (count_parameters(MODELS[f"{m}-{size}"]) for m in ("transformer", "tnl"))
        assert abs(softmax / linear - 1) < 0.01


SPARSE = dataclasses.replace(  # two repeats of a period of two layers
    TINY,
    num_layers=4,
    mixers=("tensorized", "hash"),
    sparse=SparseConfig(num_buckets=2),
    tensorized=TensorizedConfig(dims=(4, None)),
)


@pytest.mark.parametrize("config", ["tnl", "transformer", "hybrid", "gpt2", SPARSE])
def test_decoding_equals_a_full_pass(config):
    """Prompts of unequal length, continued in two pieces, then token by token."""
    model = tiny_model(config)
    full = jax.jit(lambda tokens: model.logits(model(tokens)))(TOKENS)
    prefill, decode = jax.jit(model.prefill), jax.jit(model.decode)
    lengths = np.array([4, 2])
    cache = model.init_cache(2, 12)
    logits, cache = prefill(TOKENS[:, :4], lengths, cache)
    assert_close(logits, full[np.arange(2), lengths - 1], 2e-6)
    following = np.stack([TOKENS[0, 4:8], TOKENS[1, 2:6]])
    logits, cache = prefill(following, np.array([1, 4]), cache)
    lengths = lengths + np.array([1, 4])
    assert_close(logits, full[np.arange(2), lengths - 1], 2e-6)
    for _ in range(5):
        logits, cache = decode(TOKENS[np.arange(2), lengths], cache)
        assert_close(logits, full[np.arange(2), lengths], 2e-6)
        lengths = lengths + 1
    np.testing.assert_array_equal(cache.length, lengths)


def test_the_recurrent_cache_does_not_grow_with_the_context():
    def size(config, length):
        model = abstract_model(config)
        cache = jax.eval_shape(lambda: model.init_cache(1, length))
        return sum(x.size for x in jax.tree.leaves(cache))

    assert size("tnl", 16) == size("tnl", 1 << 20)
    assert size("transformer", 32) > 1.9 * size("transformer", 16)


def test_decoding_holds_the_cache_once():
    config = dataclasses.replace(CONFIGS["transformer"], num_layers=8)
    graph, state = nnx.split(abstract_model(config))
    cache = jax.eval_shape(lambda: abstract_model(config).init_cache(1, 8192))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))

    def run(state, token, cache):
        def step(carry, _):
            token, cache = carry
            logits, cache = nnx.merge(graph, state).decode(token, cache)
            return (jnp.argmax(logits, axis=-1).astype(jnp.int32), cache), token

        return jax.lax.scan(step, (token, cache), None, length=4)

    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = jax.jit(run, donate_argnums=2).lower(state, token, cache).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * held


def loss_and_gradients(config, model):
    _, params, rest = nnx.split(model, nnx.Param, ...)
    graph = nnx.graphdef(abstract_model(config))

    @jax.jit
    def run(params):
        def loss(params):
            model = nnx.merge(graph, params, rest)
            return jnp.mean(jax.nn.logsumexp(model.logits(model(TOKENS)), -1))

        return jax.value_and_grad(loss)(params)

    return run(params)


def test_scanning_and_rematerialisation_change_nothing():
    base = dataclasses.replace(TINY, num_layers=3)
    model = tiny_model(base)
    want = loss_and_gradients(base, model)
    for change in ({"unroll": True, "remat": "block"}, {"remat": "dots"}):
        got = loss_and_gradients(dataclasses.replace(base, **change), model)
        assert_close(got, want, 1e-5, str(change))


def test_rematerialisation_saves_memory():
    config = dataclasses.replace(TINY, num_layers=8)

    def bytes_needed(remat):
        model = abstract_model(dataclasses.replace(config, remat=remat))
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, rest, tokens):
            return jnp.sum(nnx.merge(graph, params, rest)(tokens) ** 2)

        tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)
        compiled = jax.jit(jax.grad(loss)).lower(params, rest, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_needed("block") < 0.5 * bytes_needed("none")


@pytest.mark.parametrize("name", ["tnl", "hybrid"])
def test_the_program_does_not_grow_with_depth(name):
    def size(layers):
        config = dataclasses.replace(CONFIGS[name], num_layers=layers)
        graph, state = nnx.split(abstract_model(config))
        run = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
        return len(run.lower(state, TOKENS).as_text())

    assert abs(size(32) - size(8)) < 0.01 * size(8)


LIGHTNING_SWITCHES = [
    {"position": "lrpe_d"},
    {"position": "exp_decay"},
    {"position": "lrpe"},
    {"slopes": "printed"},
    {"temperature": False},
    {"gate": "off"},
    {"gate": "sigmoid"},
    {"activation": "none"},
    {"activation": "elu1"},
    {"value_activation": "silu"},
    {"norm": "layer"},
]
SWITCHES = [
    *({"lightning": dataclasses.replace(TINY.lightning, **s)} for s in LIGHTNING_SWITCHES),
    {
        "lightning": dataclasses.replace(TINY.lightning, position="absolute"),
        "learned_positions": 16,
    },
    {"mlp": dataclasses.replace(TINY.mlp, activation="silu")},
    {"norm": "layer"},
    {"scale_embedding": False},
    {"tied_head": False},
    {"mixers": ("softmax",)},
]


def switch_name(change: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in change.items())[:120]


@pytest.mark.parametrize("change", SWITCHES, ids=switch_name)
def test_every_switch_changes_the_output(change):
    model, base = tiny_model(dataclasses.replace(TINY, **change)), tiny_model(TINY)
    outputs = [jax.jit(lambda t, m=m: m.logits(m(t)))(TOKENS[:1, :4]) for m in (model, base)]
    assert jnp.max(jnp.abs(outputs[0] - outputs[1])) > 1e-3


def test_rms_norm_differs_from_srms_norm_once_its_weight_moves():
    config = dataclasses.replace(TINY, norm="rms")
    assert count_parameters(config) == count_parameters(TINY) + (2 * TINY.num_layers + 1) * 16


def test_periods_cover_the_layers_and_find_the_pattern():
    hybrid = (("l",) * 7 + ("s",)) * 10
    assert periods(hybrid) == ((("l",) * 7 + ("s",), 10),)
    assert periods(("a",) + ("b",) * 23) == ((("a",), 1), (("b",), 23))
    mixed = ("a", *hybrid[1:])
    assert [k for period, n in periods(mixed) for k in period * n] == list(mixed)
    assert sum(len(period) for period, _ in periods(mixed)) < 20


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: dataclasses.replace(TINY, mixers=()), "mixers"),
        (lambda: dataclasses.replace(TINY, mixers=("conv",)), "conv"),
        (lambda: dataclasses.replace(TINY, width=0), "width"),
        (lambda: LightningConfig(position="rope"), "rope"),
        (lambda: ParallelConfig(fsdp_over_seq=True, gather="once"), "gather='once'"),
        (lambda: ParallelConfig(gather="step"), "needs fsdp_over_seq"),
        (
            lambda: dataclasses.replace(TINY, lightning=LightningConfig(position="absolute")),
            "learned_positions",
        ),
        (lambda: tiny_model("gpt2")(jnp.zeros((1, 33), jnp.int32)), "33"),
        (lambda: tiny_model("gpt2").init_cache(1, 33), "33"),
    ],
)
def test_impossible_requests_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
