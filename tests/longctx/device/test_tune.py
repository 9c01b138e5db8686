"""`longctx tune-device`: the best tiles get into the table, and the kernels read them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longctx.cli import main
from longctx.device.tune import (
    TuneOptions,
    Tuner,
    backward_tiles,
    flash_call,
    forward_tiles,
    lightning_call,
    row_tiles,
    state_call,
)
from pallas_kernels import _tuned
from pallas_kernels.flash_attention import tiles as flash
from pallas_kernels.flash_attention.api import make_spec
from pallas_kernels.lightning_attention import tiles as lightning
from tests.topologies import gpu_mesh

KIND = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def options(tmp_path):
    return TuneOptions(tmp_path / "tiles.json", tmp_path / "rows.jsonl", 1, 64, 1, (64, 256))


def on(platform, kind):
    device = AbstractDevice(kind, None, platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def measured(times):
    """A stopwatch for calls in a fixed order; an exception in `times` is raised."""
    left = iter(times)

    def measure(call, arrays):
        found = next(left)
        if isinstance(found, Exception):
            raise found
        return found

    return measure


def test_the_fastest_that_runs_is_chosen(options):
    tuner = Tuner(options, measured([5.0, RuntimeError("too much shared memory"), 3.0, 4.0]))
    assert (
        tuner.best("x", "y", [(lightning.XlaTiles(n), None) for n in (1, 2, 3, 4)], []).chunk == 3
    )
    assert [row.get("ms") for row in tuner.rows] == [5.0, None, 3.0, 4.0]
    assert "shared memory" in tuner.rows[1]["refused"]


def test_gpu_tables_are_read_back(options, monkeypatch):
    # Every later candidate is faster than those before it.
    tuner = Tuner(options, measured(1.0 / n for n in range(1, 100)))
    found = {f"gpu {w}": dataclasses.asdict(tuner.flash_gpu(w)) for w in (64, 256)}
    ticks = measured([0.005, 0.006, 0.010, 0.015, 0.004, 0.007, 1.0])
    prices = Tuner(options, ticks).lightning_prices(4)
    tables = {"flash_attention": found, "lightning_attention": {"gpu": dataclasses.asdict(prices)}}
    _tuned.write_tuned(options.table, "another", {})
    _tuned.write_tuned(options.table, KIND, tables)
    monkeypatch.setattr(_tuned, "PATH", options.table)
    with on("gpu", KIND):
        assert flash.gpu_tiles(64).forward == forward_tiles(64)[-1]["forward"]
        # The last of these is the default, which is tried first.
        assert flash.gpu_tiles(256).rows == row_tiles(256)[-2]["rows"]
        assert flash.gpu_tiles(128) == flash.GPU_TILES[128]
        tuned = lightning.gpu_tiles(16, 512, [2], 2)
    with on("gpu", "another"):
        assert flash.gpu_tiles(64) == flash.GPU_TILES[64]
        default = lightning.gpu_tiles(16, 512, [2], 2)
    assert prices.two_workers == pytest.approx((10 / 4, 15 / 4))  # us, four chunks
    assert prices.segment > 0 and tuned != default


def test_a_table_of_another_version_is_named(options, monkeypatch):
    old = dataclasses.asdict(flash.GPU_TILES[64]) | {"passes": "alone"}
    _tuned.write_tuned(options.table, KIND, {"flash_attention": {"gpu 64": old}})
    monkeypatch.setattr(_tuned, "PATH", options.table)
    with on("gpu", KIND), pytest.raises(ValueError, match=r"tune-device.*together or roles"):
        flash.gpu_tiles(64)
    old["forward"]["run"] = 2
    _tuned.write_tuned(options.table, KIND, {"flash_attention": {"gpu 64": old}})
    with on("gpu", KIND), pytest.raises(ValueError, match=r"gpu 64 = .*tune-device.*'run'"):
        flash.gpu_tiles(64)


def test_tpu_tables_are_read_back(options, monkeypatch):
    options = dataclasses.replace(options, widths=(128,))
    tables = Tuner(options, measured(1.0 / n for n in range(1, 100))).tpu()
    _tuned.write_tuned(options.table, "TPU v6 lite", tables)
    monkeypatch.setattr(_tuned, "PATH", options.table)
    q = jax.ShapeDtypeStruct((1, 8192, 1, 128), jnp.bfloat16)
    with on("tpu", "TPU v6 lite"):
        assert flash.tpu_tiles(make_spec(q, q, q, None)) == flash.TpuTiles(2048, 2048, 512)
        assert lightning.tpu_tiles(128, jnp.bfloat16) == lightning.TpuTiles(256, 2048)


def test_there_is_nothing_to_tune_on_a_cpu(capsys):
    with pytest.raises(SystemExit):
        main(["tune-device"])
    assert "only GPUs and TPUs have tiles to tune, not cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_candidates_for_wide_heads_compile_for_h100():
    x = jax.ShapeDtypeStruct(
        (1, 1024, 2, 256), jnp.bfloat16, sharding=NamedSharding(gpu_mesh({"x": 1}), P())
    )
    default = flash.GPU_TILES[256]
    for part, candidates in (("forward", forward_tiles(256)), ("gradients", backward_tiles(256))):
        for fields in candidates:
            tiles = dataclasses.replace(default, **fields)
            compiled = flash_call("gpu", tiles, part).lower(x, x, x, x).compile()
            assert "mosaic_gpu" in compiled.as_text()


def test_lightning_candidates_lower():
    x = jax.ShapeDtypeStruct((1, 1024, 2, 128), jnp.bfloat16)
    tiles = lightning.GpuTiles(1, 2, 2)
    for call in (lightning_call("gpu", tiles, "forward"), state_call(tiles)):
        lowered = call.trace(x, x, x, x).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()
