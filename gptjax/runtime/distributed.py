"""TODO docstring."""

from __future__ import annotations

import os

import jax

from gptjax.config.errors import UserError


def start_distributed(wanted: bool) -> None:
    """Joins the other processes, before any device is touched: from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID where
    they are set (`launch/local.sh`), else, when `wanted`, from what the cluster tells JAX (Cloud TPU, SLURM under srun, Open MPI)."""
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        try:
            count, number = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        except (KeyError, ValueError) as error:
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers too ({error})"
            ) from None
        jax.distributed.initialize(address, count, number)
    elif wanted:
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"--distributed: no cluster found ({(str(error) or repr(error)).splitlines()[0]}); under SLURM start with srun, else set JAX_COORDINATOR_ADDRESS"
            ) from None
