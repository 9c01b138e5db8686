"""How parameters are made of the tensors of a checkpoint, and taken apart again."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

type Path = tuple[Any, ...]  # names and indices, as in an `nnx.State`


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One layer's value of a parameter from `names`, tensors of a checkpoint, and back."""

    names: tuple[str, ...]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    split: Callable[[np.ndarray], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Source:
    """A parameter: one recipe, or one per repeat of its segment, stacked on a leading axis."""

    recipes: tuple[Recipe, ...]
    stacked: bool


def same(name: str) -> Recipe:
    """The tensor as it is."""
    return Recipe((name,), lambda xs: xs[0], lambda x: [x])


def kernel(name: str) -> Recipe:
    """A weight [out, in] as our kernel [in, out]."""
    return Recipe((name,), lambda xs: xs[0].T, lambda x: [x.T])


def kernels(*names: str) -> Recipe:
    """Several weights [out, in] as one fused kernel [in, n, out]."""
    return Recipe(
        names,
        lambda xs: np.stack([x.T for x in xs], axis=1),
        lambda x: [x[:, i].T for i in range(len(names))],
    )


def fused(name: str, parts: int) -> Recipe:
    """A weight [parts * out, in] as our kernel [in, parts, out]."""
    return Recipe(
        (name,),
        lambda xs: xs[0].T.reshape(xs[0].shape[1], parts, -1),
        lambda x: [x.reshape(x.shape[0], -1).T],
    )
