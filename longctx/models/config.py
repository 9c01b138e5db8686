"""What a model is: frozen dataclasses of numbers and names, JSON-friendly."""

import dataclasses
from collections.abc import Sequence
from typing import get_args

from longctx.attention.tensorized import Order, Positions, Variant
from longctx.errors import UserError
from longctx.nn.lightning import Gate
from longctx.nn.mlp import Activation
from longctx.nn.norm import NormKind
from longctx.nn.position import NO_SCALING, RopeScaling
from longctx.nn.sparse import KeyNorm
from longctx.nn.stack import Gather, Remat
from longctx.parallel.context import Strategy
from longctx.parallel.lasp import Exchange
from longctx.parallel.layout import Kind, Layout

MIXERS = ("lightning", "softmax", "window", "tied", "hash", "drop", "tensorized")
POSITIONS = ("mix", "lrpe_d", "exp_decay", "lrpe", "absolute")
SLOPES = ("alibi", "printed")
DTYPES = ("bfloat16", "float16", "float32", "float64")


def _choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")


def _positive(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")


@dataclasses.dataclass(frozen=True)
class LightningConfig:
    """The gated linear attention of a model's "lightning" layers."""

    num_heads: int = 8  # heads; the paper fills the width with them
    head_dim: int = 128  # features per head (paper)
    # mix: LRPE-d in layer 0, decay elsewhere (paper's choice); lrpe_d: both everywhere; exp_decay:
    # decay alone; lrpe: rotation alone; absolute: neither (learned table)
    position: str = "mix"
    slopes: str = "alibi"  # of the decays: alibi (author code) or printed (the papers' formula)
    temperature: bool = True  # slower decay in later layers (paper)
    gate: Gate = "linear"  # of the output: linear (paper), sigmoid (MiniMax-01) or off
    activation: Activation = "silu"  # of q and k (paper)
    value_activation: Activation = "none"  # of v (paper: none; MiniMax-01: silu)
    norm: NormKind = "srms"  # after attention, over all heads together (paper)
    norm_eps: float = 1e-6  # of that norm (author code, also MiniMax-01's)

    def __post_init__(self) -> None:
        _positive(self, "num_heads", "head_dim")
        _choice("position", self.position, POSITIONS)
        _choice("slopes", self.slopes, SLOPES)


@dataclasses.dataclass(frozen=True)
class SoftmaxConfig:
    """The attention of a model's "softmax", "window" and "tensorized" layers.

    Of "tied", "hash" and "drop" layers, which have no rotation, it gives the heads.
    """

    num_heads: int = 8  # query heads
    num_kv_heads: int = 8  # key/value heads, a divisor of num_heads
    head_dim: int = 128  # features per head
    rope: bool = True  # rotary positions
    rope_base: float = 10000.0  # paper of RoPE; larger for long contexts (Llama 3: 500000)
    rope_fraction: float = 1.0  # share of each head's features that is rotated
    rope_scaling: RopeScaling = NO_SCALING  # stretches wavelengths beyond the trained length
    qk_norm: bool = False  # RMSNorm of each head's q and k
    window: int = 1024  # tokens seen in "window" layers; "softmax" layers see all

    def __post_init__(self) -> None:
        _positive(self, "num_heads", "num_kv_heads", "head_dim", "window")


@dataclasses.dataclass(frozen=True)
class SparseConfig:
    """What "tied", "hash" and "drop" layers add: keys are normalised queries (2306.01160)."""

    key_norm: KeyNorm = "head"  # author code: head in sparse models, all in the dense baseline
    num_buckets: int = 16  # "hash": paper, at 8192 tokens; 512 tokens a bucket
    drop: float = 0.3  # "drop": of queries and of keys (paper: 0.3, 0.5, 0.7)


@dataclasses.dataclass(frozen=True)
class TensorizedConfig:
    """What "tensorized" layers add to the softmax attention's numbers (2410.20926)."""

    dims: tuple[int | None, ...] = (512, None)  # fast to slow; None: as long as needed (ours)
    # What a hop may see (ours: the paper's causal rule could not be verified).
    variant: Variant = "mixed_radix"
    order: Order = "slow_first"  # in which the dimensions are mixed (ours)
    # What RoPE sees: digit, distances along the dimension; global, distances in tokens (ours).
    positions: Positions = "digit"
    self_bias: float | None = 4.0  # ours: initial score of a token with itself; None: none


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    """The channel mixer of every layer."""

    kind: str = "glu"  # "glu": gated linear unit; "mlp": two layers
    width: int = 2816  # hidden features
    activation: Activation = "none"  # glu: none is SGLU (paper), silu is SwiGLU; mlp: gelu is usual
    # Tokens of a device whose hidden features exist at once, recomputed in the backward; 0: all.
    chunk: int = 0

    def __post_init__(self) -> None:
        _positive(self, "width")
        _choice("mlp kind", self.kind, ("glu", "mlp"))
        if self.chunk < 0:
            raise ValueError(f"mlp chunk={self.chunk} must not be negative")


@dataclasses.dataclass(frozen=True)
class ResidualConfig:
    """How a sublayer f joins the stream x: alpha x + beta f(norm(x)), as (alpha, beta)."""

    lightning: tuple[float, float] = (1.0, 1.0)  # of lightning mixers
    softmax: tuple[float, float] = (1.0, 1.0)  # of all other mixers
    mlp: tuple[float, float] = (1.0, 1.0)
    post_norm: bool = False  # MiniMax-01: alpha y + beta f(y) with y = norm(x)


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the devices along the mesh axis `seq` share one sequence."""

    strategy: Strategy = "auto"  # of softmax layers: `context_attention`
    states: Exchange = "all_gather"  # of lightning layers: `context_lightning`
    layout: Kind = "contiguous"  # order of tokens; zigzag balances causal attention
    head_groups: int = 1  # rings over parts of the heads, one after another, to save memory
    ranks: int = 0  # of the layout, for "usp" (Ulysses inside a rank); 0: one per device
    fsdp_over_seq: bool = False  # split projections' parameters and moments over `seq`, too
    gather: Gather = "layer"  # weights so split: for each "layer" anew, or once a "step" for all

    def __post_init__(self) -> None:
        _choice("gather", self.gather, get_args(Gather))
        if self.gather == "step" and not self.fsdp_over_seq:
            raise ValueError("gather='step' needs fsdp_over_seq, weights that are split over `seq`")

    @property
    def token_layout(self) -> Layout | Kind:
        """The order of tokens, as `context_attention` and `as_layout` take it."""
        return Layout(self.layout, self.ranks) if self.ranks else self.layout


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model; the defaults are TNL-385M."""

    vocab_size: int = 50272  # tokens; an early release of the authors has so many, later ones 64000
    width: int = 1024  # of the residual stream
    num_layers: int = 24  # blocks of a token mixer and a channel mixer
    # Pattern of token mixers, repeated over the layers (for instance seven lightning, one softmax):
    # lightning, softmax, window, tied, hash, drop, tensorized
    mixers: tuple[str, ...] = ("lightning",)
    lightning: LightningConfig = LightningConfig()  # of lightning layers
    softmax: SoftmaxConfig = SoftmaxConfig()  # of all other layers
    sparse: SparseConfig = SparseConfig()  # of tied, hash and drop layers
    tensorized: TensorizedConfig = TensorizedConfig()  # of tensorized layers
    mlp: MlpConfig = MlpConfig()  # of every layer
    norm: NormKind = "srms"  # pre-norms and final norm: srms (paper), rms, layer
    norm_eps: float = 1e-6  # added to the mean square (author code)
    residual: ResidualConfig = ResidualConfig()  # weights of what each layer adds
    learned_positions: int = 0  # rows of a learned absolute position table; 0: none
    tied_head: bool = True  # output embedding is the input's (author code; counts agree)
    scale_embedding: bool = True  # multiply embeddings by sqrt(width) (author code, v1 models)
    init_std: float = 0.02  # normal(0, 0.02) for all weights, no residual scaling (author code)
    dtype: str = "bfloat16"  # of computation (paper)
    param_dtype: str = "float32"  # of parameters (ours)
    remat: Remat = "none"  # what backward recomputes: none, block (all), dots (all but products)
    unroll: bool = False  # compile each layer on its own: slower to compile, may be faster to run

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "width", "num_layers")
        for name in ("dtype", "param_dtype"):
            _choice(name, getattr(self, name), DTYPES)
        if not self.mixers:
            raise ValueError("mixers=() must name at least one mixer")
        for mixer in self.mixers:
            _choice("mixer", mixer, MIXERS)
        absolute = "lightning" in self.mixers and self.lightning.position == "absolute"
        if absolute and not self.learned_positions:
            raise ValueError("position='absolute' needs learned_positions, the table's rows")

    def check_length(self, length: int, name: str = "length") -> None:
        """Raise UserError if so many tokens have no learned position; `name` says what they are."""
        if self.learned_positions and length > self.learned_positions:
            rows = self.learned_positions
            raise UserError(f"{name}={length} exceeds model.learned_positions={rows}")

    def layer_kinds(self) -> tuple[str, ...]:
        """Kind of each layer: its mixer, with "+lrpe" where q and k are rotated."""
        kinds = [self.mixers[i % len(self.mixers)] for i in range(self.num_layers)]
        everywhere = self.lightning.position in ("lrpe_d", "lrpe")
        first = self.lightning.position == "mix"
        return tuple(
            "lightning+lrpe" if k == "lightning" and (everywhere or (first and i == 0)) else k
            for i, k in enumerate(kinds)
        )


def periods(kinds: Sequence[str]) -> tuple[tuple[tuple[str, ...], int], ...]:
    """Layers as (period, repeats), so that each period is compiled once.

    Greedy: at each step the period whose repeats cover the most layers, the shortest on a tie.
    Twenty-four layers a b b ... b give ((a,), 1), ((b,), 23).
    """
    result, rest = [], tuple(kinds)
    while rest:
        best, repeats = rest[:1], 1
        for size in range(1, len(rest) // 2 + 1):
            period, count = rest[:size], 1
            while rest[count * size : (count + 1) * size] == period:
                count += 1
            if count > 1 and count * size > len(best) * repeats:
                best, repeats = period, count
        result.append((best, repeats))
        rest = rest[len(best) * repeats :]
    return tuple(result)
