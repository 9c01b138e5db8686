from pathlib import Path

import numpy as np
import pytest

from experiments.bench.ring.scaling import beside_measured, hardware_then, picked
from longctx.parallel import Layout, explain
from longctx.parallel.hardware import HARDWARE, Hardware
from longctx.provenance import read_rows

RESULTS = Path(__file__).parents[3] / "experiments/bench/results"

CALL = {"batch": 1, "heads": 16, "kv_heads": 16, "key_width": 128, "hardware": HARDWARE["H200"]}


def costs(**options):
    explanation = explain(**CALL | options)
    return explanation, {cost.strategy: cost for cost in explanation.costs}


def test_bytes_and_flops_by_hand():
    length, devices = 4096, 4
    _, by_name = costs(length=length, devices=devices, layout=Layout("zigzag", devices))
    ring, gather = by_name["ring"], by_name["all_gather"]
    shard = length // devices * 16 * 256 * 2
    assert ring.forward_bytes == gather.forward_bytes == 3 * shard
    assert ring.backward_bytes == 3 * (shard + 2 * shard)  # gradients travel in float32
    pairs = length * (length + 1) / 2 / devices
    assert ring.flops == pytest.approx(2 * 16 * 256 * pairs, rel=1e-3)
    assert gather.flops == pytest.approx(ring.flops, rel=1e-3)


def test_layout_decides_the_busiest_rank():
    n = 8
    _, zigzag = costs(length=65536, devices=n, layout=Layout("zigzag", n))
    _, contiguous = costs(length=65536, devices=n, layout=Layout("contiguous", n))
    ratio = contiguous["ring"].flops / zigzag["ring"].flops
    assert ratio == pytest.approx((n - 0.5) / (n / 2), rel=1e-2)  # the triangle's saving is lost
    _, window = costs(length=65536, devices=n, layout=Layout("contiguous", n), window=8192)
    assert window["ring"].forward_bytes == contiguous["ring"].forward_bytes / (n - 1)


def test_threshold_is_where_a_hop_computes_as_long_as_its_keys_travel():
    chip = HARDWARE["H200"]
    layout = Layout("zigzag", 2)
    _, by_name = costs(length=8192, devices=2, layout=layout)
    tokens = by_name["ring"].overlap_threshold
    compute = 2 * 16 * 256 * tokens**2 / 2 / (chip.flops * chip.forward)
    assert compute == pytest.approx(tokens * 16 * 256 * 2 / chip.permute, rel=1e-3)
    _, grouped = costs(length=8192, devices=2, layout=layout, kv_heads=2)
    assert grouped["ring"].overlap_threshold == pytest.approx(tokens / 8, abs=1)


def test_what_auto_picks():
    long, _ = costs(length=2**18, devices=8, layout=Layout("zigzag", 8))
    assert long.strategy == "ring"
    short, _ = costs(length=8192, devices=8, layout=Layout("zigzag", 8), kv_heads=1)
    assert short.strategy == "all_gather"
    in_order, _ = costs(length=65536, devices=8, layout=Layout("contiguous", 8))
    assert in_order.strategy == "ulysses"
    mixed, by_name = costs(length=65536, devices=8, layout=Layout("zigzag", 4))
    assert mixed.strategy == "usp" and "position order" in mixed.refused["ulysses"]
    assert set(by_name) == {"ring", "all_gather", "usp"}
    assert "H200" in str(mixed) and "usp" in str(mixed)


