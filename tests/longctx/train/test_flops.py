import dataclasses

import jax
import pytest

from longctx.models import LightningConfig, MlpConfig, ModelConfig, SoftmaxConfig
from longctx.train.flops import device_peak, forward_flops, step_flops

MODEL = ModelConfig(
    vocab_size=100,
    width=32,
    num_layers=2,
    lightning=LightningConfig(num_heads=2, head_dim=8),
    softmax=SoftmaxConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=3),
    mlp=MlpConfig(width=48),
)
MLP_AND_HEAD = 2 * (2 * 3 * 32 * 48) + 2 * 32 * 100


def changed(**fields):
    return dataclasses.replace(MODEL, **fields)


def test_lightning_counts_the_recurrence_and_not_the_length():
    # Five projections 32 x 16; a state of 8 x 8 per head written and read, 16 x 8 with LRPE.
    projections = 2 * 2 * 5 * 32 * 16
    states = 4 * 2 * (16 * 8) + 4 * 2 * (8 * 8)
    assert forward_flops(MODEL, 64) == MLP_AND_HEAD + projections + states
    assert forward_flops(MODEL, 4096) == forward_flops(MODEL, 64)


def test_causal_attention_counts_the_keys_that_are_seen():
    model = changed(mixers=("softmax",))
    projections = 2 * 2 * (2 * 32 * 32 + 2 * 32 * 16)
    scores = 2 * 4 * 32 * (1 + 2 + 3 + 4 + 5) / 5
    assert forward_flops(model, 5) == pytest.approx(MLP_AND_HEAD + projections + scores)


def test_a_window_counts_no_more_than_its_width():
    full, window = changed(mixers=("softmax",)), changed(mixers=("window",))
    saved = forward_flops(full, 5) - forward_flops(window, 5)
    assert saved == pytest.approx(2 * 4 * 32 * ((1 + 2 + 3 + 4 + 5) - (1 + 2 + 3 + 3 + 3)) / 5)
    assert forward_flops(full, 3) == forward_flops(window, 3)


def test_variants():
    no_gate = changed(lightning=dataclasses.replace(MODEL.lightning, gate="off"))
    assert forward_flops(MODEL, 8) - forward_flops(no_gate, 8) == 2 * 2 * 32 * 16
    plain = changed(mlp=MlpConfig(kind="mlp", width=48))
    assert forward_flops(MODEL, 8) - forward_flops(plain, 8) == 2 * 2 * 32 * 48


def test_a_step_is_three_forward_passes():
    assert step_flops(MODEL, 8, 40) == 3 * 40 * forward_flops(MODEL, 8)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks for a CPU")
def test_no_peak_is_claimed_for_a_cpu():
    assert device_peak(jax.devices()[0]) is None
