import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.models import ParallelConfig
from longctx.parallel.mesh import MeshConfig, make_mesh
from longctx.train.optim import make_optimizer, schedule
from longctx.train.step import abstract_state, create_state, make_train_step, put_batch
from tests.longctx.train.runs import TNL, TRANSFORMER, tiny_run

B, T = 16, 24


def some_batch():
    tokens = np.random.default_rng(0).integers(0, 256, (B, T + 1), dtype=np.int32)
    doc_start = np.where(np.arange(T) < 9, 0, 9)[None].repeat(B, 0).astype(np.int32)
    return {
        "tokens": tokens[:, :-1].copy(),
        "targets": tokens[:, 1:].copy(),
        "doc_start": doc_start,
        "positions": np.arange(T, dtype=np.int32) - doc_start,
    }


@functools.cache
def initial(model):
    """The state before the first step, on the host."""
    config = tiny_run("", model)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        return jax.device_get(create_state(config, mesh))


def start(config, mesh):
    """A fresh state, made on the mesh if that has several devices."""
    if mesh.size > 1:
        return create_state(config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    return jax.device_put(initial(config.model), shardings, may_alias=False)


@functools.cache
def trained(config, steps=3):
    """Losses of some steps, the compiled step's HLO, and the step itself with its mesh."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        state, batch = start(config, mesh), put_batch(some_batch(), mesh)
        step = make_train_step(config).lower(state, batch).compile()
        losses = []
        for _ in range(steps):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return losses, step.as_text(), step, mesh


def on_mesh(config, **axes):
    return dataclasses.replace(config, mesh=MeshConfig(**axes))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(TNL, id="tnl"),
        pytest.param(TRANSFORMER, id="transformer", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_give_the_losses_of_one_and_gather_parameters_only(model):
    config = tiny_run("", model)
    losses, hlo, *_ = trained(on_mesh(config, data=2, fsdp=4))
    np.testing.assert_allclose(losses, trained(config)[0], rtol=2e-5)
    moved = re.findall(r"= \(?(.*?)\)? (all-gather|collective-permute)(?:-start)?\(", hlo)
    assert any(kind == "all-gather" for _, kind in moved), "no parameter was split over fsdp"
    # Token ids travel too, to where the embedding's columns lie.
    shapes = [s.split(",") for kinds, _ in moved for s in re.findall(r"f32\[([\d,]+)\]", kinds)]
    assert not [shape for shape in shapes if str(T) in shape]  # T is an axis of activations only


def test_accumulated_slices_give_the_losses_of_the_whole_batch():
    sliced = trained(tiny_run("", accumulation=4))
    np.testing.assert_allclose(sliced[0], trained(tiny_run(""))[0], rtol=2e-5)


@pytest.mark.parametrize(("axes", "most"), [({"fsdp": 8}, 0.2), ({"fsdp": 2, "seq": 4}, 0.4)])
def test_parameters_and_moments_are_split_over_fsdp(axes, most):
    parallel = ParallelConfig(fsdp_over_seq="seq" in axes)
    config = dataclasses.replace(on_mesh(tiny_run(""), **axes), parallel=parallel)
    state = abstract_state(config, make_mesh(config.mesh))
    sizes = {"all": 0, "here": 0}
    for leaf in jax.tree.leaves((state.params, state.moments)):
        sizes["all"] += leaf.size
        sizes["here"] += np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=int)
    assert sizes["here"] < most * sizes["all"]


def test_parameters_stay_in_float32_when_the_model_computes_in_bfloat16():
    config = tiny_run("", dataclasses.replace(TNL, dtype="bfloat16"))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        state = abstract_state(config, mesh)
        traced = make_train_step(config).trace(state, put_batch(some_batch(), mesh))
    products = re.findall(r":(\w+)\[[\d,]*\] = dot_general", str(traced.jaxpr))
    assert "bf16" in products
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


def test_targets_below_zero_do_not_count():
    config = tiny_run("")
    *_, step, mesh = trained(config)
    batch, other = some_batch(), some_batch()
    batch["targets"][:, 5:] = other["targets"][:, 5:] = -1
    other["tokens"][:, 5:] = 7  # nothing after the last target matters
    with jax.set_mesh(mesh):
        losses = [
            float(step(start(config, mesh), put_batch(b, mesh))[1]["loss"]) for b in (batch, other)
        ]
    assert 5 < losses[0] < 6  # near ln 257: a mean over the targets that count
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_schedule():
    optim = tiny_run("").optim
    rate = schedule(optim, 20)
    rates = [float(rate(step)) for step in range(20)]
    np.testing.assert_allclose(rates[:4], 1e-2 * np.arange(1, 5) / 4, rtol=1e-6)
    assert np.all(np.diff(rates[3:]) < 0)
    np.testing.assert_allclose(rates[-1], 1e-3, rtol=1e-5)


def test_inverse_square_root_schedule():
    optim = dataclasses.replace(tiny_run("").optim, decay="inverse_sqrt")
    rate = schedule(optim, 20)
    rates = [float(rate(step)) for step in range(20)]
    steps = np.arange(1, 21)
    want = 1e-2 * np.where(steps < 4, steps / 4, np.sqrt(4 / steps))
    np.testing.assert_allclose(rates, want, rtol=1e-6)
    with pytest.raises(ValueError, match=r"optim\.decay='linear' must be"):
        dataclasses.replace(optim, decay="linear")


def test_matrices_alone_decay():
    optim = dataclasses.replace(tiny_run("").optim, weight_decay=0.5, warmup_steps=0)
    params = {
        "project": {"kernel": jnp.ones((2, 2))},
        "norm": {"weight": jnp.ones((2, 2))},
        "lrpe": {"theta": jnp.ones((2, 2))},
        "embedding": {"table": jnp.ones((2, 2))},
    }
    optimizer = make_optimizer(optim, 10)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    moved = {path[-1].key for path, u in jax.tree.leaves_with_path(updates) if np.any(u)}
    assert moved == {"kernel", "table"}
