"""The benchmark of sparse attention: its arms in their order, and the plan of its general sort."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import sparse
from experiments.bench.sparse import arms, claims, plan_by_sort
from longctx.attention.intervals import plan_hash
from longctx.provenance import read_rows


def test_arms_with_targets_come_first():
    names = [arm.name for arm in arms(1, 256)]
    assert names[:3] == ["our dense", "hash nb=16", "drop 0.5"]
    assert set(names[3:]) == {"hash nb=64", "hash nb=16, general sort", "drop 0.25", "drop 0.75"}


def test_aims_are_judged_where_cudnn_ran():
    def row(operator, length, speedup):
        return {"operator": operator, "length": length, "speedup_forward_backward": speedup}

    rows = [row("cudnn dense", 8192, 1.0), row("hash nb=16", 8192, 1.9), row("drop 0.5", 128, 9.0)]
    hashed, dropped = claims(rows)
    assert (hashed.verdict, dropped.verdict) == ("MISSED", "not measured")
    assert not list(claims(rows[1:]))


def test_a_general_sort_makes_the_same_plan():
    hashes = jax.random.randint(jax.random.key(0), (2, 2100, 3), 0, 6)
    counted = jax.jit(functools.partial(plan_hash, num_buckets=6))(hashes, None)
    ordered = jax.jit(plan_by_sort)(hashes)
    full = counted.q_source < 2100  # what belongs to empty places means nothing
    for name, a, b in zip(counted._fields, counted, ordered, strict=True):
        if name in ("lo", "hi"):
            a, b = jnp.where(full, a, 0), jnp.where(full, b, 0)
        np.testing.assert_array_equal(a, b, name)


def test_rows_of_the_chosen_operators_are_written(tmp_path, monkeypatch):
    given = f"sparse --lengths 128 --tokens 256 --only 0.5 --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", given.split())
    sparse.main()
    (path,) = tmp_path.iterdir()
    assert path.name == "sparse_128_0_5.jsonl"
    dense, dropped = read_rows(path)
    assert (dense["operator"], dropped["operator"]) == ("our dense", "drop 0.5")
    assert (dropped["batch"], dropped["length"]) == (2, 128)
    for name in ("forward", "forward_backward"):
        ratio = dense[f"{name}_ms"] / dropped[f"{name}_ms"]
        np.testing.assert_allclose(dropped[f"speedup_{name}"], ratio)