@pytest.mark.parametrize(("name", "count"), [("flash_gpu", 7), ("flash_h200", 6)])
def test_predicts_what_was_measured_on_one_gpu(name, count):
    """Our kernels on an H100 and an H200 within 10%, forward and forward + backward."""
    rows = [
        r for r in read_rows(RESULTS / f"{name}.jsonl")
        if r["implementation"] == "ours" and "forward_ms" in r
        and r["width"] == 128 and not r["window"] and not r["document"]
    ]  # fmt: skip
    assert len(rows) == count
    for row in rows:
        shape = {field: row[field] for field in ("length", "heads", "kv_heads")}
        where = {"devices": 1, "layout": Layout("contiguous"), "hardware": hardware_then(row)}
        ring = costs(batch=row["batch"], **shape, **where)[1]["ring"]
        got = 1e3 * ring.forward_seconds, 1e3 * ring.seconds
        np.testing.assert_allclose(got, (row["forward_ms"], row["both_ms"]), rtol=0.1)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("pair_ideal", 12),  # two H100s
        ("four_ideal", 12),  # four H100s
        ("h200_ideal", 12),  # two H200s
        ("h200_strategies", 48),
        ("h200_pair_alone", 8),
        ("h200_alone", 28),  # one H200, at what each of two and of eight has to do
    ],
)
def test_predicts_what_was_measured(name, count):
    rows = list(beside_measured(read_rows(RESULTS / f"ring_{name}.jsonl")))
    assert len(rows) == count
    for row in rows:
        assert row["ms"] == pytest.approx(row["measured_ms"], rel=0.1), row


def test_auto_is_within_5_percent_of_the_fastest_that_was_measured():
    cells = {}
    for r in read_rows(RESULTS / "ring_h200_strategies.jsonl"):
        if r["devices"] > 1 and "ms" in r:
            cell = (r["devices"], r["length"], r["heads"], r["kv_heads"], r["which"])
            cells.setdefault(cell, {})[r["name"]] = r
    assert len(cells) == 12
    for by_name in cells.values():
        best = min(by_name.values(), key=lambda r: r["ms"])
        assert "H200" in best["device"]
        assert by_name[picked(best)]["ms"] <= 1.05 * best["ms"]


def test_traffic_of_a_ring_by_hand():
    """As counted in the programs that XLA makes for 2, 4 and 5 H100s."""
    chip = Hardware("free but for memory", 1e30, 2.68e12, 1e30, 1e30, latency=0)
    kv = 4096 * 16 * 256 * 2  # bytes; the output has kv and the gradients have 2 kv in float32
    for devices, forward, backward in ((2, 2, 8), (3, 4, 16), (4, 6, 24), (5, 8, 32)):
        layout, length = Layout("zigzag", devices), 4096 * devices
        _, by_name = costs(length=length, devices=devices, layout=layout, hardware=chip)
        ring = by_name["ring"]
        got = ring.forward_seconds * chip.memory, ring.backward_seconds * chip.memory
        np.testing.assert_allclose(got, (forward * kv, backward * kv), rtol=1e-6)


def test_what_a_ring_of_four_waits_for_by_hand():
    """The moves of three hops, and finding the tiles of their blocks."""
    chip = Hardware("slow links", 1e30, 1e30, permute=1e9, exchange=1e30, latency=0, mask=1.0)
    _, by_name = costs(length=16384, devices=4, layout=Layout("zigzag", 4), hardware=chip)
    ring = by_name["ring"]
    kv = 4096 * 16 * 256 * 2 / chip.permute  # seconds; blocks take none
    assert ring.forward_seconds == pytest.approx(3 * kv + 3 * chip.mask, rel=1e-6)
    gradients = 2 * kv  # in float32
    assert ring.backward_seconds == pytest.approx(3 * kv + 3 * gradients, rel=1e-6)


def test_a_ring_between_hosts_goes_through_one_link():
    def of(devices, ranks=None):
        local, layout = 8192, Layout("zigzag", ranks or devices)
        return costs(length=local * devices, devices=devices, layout=layout)[1]

    inside, across = of(8)["ring"], of(16)["ring"]
    assert across.overlap_threshold == pytest.approx(inside.overlap_threshold * 297 / 50, rel=0.01)
    assert across.forward_seconds > 4 * inside.forward_seconds  # twice the hops, and slower ones
    assert of(16)["all_gather"].seconds < across.seconds
    assert of(16, ranks=2)["usp"].seconds < across.seconds
