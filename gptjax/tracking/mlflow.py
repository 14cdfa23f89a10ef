"""MLflow: the extra `gptjax[mlflow]`.

Its own environment variables hold: MLFLOW_TRACKING_URI (a server; where it is not set, the SQLite
file `mlflow/mlflow.db` in the workdir, no server needed) and MLFLOW_EXPERIMENT_NAME (`gptjax`). To
see a file: `mlflow ui --backend-store-uri sqlite:///runs/NAME/mlflow/mlflow.db`.
"""

from __future__ import annotations

import json
import os
import time

from gptjax.tracking.base import TrackedRun, stored_run_id

PACKAGE, INSTALL = "mlflow", "pip install 'gptjax[mlflow]'"
_PARAMS_PER_CALL = 100  # what a server accepts
_PARAM_LENGTH = 6000


class MlflowTracker:
    """A run of MLflow, whose id is in the workdir's `mlflow/run_id`: a resumed run continues it."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow.tracking import MlflowClient

        folder = run.workdir / "mlflow"
        folder.mkdir(parents=True, exist_ok=True)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(uri or f"sqlite:///{folder.resolve()}/mlflow.db")
        self._run_id = stored_run_id(folder, lambda: self._create(run))
        self._client.update_run(self._run_id, status="RUNNING")

    def _create(self, run: TrackedRun) -> str:
        """Creates the run, with its settings as parameters. Returns its id."""
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "gptjax"
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(name)
        )
        created = self._client.create_run(experiment_id, run_name=run.workdir.resolve().name)
        params = [
            Param(path, json.dumps(value)[:_PARAM_LENGTH])
            for path, value in run.flat_config.items()
        ]
        for at in range(0, len(params), _PARAMS_PER_CALL):
            chunk = params[at : at + _PARAMS_PER_CALL]
            self._client.log_batch(created.info.run_id, params=chunk)
        return created.info.run_id

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def start(run: TrackedRun) -> MlflowTracker:
    return MlflowTracker(run)
