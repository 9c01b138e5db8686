"""The programs that are timed and compiled ahead of time: causal attention, bfloat16, D 128."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from experiments.bench._passes import with_gradients
from experiments.bench.ring.parts import ALONE, only
from longctx.parallel import Layout, context_attention, make_mesh
from pallas_kernels.flash_attention import flash_attention

WIDTH = 128
PASSES = ("forward", "forward_backward")
STRATEGIES = ("ring", "all_gather", "ulysses", "usp")
ONE_DEVICE = ("cudnn", "ours")


class Case(NamedTuple):
    """One program: a sequence over all devices, or by what one device can run one on each."""

    length: int  # of the whole sequence
    heads: int
    kv_heads: int
    which: str  # of PASSES
    name: Any  # of STRATEGIES, or of ONE_DEVICE
    devices: int = 1
    part: str = "full"  # or one of `parts`

    @property
    def replicas(self) -> int:
        """Sequences, of which each lies on devices of its own."""
        return self.devices if self.name in ONE_DEVICE else 1

    @property
    def local(self) -> int:
        """Tokens on a device."""
        return self.length * self.replicas // self.devices

    @property
    def layout(self) -> Layout:
        """The layout in which the strategy has equal work on all devices."""
        return Layout(
            "zigzag", {"ulysses": 1, "usp": self.devices // 2}.get(self.name, self.devices)
        )

    def operator(self) -> Callable[..., Any]:
        """Of q, k and v."""
        if self.name not in ONE_DEVICE:
            attend = functools.partial(context_attention, strategy=self.name, layout=self.layout)
            if self.part == ALONE:
                seq = P(None, "seq")
                attend = jax.shard_map(attend, in_specs=seq, out_specs=seq, check_vma=False)
            return attend
        attend = flash_attention
        if self.name == "cudnn":
            attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
            attend = functools.partial(attend, is_causal=True)
        return jax.shard_map(attend, in_specs=P("seq"), out_specs=P("seq"), check_vma=False)

    def mesh(self, devices: Sequence[jax.Device]) -> Mesh:
        """The first devices of those at hand, along `seq`."""
        return make_mesh(seq=1 if self.part == ALONE else self.devices, devices=devices)

    def operands(self, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
        """Shapes and shardings of q, k, v, do."""
        place = NamedSharding(mesh, P("seq") if self.name in ONE_DEVICE else P(None, "seq"))
        shape = self.replicas, self.local if self.part == ALONE else self.length
        return [
            jax.ShapeDtypeStruct((*shape, heads, WIDTH), jnp.bfloat16, sharding=place)
            for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        ]

    def lower(self, devices: Sequence[jax.Device]) -> jax.stages.Lowered:
        """The program for the first of `devices`: the operator, or it and its gradients."""
        operator, mesh = self.operator(), self.mesh(devices)

        def forward(q: Array, k: Array, v: Array, do: Array) -> Any:
            return operator(q, k, v)

        with jax.set_mesh(mesh), only(self.part, self.devices):
            program = forward if self.which == "forward" else with_gradients(operator)
            return jax.jit(program).lower(*self.operands(mesh))


def heads_pair(text: str) -> tuple[int, int]:
    """ "64:8" as (64, 8)."""
    heads, kv_heads = text.split(":")
    return int(heads), int(kv_heads)
