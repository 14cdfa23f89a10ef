"""What a process needs that is one of several: its start, and agreement."""

from __future__ import annotations

import os

import jax
import numpy as np

from gptjax.config.errors import UserError


def start_distributed(requested: bool) -> None:
    """Joins the other processes. Call it before anything asks for JAX's devices.

    The cluster is described by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID if
    they are set (`launch/local.sh`); else, if `requested`, by what JAX finds itself (Cloud TPU,
    SLURM under srun, Open MPI). Raises UserError where that is incomplete or there is no cluster.
    """
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        try:
            count, number = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        except (KeyError, ValueError) as error:
            raise UserError(
                "JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be "
                f"numbers too ({error})"
            ) from None
        jax.distributed.initialize(address, count, number)
    elif requested:
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            reason = (str(error) or repr(error)).splitlines()[0]
            raise UserError(
                f"--distributed: no cluster found ({reason}); under SLURM start with srun, else "
                "set JAX_COORDINATOR_ADDRESS"
            ) from None


def of_first_process(value: bool) -> bool:
    """The value that process 0 has, in all processes."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))
