"""Devices that are not there, to compile for: slices of TPUs, and H100s on one host."""

from collections.abc import Sequence

import jax

from longctx.topologies import topology_devices

# Names of slices by number of devices.
TPUS = {
    "v5e": {4: "v5e:2x2", 8: "v5e:2x4", 16: "v5e:4x4"},
    "v5p": {4: "v5p:2x2x1", 8: "v5p:2x2x2", 16: "v5p:2x2x4"},
    "v6e": {4: "v6e:2x2", 8: "v6e:2x4", 16: "v6e:4x4"},
}


def devices_of(chip: str, count: int) -> Sequence[jax.Device]:
    """`count` devices of the kind "v5e", "v5p", "v6e" or "h100"."""
    return topology_devices(f"h100:{count}" if chip == "h100" else TPUS[chip][count])
