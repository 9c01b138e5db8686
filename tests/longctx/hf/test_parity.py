"""Logits of imported checkpoints against those that PyTorch transformers computed (fixtures/)."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from longctx.hf import load_hf
from longctx.models import build

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "minimax"])
def test_logits_equal_those_of_transformers(name):
    config, params = load_hf(FIXTURES / name)
    model = build(dataclasses.replace(config, dtype="float32"), rngs=nnx.Rngs(0))
    nnx.update(model, params)
    with np.load(FIXTURES / name / "logits.npz") as expected:
        with jax.default_matmul_precision("highest"):
            logits = np.asarray(model.logits(model(expected["tokens"])))
        error = np.abs(logits - expected["logits"]).max() / np.abs(expected["logits"]).max()
    assert error <= 1e-4, error
