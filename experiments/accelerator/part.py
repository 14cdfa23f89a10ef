"""What every part of the run is told, and how its results leave its process."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# Takes a part's results so far. Called as soon as there is more, so that a part which is stopped
# loses nothing that it has measured.
Save = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    rehearse: bool  # at toy size on a CPU
    seconds: float  # that the part may take

    @property
    def has_torch(self) -> bool:
        return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def write_json(path: Path, value: Any) -> None:
    """Complete or not at all."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def what_went_wrong(error: Exception) -> str:
    """One line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])[:300]
