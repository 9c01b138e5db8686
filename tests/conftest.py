"""Strict JAX settings for every test: they turn whole classes of silent faults into errors.

Tests run on eight CPU devices, or compiled on the accelerator where the machine has an NVIDIA
driver or JAX_PLATFORMS names one. Most of their time is compiling: on CPUs programs are hardly
optimized, here and in the processes that tests start.
"""

import os
import shutil

if "JAX_PLATFORMS" not in os.environ and shutil.which("nvidia-smi") is None:
    os.environ["JAX_PLATFORMS"] = "cpu"
if os.environ.get("JAX_PLATFORMS") == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Commands run here in a process whose devices are in use: too late to ask for a cluster."""
    monkeypatch.setattr("longctx.commands.join", lambda config: None)


@pytest.fixture
def strict_dtypes():
    """No implicit dtype promotion; for operators only, since optax relies on promotion."""
    with jax.numpy_dtype_promotion("strict"):
        yield
