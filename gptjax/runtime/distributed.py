"""The start of a process that is one of several."""

from __future__ import annotations

import os

import jax

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
