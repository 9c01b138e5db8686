"""The ring benchmark runs every program it would time, and its rows say what they must."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import lines
from experiments.bench.ring import __main__ as command
from experiments.bench.ring import attention, methods, schedule, trace
from experiments.bench.ring.programs import Case
from experiments.ring_attention.max_context import METHODS
from longctx.errors import UserError
from longctx.provenance import read_rows
from tests.harness import assert_close


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["ring", *map(str, arguments)])
    return module.main()


def options_of(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ring", *map(str, arguments)])
    return command.parse()


def test_every_shape_that_is_claimed_is_among_the_cases(monkeypatch):
    options = options_of(monkeypatch, "--devices", 1, 2, 4, 8)
    ring = set(attention.ideal_cases(options))
    strategies = set(attention.strategy_cases(options, options.devices))
    for which in ("forward", "forward_backward"):
        for length in (32768, 131072):
            assert Case(length, 16, 16, which, "ours") in ring
            for part in ("full", "compute", "communication"):
                assert Case(length, 16, 16, which, "ring", 2, part) in ring
        for heads in ((16, 16), (64, 8)):
            for local in (4096, 8192, 32768):
                assert Case(2 * local, *heads, which, "ours") in strategies
                for strategy in ("ring", "all_gather", "ulysses"):
                    assert Case(2 * local, *heads, which, strategy, 2) in strategies
                for strategy in ("ring", "all_gather", "ulysses", "usp"):
                    assert Case(8 * local, *heads, which, strategy, 8) in strategies
    for case in ring | strategies:
        case.layout.check(case.length, case.devices)


MILLISECONDS = {"full": 4.0, "compute": 3.0, "communication": 2.0}
SMALL = ("--devices", 1, 2, "--per-device", 128, "--totals", 256, "--heads", "2:2", "--smoke")


@pytest.fixture
def clock(monkeypatch):
    """Every program runs once, and takes what its part is said to take."""
    ran = []

    def time_once(program, *args, **_):
        jax.block_until_ready(program(*args))
        took = MILLISECONDS[ran.pop(0)]
        return lambda: took

    monkeypatch.setattr(attention, "timed_batch", time_once)
    for name in ("ideal_cases", "strategy_cases"):
        cases = getattr(attention, name)

        def remember(options, *devices, cases=cases):
            for case in cases(options, *devices):
                ran.append(case.part)
                yield case

        monkeypatch.setattr(attention, name, remember)


def check_errors(rows, sharded):
    (single,) = (row["errors"] for row in rows if row["devices"] == 1 and "errors" in row)
    found = [row["errors"] for row in rows if "errors" in row and row["devices"] == 2]
    assert len(found) == sharded
    for errors in found:
        assert all(errors[x] <= 1.1 * single[x] for x in ("o", "dq", "dk", "dv"))


@pytest.mark.slow
def test_a_ring_is_measured_in_three_parts(monkeypatch, clock, tmp_path):
    assert run(monkeypatch, command, *SMALL, "--groups", "ideal", "--out", tmp_path) == 0
    rows = read_rows(tmp_path / "ring_ideal.jsonl")
    assert [row["of_ideal"] for row in rows if "of_ideal" in row] == [0.5] * 2
    assert [row["of_replicas"] for row in rows if "of_replicas" in row] == [0.5] * 2
    assert [row["overlap"] for row in rows if "overlap" in row] == [(3 + 2 - 4) / 2] * 2
    check_errors(rows, 1)
    assert len(list(lines.ring(rows))) == 7


@pytest.mark.slow
def test_strategies_stand_beside_each_other(monkeypatch, clock, tmp_path):
    assert run(monkeypatch, command, *SMALL, "--groups", "strategies", "--out", tmp_path) == 0
    rows = read_rows(tmp_path / "ring_strategies.jsonl")
    assert [row["of_ideal"] for row in rows if "of_ideal" in row] == [0.5] * 6
    check_errors(rows, 3)
    assert [x.ratio for x in lines.strategies(rows) if x.what.startswith('"auto"')] == [1.0] * 2
    assert (tmp_path / "ring_strategies.png").exists()


@pytest.mark.slow
def test_what_one_of_several_computes_is_measured_on_one(monkeypatch, clock, tmp_path):
    what = ("--groups", "alone", "--ranks", 2, 4, "--heads", "4:4", "--out", tmp_path)
    assert run(monkeypatch, command, *SMALL, *what) == 0
    rows = [r for r in read_rows(tmp_path / "ring_alone.jsonl") if r["part"] == "alone"]
    assert [(row["name"], row["devices"]) for row in rows[:3]] == [
        ("ring", 2), ("all_gather", 2), ("ulysses", 2)
    ]  # fmt: skip
    assert len(rows) == 2 * (3 + 4)
    assert all(row["of_ideal"] == 1 / row["devices"] for row in rows)


@pytest.mark.slow
def test_whole_steps_and_the_longest(monkeypatch, tmp_path):
    what = ("--groups", "training", "longest", "--memory", 1.5e7, "--tries", 2, "--models", "TNL")
    assert run(monkeypatch, command, *SMALL, *what, "--out", tmp_path) == 0
    training = read_rows(tmp_path / "ring_training.jsonl")
    assert [(row["model"], row["devices"]) for row in training] == [("TNL", 1), ("TNL", 2)]
    longest = read_rows(tmp_path / "ring_longest.jsonl")
    assert [row["devices"] for row in longest] == [1, 2]
    assert all(row["length"] == row["devices"] * row["per_device"] for row in longest)
    (faster,), (longer,) = (list(f(r)) for f, r in (
        (lines.ring_training, training), (lines.ring_longest, longest)
    ))  # fmt: skip
    assert faster.ratio == training[1]["of_first"]
    assert longer.ratio == 2 * longest[1]["of_first"]


def test_what_failed_has_its_reason_and_without_time_rows_stay(monkeypatch, tmp_path):
    broken = RuntimeError("out of shape")
    monkeypatch.setattr(attention, "compile_all", lambda todo, *_: [broken for _ in todo])
    out = ("--groups", "ideal", "--out", tmp_path)
    assert run(monkeypatch, command, *SMALL, *out) == 1
    rows = read_rows(tmp_path / "ring_ideal.jsonl")
    assert len(rows) == 10
    assert all(row["failed"] == "RuntimeError: out of shape" for row in rows)
    assert run(monkeypatch, command, *SMALL, *out, "--seconds", 0) == 0
    assert read_rows(tmp_path / "ring_ideal.jsonl") == rows


def test_a_traced_step_is_split_into_computing_moving_and_waiting():
    kernels = [(0, 4, "gemm"), (1, 5, "sweep"), (9, 10, "gemm")]
    reduced = (4, 7, "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)")
    sent = (6, 8, "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)")
    row = trace.spent(
        [trace.Span(1e6 * start, 1e6 * end, name) for start, end, name in (reduced, *kernels, sent)]
    )
    assert (row["whole_ms"], row["computing_ms"], row["idle_ms"]) == (10, 6, 1)
    assert (row["moving_ms"], row["moving_alone_ms"]) == (4, 3)
    assert row["moves"] == {"AllReduce": [1, 3], "SendRecv": [1, 2]}
    assert (row["kernels"], row["kernels_ms"]) == (3, 9)
    assert row["longest_kernels_ms"] == {"gemm": 5, "sweep": 4}


def test_of_several_queued_calls_the_mean_is_taken():
    calls = [trace.Span(start, start + 2e6, "gemm") for start in (0, 4e6)]
    row = trace.spent(calls, 2)
    assert (row["whole_ms"], row["computing_ms"], row["idle_ms"]) == (3, 2, 1)
    assert (row["kernels"], row["longest_kernels_ms"]) == (1, {"gemm": 2})
    case = Case(256, 2, 2, "forward", "ring", 2)
    shown = trace.shown(
        {"group": "timeline", **case._asdict(), "ms": 2.5, "device_number": 1} | row
    )
    assert "2 x    128 2:2" in shown and "GPU 1: 3.0 ms = computing 2.0" in shown


@pytest.mark.slow
@pytest.mark.parametrize("group", ["trace", "timeline"])
def test_only_gpus_have_traces(monkeypatch, tmp_path, group):
    what = ("--groups", group, "--models", "TNL", "--devices", 2, "--per-device", 128, "--smoke")
    what += ("--totals", 256, "--heads", "2:2")
    with pytest.raises(UserError, match="no kernels of GPUs in a trace on cpu"):
        run(monkeypatch, command, *what, "--out", tmp_path)


@pytest.mark.slow
def test_schedules_are_read_once(monkeypatch, tmp_path):
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    what = ("v5e", "--devices", 4, "--heads", "2:2", "--per-device", 256, "--strategies", "ring")
    for _ in range(2):
        run(monkeypatch, schedule, *what, "--out", tmp_path)
    (row,) = read_rows(tmp_path / "ring_schedule_v5e.jsonl")
    assert row["moves"]["collective-permute"]["count"] == 5 * 3  # k, v, twice, and gradients a hop
    assert row["moves"]["collective-permute"]["exposed_bytes"] == 0
    assert row["temporary_bytes"] > 0


@pytest.mark.parametrize("which", ["forward", "forward_backward"])
def test_a_part_has_all_of_the_moves_or_none(which):
    def moves(part):
        case = Case(256, 2, 2, which, "ring", 4, part)
        return case.lower(jax.devices()).compile().as_text().count(" collective-permute(")

    assert moves("communication") == moves("full") > 2
    assert moves("compute") == 0


@pytest.mark.parametrize(
    ("name", "count", "kv_heads"),
    [("ring", 2, 2), ("ring", 4, 1), ("all_gather", 4, 4), ("ulysses", 2, 2), ("usp", 4, 2)],
)
def test_a_part_alone_is_what_one_of_several_devices_computes(name, count, kv_heads):
    """Where all have the same keys and values, what others would send is what a device has."""
    case = Case(64 * count, 4, kv_heads, "forward_backward", name, count)
    alone = case._replace(part="alone")
    key = jax.random.key(0)
    args = [
        jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        for i, x in enumerate(alone.operands(alone.mesh(jax.devices())))
    ]
    everywhere = [
        jax.device_put(jnp.tile(x, (1, count, 1, 1)), like.sharding)
        for x, like in zip(args, case.operands(case.mesh(jax.devices())), strict=True)
    ]
    programs = [c.lower(jax.devices()).compile() for c in (alone, case)]
    got, expected = programs[0](*args), programs[1](*everywhere)
    assert [x.shape for x in got] == [args[i].shape for i in (3, 0, 1, 2)]  # o, dq, dk, dv
    if name in ("ring", "all_gather"):  # o and dq; dk and dv are sums of what others computed
        own = slice(64 * (count // 2), 64 * (count // 2 + 1))
        for x, y in zip(got[:2], expected[:2], strict=True):
            assert_close(np.float32(x), np.float32(y[:, own]), 0.01)
    flops = [program.cost_analysis()["flops"] for program in programs]
    assert flops[0] == pytest.approx(flops[1], rel=0.02)


def test_the_longest_length_lies_between_two_probes():
    quadratic = {n: n * n for n in (64, 128, 256, 512)}
    assert methods.longest(quadratic, 128**2) == 128
    assert methods.longest(quadratic, 200**2) == 128 + 3 * 16  # the chord says 176.9
    assert methods.longest(quadratic, 512**2) == 512
    assert methods.longest(quadratic, 1) == 64
    refused = {256: jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")}  # tried while compiling
    assert methods.longest(quadratic | methods.needed(refused), 200**2) == 128


@pytest.mark.slow
def test_methods_are_tried(monkeypatch, tmp_path):
    what = ("--groups", "methods", "--devices", 1, 2, "--memory", 5e6, "--smoke")
    assert run(monkeypatch, command, *what, "--out", tmp_path) == 0
    rows = read_rows(tmp_path / "ring_methods.jsonl")
    assert [(row["devices"], row["method"]) for row in rows] == [
        (n, m) for n in (1, 2) for m in METHODS if (m, n) != ("ring", 1)
    ]
    assert all(row["ran"] and row["bytes"] <= row["memory_bytes"] for row in rows)
    found = list(lines.ring_methods(rows))
    assert [line.ratio is None for line in found] == [True, False, False, True, False, False, False]
