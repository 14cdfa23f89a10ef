"""What a run shows afterwards: `report.html`, one file that fetches nothing; and `run.json`.

In: what the run left in its workdir. To add a chart, add a row to `_charts`; the page itself is
`templates/report.html`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import jax

import gptjax
from gptjax.config import build, schema
from gptjax.config.errors import UserError
from gptjax.core import cli, files, pages
from gptjax.data.shards import Prepared
from gptjax.tracking import jsonl, progress
from gptjax.training.baselines import baselines
from gptjax.training.charts import Chart, Drawing, Point, draw, make_chart

_THIS_MODEL = "this model"
# Records and copies in a workdir: made anew at each start, they keep no run from going on.
_FILES = ("config.json", "overrides.json", "run.json", jsonl.FILE, "report.html")
_FOLDERS = ("tokenizer", "samples", "tb", "profile")
_SAMPLES = 3  # newest samples on the page


def environment() -> dict[str, Any]:
    """Versions, devices and the git commit, for run.json and the report."""
    try:
        root = Path(gptjax.__file__).parent
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "gptjax": gptjax.__version__,
        "commit": commit,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def clear_way(workdir: Path) -> None:
    """Sets aside what is in the place of the workdir's records and is of another kind, such as a
    folder called `config.json`.
    """
    for name in _FILES:
        if os.path.lexists(workdir / name) and not os.path.isfile(workdir / name):
            files.set_aside(workdir / name, "not a file")
    for name in _FOLDERS:
        if os.path.lexists(workdir / name) and not os.path.isdir(workdir / name):
            files.set_aside(workdir / name, "not a folder")


def read_record(workdir: Path) -> dict[str, Any]:
    """The content of run.json; one that is damaged is set aside and begun anew."""
    path = workdir / "run.json"
    if not os.path.lexists(path):
        return {}
    try:
        return files.read_json(path)
    except (UserError, OSError) as error:
        files.set_aside(path, f"damaged ({files.reason(error)})")
        return {}


def mark(workdir: Path, **values: Any) -> None:
    """Updates run.json. Where it cannot be written, that is said, once."""
    files.report_text(
        workdir / "run.json", json.dumps({**read_record(workdir), **values}, indent=1)
    )


def write(workdir: Path, prepared: Prepared | None) -> bool:
    """Writes `report.html`. Whether that went well; if not, it is said: the run is done anyhow.

    prepared: the data of a language model, which is compared with simpler ones; these baselines
    are computed once for a step and kept in run.json.
    """
    path = workdir / "report.html"
    with cli.reporting(f"{path} is not made"):
        return files.report_text(path, _page(workdir, prepared))
    return False


def _page(workdir: Path, prepared: Prepared | None) -> str:
    run = read_record(workdir)
    config = build.from_json((workdir / "config.json").read_text(encoding="utf-8"))
    records = jsonl.read_jsonl(workdir / jsonl.FILE)
    if prepared and run.get("baselines_step") != run.get("step"):
        step = run.get("step", 0)
        run["baselines"] = baselines(prepared, config, step=step)
        run["baselines_step"] = step
        mark(workdir, baselines=run["baselines"], baselines_step=step)
    levels = run.get("baselines", {})
    bits = _points(records, "eval/bits_per_byte")
    compared = dict(levels)
    if prepared and bits:
        compared[_THIS_MODEL] = bits[-1].value
    settings = []
    for section, values in schema.to_dict(config).items():
        settings += [(f"{section}.{name}", json.dumps(value)) for name, value in values.items()]
    hidden = ("baselines", "baselines_step", "selection")
    return pages.render(
        Path(__file__).with_name("templates"),
        "report.html",
        run_name=workdir.resolve().name,
        run={"step": None, "status": None, "devices": None} | run,
        charts=_charts(records, levels),
        scores=_last_scores(records),
        compared=sorted(compared.items(), key=lambda row: -row[1]),
        this_model=_THIS_MODEL,
        samples=_last_samples(workdir / "samples"),
        selection=run.get("selection", []),
        settings=settings,
        environment=[(key, json.dumps(value)) for key, value in run.items() if key not in hidden],
    )


def _points(records: list[dict[str, Any]], name: str) -> list[Point]:
    return [Point(float(r["step"]), float(r[name])) for r in records if name in r]


def _charts(
    records: list[dict[str, Any]], levels: dict[str, float]
) -> list[tuple[Chart, Drawing, Drawing | None]]:
    """Each chart with its drawing and, where it helps, the one with logarithmic axes."""

    def line(label: str, name: str) -> dict[str, list[Point]]:
        return {label: _points(records, name)}

    loss = line("train", "train/loss") | line("held out", "eval/loss")
    bits = line(_THIS_MODEL, "eval/bits_per_byte")
    reward = line("train", "train/reward") | line("held out", "answers/reward")
    norm = line("gradient norm", "train/grad_norm")
    speed = line("tokens", "perf/tokens_per_sec")
    charts = (
        make_chart("loss", "nats per token", loss, log="xy", wide=True),
        make_chart("reward", "mean of the answers", reward, wide=True),
        make_chart("held-out bits per byte", "fewer is better", bits, levels=levels, log="xy"),
        make_chart("learning rate", "", line("learning rate", "train/lr"), log="y"),
        make_chart("gradient norm", "before clipping", norm, log="y"),
        make_chart("throughput", "tokens per second", speed),
    )
    drawn = []
    for chart in charts:
        linear = draw(chart) if chart else None
        if chart and linear:
            drawn.append((chart, linear, draw(chart, log=True)))
    return drawn


def _last_scores(records: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """The newest value of each score, by the name that people read."""
    scores = {}
    for record in records:
        for name, value in record.items():
            if name.startswith(progress.SCORE_GROUPS) and isinstance(value, float):
                scores[progress.display_name(name)] = value
    return list(scores.items())


def _last_samples(folder: Path) -> list[tuple[int, str]]:
    """(step, text) of the newest samples, the newest first."""
    steps = sorted((int(p.stem) for p in folder.glob("*.txt") if p.stem.isdigit()), reverse=True)
    return [
        (step, (folder / f"{step}.txt").read_text(encoding="utf-8", errors="replace"))
        for step in steps[:_SAMPLES]
    ]
