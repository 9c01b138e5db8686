"""Settings that several architectures share, read from a config.json and written to it."""

from collections.abc import Mapping
from typing import Any

from longctx.errors import UserError
from longctx.models import SoftmaxConfig
from longctx.nn.position import NO_SCALING, RopeScaling


def require(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UserError naming every entry of `found` that is not the wanted one."""
    wrong = [f"{k}={found[k]!r} (must be {v!r})" for k, v in wanted.items() if found[k] != v]
    if wrong:
        raise UserError(f"this model cannot be converted: {', '.join(wrong)}")


def read_softmax(config: Mapping[str, Any], default_base: float = 10000.0) -> SoftmaxConfig:
    """Heads, window and rotary positions; `default_base` where a config.json names none."""
    heads = config["num_attention_heads"]
    base, scaling = _read_rope(config, default_base)
    return SoftmaxConfig(
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rope_base=base,
        rope_scaling=scaling,
        window=config.get("sliding_window") or SoftmaxConfig.window,
    )


def _read_rope(config: Mapping[str, Any], default_base: float) -> tuple[float, RopeScaling]:
    """Base and scaling, from the newer `rope_parameters` or the older pair of fields."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(parameters.get("rope_theta", config.get("rope_theta", default_base)))
    fraction = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    require({"partial_rotary_factor": fraction}, {"partial_rotary_factor": 1.0})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return base, NO_SCALING
    if kind == "linear":
        return base, RopeScaling("linear", parameters["factor"])
    if kind == "llama3":
        return base, RopeScaling(
            "llama3",
            parameters["factor"],
            parameters["original_max_position_embeddings"],
            parameters["low_freq_factor"],
            parameters["high_freq_factor"],
        )
    raise UserError(f"rope_type={kind!r} cannot be imported; default, linear and llama3 can")


def write_softmax(soft: SoftmaxConfig, *, window: bool) -> dict[str, Any]:
    """The inverse of `read_softmax`; `window` says whether layers have one."""
    require(
        {
            "rope": (soft.rope, soft.rope_fraction),
            "qk_norm": soft.qk_norm,
            "rope_scaling is ntk": soft.rope_scaling.kind == "ntk",
        },
        {"rope": (True, 1.0), "qk_norm": False, "rope_scaling is ntk": False},
    )
    rope: dict[str, Any] = {"rope_theta": soft.rope_base, "rope_type": "default"}
    scaling = soft.rope_scaling
    if scaling.kind != "none":
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        rope |= {
            "original_max_position_embeddings": scaling.original_length,
            "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency,
        }
    return {
        "num_attention_heads": soft.num_heads,
        "num_key_value_heads": soft.num_kv_heads,
        "head_dim": soft.head_dim,
        "rope_parameters": rope,
        **({"sliding_window": soft.window} if window else {}),
    }
