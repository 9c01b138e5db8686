"""Models as Hugging Face folders and back: the same configuration, the same parameters."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.errors import UserError
from longctx.hf import from_hf, io, load_hf, save_hf, to_hf
from longctx.models import MODELS, MlpConfig, SoftmaxConfig, build
from longctx.nn.position import RopeScaling
from longctx.parallel.mesh import make_mesh

TNL = dataclasses.replace(MODELS["tnl-tiny"], unroll=False)
LLAMA = dataclasses.replace(
    MODELS["transformer-tiny"],
    unroll=False,
    softmax=dataclasses.replace(
        MODELS["transformer-tiny"].softmax,
        num_kv_heads=2,
        rope_base=500000.0,
        rope_scaling=RopeScaling("llama3", 8.0, 64, 1.0, 4.0),
    ),
    tied_head=False,
)
MISTRAL = dataclasses.replace(
    LLAMA,
    mixers=("window",),
    softmax=dataclasses.replace(LLAMA.softmax, window=16, rope_scaling=RopeScaling()),
)
MINIMAX = dataclasses.replace(
    MODELS["minimax"],
    width=32,
    num_layers=9,
    mixers=("lightning", "lightning", "softmax"),
    lightning=dataclasses.replace(MODELS["minimax"].lightning, num_heads=4, head_dim=16),
    softmax=SoftmaxConfig(num_heads=4, num_kv_heads=2, head_dim=16),
    mlp=MlpConfig(width=48, activation="silu"),
    vocab_size=64,
    dtype="float32",
)
HEADS = ("num_attention_heads", "head_dim")
CASES = {"tnl": TNL, "llama": LLAMA, "mistral": MISTRAL, "minimax": MINIMAX}


def parameters(config):
    return nnx.state(build(config, rngs=nnx.Rngs(0)), nnx.Param)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_roundtrip(name, dtype, tmp_path):
    config = dataclasses.replace(CASES[name], param_dtype=dtype)
    params = parameters(config)
    save_hf(config, params, tmp_path, max_length=128)
    found, loaded = load_hf(tmp_path, make_mesh(fsdp=2, tensor=2), param_dtype=dtype)
    assert from_hf(to_hf(found, 128)) == from_hf(to_hf(config, 128))
    got, want = dict(nnx.to_flat_state(loaded)), dict(nnx.to_flat_state(params))
    assert got.keys() == want.keys()
    for path, variable in want.items():
        np.testing.assert_array_equal(
            np.asarray(got[path][...]), np.asarray(variable[...]), str(path)
        )


def test_loaded_model_computes_the_same(tmp_path):
    params = parameters(LLAMA)
    save_hf(LLAMA, params, tmp_path, max_length=128)
    found, loaded = load_hf(tmp_path)
    tokens = jnp.arange(24)[None] % LLAMA.vocab_size
    outputs = []
    for config, values in ((LLAMA, params), (dataclasses.replace(found, dtype="float32"), loaded)):
        model = build(config, rngs=nnx.Rngs(1))
        nnx.update(model, values)
        outputs.append(model.logits(model(tokens)))
    np.testing.assert_array_equal(*map(np.asarray, outputs))


def test_several_files_and_their_index(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "FILE_BYTES", 100_000)
    params = parameters(LLAMA)
    save_hf(LLAMA, params, tmp_path, max_length=128)
    index = json.loads((tmp_path / io.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert {p.name for p in tmp_path.glob("*.safetensors")} == set(index["weight_map"].values())
    (tmp_path / "consolidated.safetensors").write_bytes(b"another layout of the same weights")
    _, loaded = load_hf(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    gone = max(index["weight_map"].values())
    (tmp_path / gone).unlink()
    with pytest.raises(UserError, match=f"lacks {gone}, named in its"):
        load_hf(tmp_path)


def test_parameters_lie_where_the_mesh_says(tmp_path):
    save_hf(TNL, parameters(TNL), tmp_path, max_length=128)
    _, loaded = load_hf(tmp_path, make_mesh(fsdp=2, tensor=4))
    table = dict(nnx.to_flat_state(loaded))[
        "stack", "periods", 1, "blocks", 0, "mlp", "contract", "kernel"
    ]
    assert len(table[...].sharding.device_set) == 8
    assert table[...].addressable_shards[0].data.size == table[...].size // 8


def test_weights_that_do_not_fit_are_all_named(tmp_path):
    from safetensors.numpy import load_file, save_file

    save_hf(TNL, parameters(TNL), tmp_path, max_length=128)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.channel_mixer.l2.weight"]
    tensors["model.layers.9.surprise"] = np.zeros(3, np.float32)
    tensors["model.layers.0.token_mixer.out_proj.weight"] = np.zeros((2, 3), np.float32)
    save_file(tensors, file)
    with pytest.raises(UserError) as error:
        load_hf(tmp_path)
    message = str(error.value)
    assert "missing: model.layers.1.channel_mixer.l2.weight" in message
    assert "unknown: model.layers.9.surprise" in message
    assert "out_proj.weight (2, 3) (must be (128, 128))" in message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "model_type='bert' cannot be imported"),
        (to_hf(LLAMA, 8) | {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (to_hf(LLAMA, 8) | {"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
        (to_hf(MINIMAX, 8) | {"num_local_experts": 32}, "num_local_experts=32"),
        (to_hf(MINIMAX, 8) | {"num_attention_heads": 6}, "num_attention_heads=6"),
        (to_hf(MINIMAX, 8) | {"layer_types": ["conv"] * 9}, "layer_types=\\['conv'\\]"),
        (to_hf(MINIMAX, 8) | {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"model_type": "llama", **dict.fromkeys(HEADS, 8)}, "needs the setting 'vocab_size'"),
        (to_hf(LLAMA, 8) | {"rope_parameters": {"rope_type": "linear"}}, "setting 'factor'"),
        (to_hf(MINIMAX, 8) | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (to_hf(TNL, 8) | {"linear_use_lrpe_list": [0, 1, 0, 0]}, "linear_use_lrpe_list"),
        (to_hf(LLAMA, 8) | {"hidden_size": "64"}, "'llama' has a wrong type: .*str"),
        (to_hf(LLAMA, 8) | {"rope_parameters": [1]}, "'llama' has a wrong type: .*list"),
        (to_hf(MINIMAX, 8) | {"num_hidden_layers": None}, "has a wrong type"),
    ],
)
def test_what_cannot_be_imported_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        from_hf(config)


def test_broken_files_are_named(tmp_path):
    config, tensors = tmp_path / "config.json", tmp_path / io.SINGLE
    save_hf(LLAMA, parameters(LLAMA), tmp_path, max_length=128)
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{tensors} is not a complete safetensors file"):
        load_hf(tmp_path)
    (tmp_path / io.INDEX).write_text("{}")
    with pytest.raises(UserError, match=r"index\.json lacks 'weight_map'"):
        load_hf(tmp_path)
    config.write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=f"{config}: .* needs the setting 'num_attention_heads'"):
        load_hf(tmp_path)
    for text, message in (('{"model_type": ', "is not JSON"), ("[]", "must hold a JSON object")):
        config.write_text(text)
        for read in (io.is_hf_folder, load_hf):
            with pytest.raises(UserError, match=f"{config} {message}"):
                read(tmp_path)


def test_rope_of_older_and_bare_configurations():
    older = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    without = {key: value for key, value in to_hf(LLAMA, 8).items() if key != "rope_parameters"}
    assert from_hf(without | older).softmax.rope_scaling == RopeScaling("linear", 4.0)
    assert from_hf(without | older).softmax.rope_base == 5e5
    assert from_hf(without).softmax.rope_base == 1e4
    bare = {key: value for key, value in to_hf(MINIMAX, 8).items() if key != "rope_parameters"}
    assert from_hf(bare).softmax.rope_base == 1e6  # their default


def test_what_cannot_be_exported_is_refused(tmp_path):
    for config, message in (
        (MODELS["hybrid-tiny"], "other mixers"),
        (MODELS["minimax"], "rope=\\(True, 0.5\\)"),
        (dataclasses.replace(LLAMA, mixers=("softmax", "window")), "different mixers"),
        (dataclasses.replace(LLAMA, residual=MINIMAX.residual), "residual"),
    ):
        with pytest.raises(UserError, match=message):
            to_hf(config, 8)
    with pytest.raises(UserError, match="has no config"):
        load_hf(tmp_path)
