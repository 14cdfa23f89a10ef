"""What a run shows afterwards: `report.html` (self-contained), its baselines, its environment; and `--explain` before it."""

from __future__ import annotations

import html
import importlib.metadata
import json
import lzma
import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gptjax
from gptjax.core import files
from gptjax.data.loader import Windows
from gptjax.data.shards import Prepared
from gptjax.data.sources import EVAL, TRAIN
from gptjax.tracking import progress
from gptjax.tracking.jsonl import read_jsonl

_BASELINE_TOKENS = 1 << 22  # of the training split, enough for a bigram model


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


def mark(workdir: Path, **values: Any) -> None:
    """Updates run.json."""
    path = workdir / "run.json"
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    files.write_text(path, json.dumps({**data, **values}, indent=1))


def bigram_bits(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Bits that a token bigram model spends on held_out[1:]: absolute discounting (0.75) over an add-one unigram (Ney et al. 1994)."""
    unigram = (np.bincount(train, minlength=vocab_size) + 1.0) / (len(train) + vocab_size)
    keys, counts = np.unique(
        train[:-1].astype(np.int64) * vocab_size + train[1:], return_counts=True
    )
    context_total = np.bincount(train[:-1], minlength=vocab_size)
    context_kinds = np.bincount(keys // vocab_size, minlength=vocab_size)
    before, after = held_out[:-1].astype(np.int64), held_out[1:].astype(np.int64)
    wanted = before * vocab_size + after
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    seen = np.where(keys[at] == wanted, counts[at] - 0.75, 0.0)
    total = np.maximum(context_total[before], 1)
    backoff = np.where(context_total[before] > 0, 0.75 * context_kinds[before] / total, 1.0)
    return float(-np.log2(seen / total + backoff * unigram[after]).sum())


def baselines(prepared: Prepared, limit: int) -> dict[str, float]:
    """Bits per byte of the first `limit` held-out tokens under `xz -9` (it sees that text alone) and a bigram model of the training split."""
    held_out = Windows.of(prepared, EVAL, 1, mask_documents=False)
    if held_out.total < 2:
        return {}
    tokens = held_out.read(0, min(held_out.total, limit))
    text = prepared.tokenizer.decode_bytes(tokens.tolist())
    train = Windows.of(prepared, TRAIN, 1, mask_documents=False)
    bits = bigram_bits(
        train.read(0, min(train.total, _BASELINE_TOKENS)), tokens, prepared.tokenizer.vocab_size
    )
    return {
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
        "token bigram model": bits / len(text),
    }


def curve(
    title: str, series: dict[str, list[tuple[float, float]]], *, width: int = 640, height: int = 260
) -> str:
    """A line chart as inline SVG: {name: [(step, value)]}."""
    series = {
        name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()
    }
    points = [p for line in series.values() for p in line]
    if len(points) < 2:
        return ""
    (x0, x1), (y0, y1) = ((min(p[i] for p in points), max(p[i] for p in points)) for i in (0, 1))
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + abs(y0) * 0.1 + 1e-9)
    left, top, right, bottom = 64, 28, width - 12, height - 28
    px = lambda x: left + (x - x0) / (x1 - x0) * (right - left)
    py = lambda y: bottom - (y - y0) / (y1 - y0) * (bottom - top)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}"><text x="{left}" y="16" class="title">{html.escape(title)}</text>'
    ]
    for i in range(5):
        y, x = y0 + (y1 - y0) * i / 4, x0 + (x1 - x0) * i / 4
        parts.append(
            f'<line x1="{left}" x2="{right}" y1="{py(y):.1f}" y2="{py(y):.1f}" class="grid"/>'
        )
        parts.append(
            f'<text x="{left - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:.4g}</text><text x="{px(x):.1f}" y="{height - 8}" text-anchor="middle">{x:.0f}</text>'
        )
    for k, (name, line) in enumerate(series.items()):
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" class="line{k}"/>')
        parts += [
            f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.5" class="line{k}"/>'
            for x, y in line
            if len(line) < 40
        ]
        parts.append(
            f'<text x="{right}" y="{16 + 14 * k}" text-anchor="end" class="name{k}">{html.escape(name)}</text>'
        )
    return "".join(parts) + "</svg>"


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1340px;margin:2em auto;padding:0 1em;color:#1b1f24;background:#fff}
h1{font-size:1.5em;margin-bottom:.2em}h2{font-size:1.1em;margin-top:2em}.charts{display:flex;flex-wrap:wrap;gap:12px}
svg{width:640px;max-width:100%;font:11px system-ui,sans-serif;fill:#57606a}svg .title{font-weight:600;font-size:13px;fill:#1b1f24}
.grid{stroke:#d8dee4}polyline{fill:none;stroke-width:1.6}polyline.line0{stroke:#0969da}polyline.line1{stroke:#cf222e}
circle.line0,.name0{fill:#0969da}circle.line1,.name1{fill:#cf222e}
pre{background:#f6f8fa;padding:1em;white-space:pre-wrap;overflow-wrap:anywhere}table{border-collapse:collapse}
td,th{padding:.25em .9em;text-align:left;border-bottom:1px solid #d8dee4}td.n{text-align:right;font-variant-numeric:tabular-nums}
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}svg{fill:#8b949e}svg .title{fill:#e6edf3}pre{background:#161b22}.grid{stroke:#30363d}}
"""


def _table(rows: Sequence[tuple[str, str]], *, numbers: bool = False) -> str:
    kind = ' class="n"' if numbers else ""
    return (
        "<table>"
        + "".join(
            f"<tr><td>{html.escape(a)}</td><td{kind}>{html.escape(b)}</td></tr>" for a, b in rows
        )
        + "</table>"
    )


def write(workdir: Path, prepared: Prepared | None) -> None:
    """Writes `report.html` from what the run left in its workdir; the baselines of a language model (`prepared`) are computed once and kept in run.json."""
    run = json.loads((workdir / "run.json").read_text(encoding="utf-8"))
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    records = read_jsonl(workdir / "metrics.jsonl") if (workdir / "metrics.jsonl").exists() else []
    of = lambda name: [(float(r["step"]), float(r[name])) for r in records if name in r]
    if "baselines" not in run and prepared:
        length = config["data"]["length"] or config["model"]["context"]
        batches = (
            config["train"]["eval_batches"] * config["train"]["batch_size"] * length + 1
        )  # what the evaluation sees
        run["baselines"] = baselines(
            prepared, batches if config["train"]["eval_batches"] else _BASELINE_TOKENS
        )
        files.write_text(workdir / "run.json", json.dumps(run, indent=1))
    compared = list(run.get("baselines", {}).items())
    if (bits := of("eval/bits_per_byte")) and prepared:
        compared.append(("this model", bits[-1][1]))
    charts = [
        curve("loss (nats per token)", {"train": of("train/loss"), "held out": of("eval/loss")}),
        curve("held-out bits per byte", {"this model": bits}),
        curve("learning rate", {"lr": of("train/lr")}),
        curve("throughput (tokens per second)", {"tokens/s": of("perf/tokens_per_sec")}),
    ]
    samples = sorted(
        (p for p in (workdir / "samples").glob("*.txt") if p.stem.isdigit()),
        key=lambda p: int(p.stem),
    )
    sections = [
        f"<h1>{html.escape(workdir.name)}</h1><p>step {run.get('step')}, {html.escape(str(run.get('status')))}; {html.escape(str(run.get('devices')))}</p>",
        f'<div class="charts">{"".join(charts)}</div>',
    ]
    if judged := {
        name: value
        for r in records
        for name, value in r.items()
        if name.startswith(progress.SCORE_GROUPS) and isinstance(value, float)
    }:
        sections.append(
            f"<h2>Held-out scores</h2>{_table([(progress.display_name(n), f'{v:.4f}') for n, v in judged.items()], numbers=True)}"
        )
    if compared:
        rows = [(name, f"{value:.3f}") for name, value in sorted(compared, key=lambda row: -row[1])]
        sections.append(
            f"<h2>Bits per byte on the same held-out text</h2>{_table(rows, numbers=True)}"
        )
    for sample in reversed(samples[-3:]):
        sections.append(
            f"<h2>Sample at step {sample.stem}</h2><pre>{html.escape(sample.read_text(encoding='utf-8'))}</pre>"
        )
    settings = [
        (f"{section}.{name}", json.dumps(value))
        for section, content in config.items()
        for name, value in content.items()
    ]
    sections.append(
        f"<h2>Config</h2><details><summary>{len(settings)} knobs</summary>{_table(settings)}</details>"
    )
    sections.append(
        f"<h2>Environment</h2>{_table([(k, json.dumps(v)) for k, v in run.items() if k not in ('baselines',)])}"
    )
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(workdir.name)}</title><style>{_STYLE}</style>{"".join(sections)}</html>'
    files.write_text(workdir / "report.html", page)
