"""What a strategy costs: bytes, FLOPs and seconds per device, and which one is cheapest."""

import dataclasses
import functools
from collections.abc import Iterable

from longctx.parallel.cost_terms import Call, Cost, Strategy
from longctx.parallel.hardware import HARDWARE, Hardware
from longctx.parallel.layout import Layout
from longctx.parallel.ulysses import kv_copies

TIE = 1.03  # times so close to the least are as good: the model tells no better


def cheapest(costs: Iterable[Cost]) -> Cost:
    """The least time for a forward and a backward; of those as good, the least for the forward.

    A call does not know whether it will be differentiated.
    """
    costs = list(costs)
    good = TIE * min(cost.seconds for cost in costs)
    return min((c for c in costs if c.seconds <= good), key=lambda c: c.forward_seconds)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The strategies that a call allows, the least time first; why others are not."""

    hardware: Hardware
    costs: tuple[Cost, ...]
    refused: dict[Strategy, str]

    @property
    def strategy(self) -> Strategy:
        """What `context_attention(strategy="auto")` does."""
        return cheapest(self.costs).strategy

    def __str__(self) -> str:
        rows = [
            f"{c.strategy:10} fwd {c.forward_seconds * 1e3:9.3f} ms {c.forward_bytes / 1e6:9.1f} MB"
            f"   bwd {c.backward_seconds * 1e3:9.3f} ms {c.backward_bytes / 1e6:9.1f} MB"
            f"   {c.flops / 1e12:.3f} TFLOP"
            + (f"   hidden from {c.overlap_threshold} tokens" if c.overlap_threshold else "")
            for c in self.costs
        ]
        rows += [f"{name:10} {reason}" for name, reason in self.refused.items()]
        return "\n".join([f"per device, one layer, {self.hardware.name}", *rows])


@functools.lru_cache(maxsize=256)
def explain(
    *,
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    key_width: int,
    value_width: int | None = None,
    devices: int,
    layout: Layout,
    causal: bool = True,
    window: int | None = None,
    itemsize: int = 2,
    hardware: Hardware = HARDWARE["H100"],
) -> Explanation:
    """Bytes moved, FLOPs, seconds and overlap threshold of each strategy of `context_attention`.

    Args:
      batch, heads, kv_heads: of one device along the other mesh axes.
      length: of the whole sequence, over `devices` devices in `layout`.
      key_width, value_width: D and E (default D).
      itemsize: bytes of an element of q, k and v.
      hardware: a row of `HARDWARE`, or your own.

    Raises:
      ValueError: the layout does not fit the length and devices.
    """
    layout.check(length, devices)
    call = Call(
        batch, length, heads, kv_heads, key_width, value_width or key_width,
        devices, layout, causal, window, itemsize, hardware,
    )  # fmt: skip
    costs, refused = [call.ring(), call.all_gather()], {}
    swaps: dict[Strategy, int] = {"ulysses": 1, "usp": layout.ranks}
    for name, ranks in swaps.items():
        reason = refusal(name, layout, devices, heads, kv_heads)
        if reason is None:
            costs.append(call.swapped(name, ranks))
        else:
            refused[name] = reason
    return Explanation(hardware, tuple(sorted(costs, key=lambda c: c.seconds)), refused)


def refusal(
    strategy: Strategy, layout: Layout, devices: int, heads: int, kv_heads: int
) -> str | None:
    """Why a strategy cannot serve this layout and these heads; None if it can."""
    if strategy == "ulysses" and not layout.in_order:
        return f"needs tokens in position order, not {layout}: use the contiguous layout"
    if strategy == "usp" and not 1 < layout.ranks < devices:
        return (
            f"needs a Layout with more than 1 and fewer than {devices} ranks (the ring; Ulysses "
            f"runs inside a rank), not {layout}"
        )
    if strategy in ("ulysses", "usp"):
        inner = devices if strategy == "ulysses" else devices // layout.ranks
        try:
            kv_copies(heads, kv_heads, inner)
        except ValueError as error:
            return str(error)
    return None
