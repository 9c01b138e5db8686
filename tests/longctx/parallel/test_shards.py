import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from longctx.parallel import Layout, shards
from longctx.parallel.shards import Shards
from tests.longctx.parallel.cases import documents

LENGTH = 48


def shards_of(rank, monkeypatch, kind="zigzag", ranks=3, **options):
    monkeypatch.setattr(Shards, "rank", lambda _: jnp.int32(rank))
    return Shards("seq", ranks, Layout(kind, ranks), LENGTH, **options)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("zigzag", {}),
        ("zigzag", {"causal": False}),
        ("zigzag", {"window": 20}),
        ("contiguous", {}),
        ("contiguous", {"window": 11}),
    ],
)
@pytest.mark.parametrize(("cuts", "early"), [(0, 8), (3, 8), (3, 6), (3, 11)])
def test_rows_that_wait_see_both_blocks_and_late_rows_the_one_that_came(
    monkeypatch, rank, kind, options, cuts, early
):
    one = shards_of(rank, monkeypatch, kind, **options)
    cuts = cuts if one.causal else 0
    positions = one.layout.order(LENGTH).reshape(3, -1)
    own, other = positions[rank], positions[rank - 1]
    doc_start = documents(1, LENGTH, cuts)
    documents_of = jnp.asarray(doc_start[:, own]) if cuts else None
    order, mask = one.joint_block(1, documents_of, early)
    pieces = np.concatenate([own, other]).reshape(4, -1)
    keys = pieces[np.asarray(order)].reshape(-1)
    lo, hi = np.asarray(mask["lo"])[0], np.asarray(mask["hi"])[0]
    for row, at in enumerate(own):
        there = np.concatenate([own, other]) if row < early else other
        seen = (there <= at) if one.causal else there >= 0
        seen &= there > at - (one.window or LENGTH + 1)
        seen &= there >= doc_start[0, at]
        assert sorted(keys[lo[row] : hi[row]]) == sorted(there[seen]), row


def test_half_the_rows_wait_where_the_others_hide_the_first_move(monkeypatch):
    monkeypatch.setattr(shards, "HIDING", 12)
    assert shards_of(0, monkeypatch).early_rows(2, 64) == 8
    assert shards_of(0, monkeypatch, "contiguous").early_rows(2, 64) == 8
    assert shards_of(0, monkeypatch).early_rows(1, 64) == 0  # too short a block
    assert shards_of(0, monkeypatch, "contiguous", window=11).early_rows(2, 64) == 0
    assert shards_of(0, monkeypatch, "striped").early_rows(2, 64) == 0
    assert shards_of(0, monkeypatch, ranks=1).early_rows(4, 64) == 0
    assert Shards("seq", 4, Layout("zigzag", 2), LENGTH).early_rows(8, 64) == 0


@pytest.mark.parametrize(("platform", "rows"), [("gpu", 8192), ("tpu", 0)])
def test_rows_that_wait_are_whole_tiles_on_gpus_and_none_on_tpus(platform, rows):
    device = AbstractDevice("NVIDIA H200", None, platform)
    one, half, odd = (Shards("seq", 2, Layout("zigzag", 2), n) for n in (32768, 33024, 32800))
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        assert {one.early_rows(1, width) for width in (64, 80, 320)} == {rows}
        assert half.early_rows(1, 80) == 0  # no whole tiles of keys
        assert half.early_rows(1, 320) == rows  # half a tile of rows does not wait
        assert odd.early_rows(1, 80) == 0
