"""Choose the backend of a kernel family, or explain why the named one cannot serve a call."""

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jax import lax

# Backends that exist for one platform only, by the name under which XLA lowers for it.
PLATFORMS = {"tpu": "tpu", "gpu": "cuda"}


def check_backend(backend: str, modules: Mapping[str, ModuleType], spec: Any) -> None:
    """Raise unless `backend` is "auto" or names a module that can serve `spec`.

    Raises:
      ValueError: the name is unknown.
      NotImplementedError: the named backend cannot serve this call; the message says why and
        which backends can. A named backend never falls back to another.
    """
    if backend == "auto":
        return
    if backend not in modules:
        raise ValueError(f"{backend=} must be one of {['auto', *modules]}")
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
