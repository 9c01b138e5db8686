"""Joining the processes of one run: several hosts, or several processes of one."""

import dataclasses
import warnings

import jax

from longctx.errors import UserError

# What `jax.distributed.initialize` says where no cluster is known to it.
NO_CLUSTER = "coordinator_address should be defined"


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """How this process finds the others of the run; on SLURM and TPU pods nothing has to be given.

    Without any of this the cluster is asked (SLURM, Cloud TPU, GKE, Open MPI, Kubernetes jobs),
    and where there is none the run has one process.
    """

    # host:port of process 0, the same in every process, with a port that is free there.
    coordinator: str = ""
    # Processes of the run; 0: as many as the cluster says.
    processes: int = 0
    # Number of this process, from 0; -1: the one that the cluster gives.
    process: int = -1
    # Whether to ask the cluster where no coordinator is given.
    detect: bool = True
    # Seconds without a sign of life after which a process counts as dead, and all others end.
    patience: int = 60

    def __post_init__(self) -> None:
        _, colon, port = self.coordinator.rpartition(":")
        if self.coordinator and not (colon and port.isdecimal()):
            raise ValueError(f"launch.coordinator={self.coordinator} must be host:port")
        if not self.coordinator and (self.processes or self.process >= 0):
            raise ValueError("launch.processes and launch.process need launch.coordinator")
        if self.processes and not self.process < self.processes:
            raise ValueError(
                f"launch.process={self.process} must be less than launch.processes={self.processes}"
            )
        if self.patience < 1:
            raise ValueError(f"launch.patience={self.patience} must be at least 1 second")


def is_primary() -> bool:
    """Whether this is the one process that writes files and speaks to the user."""
    return jax.process_index() == 0


def say(message: str) -> None:
    """Print `message` once, however many processes say it."""
    if is_primary():
        print(message)


def join(config: LaunchConfig) -> None:
    """Meet the other processes of the run; afterwards `jax.devices()` are those of all.

    Must come before anything that uses a device. Does nothing in a process that has joined.

    Raises:
      UserError: the cluster is not understood, or the others were not met in time.
    """
    if jax.distributed.is_initialized() or not (config.coordinator or config.detect):
        return
    with warnings.catch_warnings():
        # A container in Kubernetes without its Python package: as good as no cluster.
        warnings.filterwarnings("ignore", message="Kubernetes environment detected")
        try:
            jax.distributed.initialize(
                config.coordinator or None,
                config.processes or None,
                config.process if config.process >= 0 else None,
                heartbeat_timeout_seconds=config.patience,
                shutdown_timeout_seconds=config.patience,
            )
        except (ValueError, RuntimeError) as error:
            if config.coordinator or NO_CLUSTER not in str(error):
                reason = str(error).partition("\n")[0]
                raise UserError(
                    f"cannot join the other processes of the run: {reason} (one process alone: "
                    "--launch.no-detect)"
                ) from error
