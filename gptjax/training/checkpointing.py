"""TODO docstring."""

from __future__ import annotations

from pathlib import Path

from gptjax.checkpoints.workdir import fault, read_meta, steps_in
from gptjax.config.build import changes, from_stored
from gptjax.config.errors import UserError
from gptjax.config.schema import Config


def check_same_run(workdir: Path, config: Config, fingerprints: dict[str, str]) -> None:
    """Refuses to continue a run whose numbers would change, and names each difference."""
    for step in reversed(steps_in(workdir / "checkpoints")):
        if fault(workdir / "checkpoints" / str(step), ("meta/",)):
            continue  # `restore` will name it
        meta = read_meta(workdir / "checkpoints" / str(step))
        rows = changes(from_stored(meta["config"]), config)
        rows += [
            f"{name}: the {what} changed since the run began"
            for name, what in _FINGERPRINTS.items()
            if meta.get(name, "") != fingerprints[name]
        ]
        if not rows:
            return
        shown = "\n  ".join(rows if len(rows) <= 4 else [*rows[:3], f"and {len(rows) - 3} more"])
        raise UserError(
            f"{workdir} holds a run with other settings (old -> new):\n  {shown}\nUse the old ones, or another --workdir."
        )


_FINGERPRINTS = {
    "data": "text or its split",
    "tokenizer": "vocabulary",
    "base": "checkpoint under the adapters",
}
