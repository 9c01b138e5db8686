"""Choose the backend of a kernel family, or explain why the named one cannot serve a call."""

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
from jax import lax

# Backends that exist for one platform only, by the name under which XLA lowers for it.
PLATFORMS = {"tpu": "tpu", "gpu": "cuda"}
HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def target() -> Any:
    """The device being compiled for, as far as it is known: `platform`, `device_kind`."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.local_devices()[0]


def not_hopper() -> str | None:
    """Why kernels for Hopper GPUs cannot run on the GPU being compiled for, or None."""
    device = target()
    if device.platform != "gpu" or any(name in device.device_kind for name in HOPPER):
        return None
    return f"the kernels are written for Hopper GPUs, not for {device.device_kind}"


def check_name(backend: str, modules: Mapping[str, ModuleType]) -> None:
    """Raise ValueError unless `backend` is "auto" or names a module."""
    if backend not in ("auto", *modules):
        raise ValueError(f"{backend=} must be one of {['auto', *modules]}")


def check_backend(backend: str, modules: Mapping[str, ModuleType], spec: Any) -> None:
    """Raise unless `backend` is "auto" or names a module that can serve `spec`.

    Raises:
      ValueError: the name is unknown.
      NotImplementedError: the named backend cannot serve this call; the message says why and
        which backends can. A named backend never falls back to another.
    """
    check_name(backend, modules)
    if backend == "auto":
        return
    reason = modules[backend].unsupported(spec)
    if reason is not None:
        able = [name for name, m in modules.items() if m.unsupported(spec) is None]
        raise NotImplementedError(f"{backend=} cannot run this call: {reason}; {able} can")


def call(
    name: str,
    backend: str,
    modules: Mapping[str, ModuleType],
    spec: Any,
    /,
    *args: Any,
    **static: Any,
) -> Any:
    """Call `modules[backend].<name>(*args, **static)`.

    With "auto" the choice falls when XLA lowers, by the platform being compiled for: the
    default device is the wrong answer in an ahead-of-time compile. The XLA backend serves
    every platform whose own kernels refuse `spec`.
    """
    if backend != "auto":
        return getattr(modules[backend], name)(*args, **static)
    branches = {
        PLATFORMS[b]: functools.partial(getattr(m, name), **static)
        for b, m in modules.items()
        if b in PLATFORMS and m.unsupported(spec) is None
    }
    default = functools.partial(getattr(modules["xla"], name), **static)
    if not branches:
        return default(*args)
    return lax.platform_dependent(*args, default=default, **branches)
