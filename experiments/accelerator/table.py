"""results.json as Markdown, for experiments/LOG.md.

python experiments/accelerator/table.py runs/accelerator/results.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GIBIBYTE = 2**30


def markdown(results: dict[str, Any]) -> str:
    """Every part that ran, and for each that failed or was left out a line that says so."""
    parts = results["parts"]
    blocks = [title(results)]
    for name, make in SECTIONS.items():
        if name in parts:
            blocks.append(make(parts[name]))
    blocks.append(memory([parts[name] for name in ("gpt2", "llama") if name in parts]))
    blocks.append("\n".join(left_out(parts)))
    return "\n\n".join(block for block in blocks if block) + "\n"


def title(results: dict[str, Any]) -> str:
    machine = results["parts"].get("machine", {})
    kind = "rehearsal at toy size: no number here says anything" if results["rehearsal"] else ""
    lines = [f"## {results['started'][:10]}: {machine.get('device', 'unknown device')}"]
    if kind:
        lines.append(f"**{kind}**")
    if machine:
        lines.append(speeds(machine))
    return "\n\n".join(lines)


def speeds(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{n} {v}" for n, v in machine.get("versions", {}).items() if v)
    return (
        f"{versions}. Read bandwidth {number(machine.get('read_rate'), 1e12, 2)} TB/s, bfloat16 "
        f"products {number(machine.get('matrix_rate'), 1e12, 0)} TFLOP/s, both "
        f"measured (data sheet: {number(machine.get('data_sheet_flops'), 1e12, 0)} TFLOP/s)."
    )


def number(value: float | None, unit: float = 1.0, digits: int = 1) -> str:
    """Empty where there is none."""
    return "" if value is None else f"{value / unit:,.{digits}f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def rows_of(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def attention(part: dict[str, Any]) -> str:
    """A line a backend and dtype: its largest error, what it refuses, what is wrong."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in part.get("rows", []):
        groups.setdefault((row["backend"], row["dtype"]), []).append(row)
    lines = []
    for (backend, dtype), rows in groups.items():
        right = [row for row in rows if row.get("fault") == ""]
        wrong = [f"{row['case']}: {row['fault']}" for row in rows if row.get("fault")]
        refused = [row["case"] for row in rows if "refused" in row]
        if len(refused) == len(rows):
            refused = ["all"]
        worst = max((row["error"] for row in right), default=None)
        lines.append(
            [
                *(backend, dtype, f"{len(right)} of {len(rows)}"),
                "" if worst is None else f"{worst:.1e}",
                *(", ".join(refused), "; ".join(wrong)),
            ]
        )
    head = ("attention", "dtype", "right", "largest error", "refuses", "wrong")
    return rows_of(head, lines) if lines else ""


def tests(part: dict[str, Any]) -> str:
    if "passed" not in part:
        return ""
    line = f"Tests: {part['passed']} passed, {part['failed']} failed, {part['skipped']} skipped"
    line += "." if part["in_time"] else ", and then the time was up."
    return "\n".join([line, *(f"- {name}: {why}" for name, why in part["failures"].items())])


def training(part: dict[str, Any]) -> str:
    lines = []
    for name, entry in part.get("contenders", {}).items():
        if "ms" in entry:
            lines.append(
                [
                    *(name, number(entry["ms"], 1, 2), number(entry["tokens_per_second"], 1, 0)),
                    percent(entry.get("mfu")),
                    number(entry.get("peak_bytes"), GIBIBYTE, 2),
                    f"{entry['first_loss']:.3f} to {entry['loss']:.3f}",
                    ", ".join(entry.get("attention_kernels", [])),
                ]
            )
    if not lines:
        return ""
    train, model = part["sections"]["train"], part["sections"]["model"]
    head = f"{part['shape']}, {train['batch_size']} x {model['context']} bfloat16"
    if train["grad_accum_steps"] > 1:
        head += f", {train['grad_accum_steps']} micro-batches"
    columns = ("ms/step", "tokens/s", "MFU", "peak GiB", "loss", "attention kernels")
    text = rows_of((head, *columns), lines)
    if "times_torch" in part:
        text += f"\n\ngptjax is {part['times_torch']:.2f}x PyTorch, turn by turn."
    return text


def memory(parts: list[dict[str, Any]]) -> str:
    """The planner and the compiler against what was there at the peak."""
    lines = []
    for part in parts:
        entry = part.get("contenders", {}).get("gptjax", {})
        sizes = [entry.get(name) for name in ("planner_bytes", "compiler_bytes", "peak_bytes")]
        ratio = percent(sizes[0] / sizes[2]) if sizes[0] and sizes[2] else ""
        if any(sizes):
            lines.append([part["shape"], *(number(s, GIBIBYTE, 3) for s in sizes), ratio])
    head = ("memory, GiB", "planner", "compiler", "measured", "planner / measured")
    return rows_of(head, lines) if lines else ""


def decoding(part: dict[str, Any]) -> str:
    lines = [
        [
            *(row["shape"], str(row["batch"]), row["contender"]),
            *(number(row["tokens_per_second"], 1, 0), number(row["step_ms"], 1, 2)),
            *(number(row["prompt_ms"], 1, 1), percent(row.get("share_of_bandwidth"))),
        ]
        for row in part.get("rows", [])
    ]
    columns = ("tokens/s", "ms/step", "prompt ms", "of read bandwidth")
    return rows_of(("decoding, bfloat16", "batch", "", *columns), lines) if lines else ""


def left_out(parts: dict[str, dict[str, Any]]) -> Iterable[str]:
    for name, part in parts.items():
        if part.get("fault"):
            yield f"- {name}: {part['fault']}"
        for what, why in part.get("left_out", {}).items():
            yield f"- {name} leaves out {what}: {why}"


SECTIONS = {
    "attention": attention,
    "tests": tests,
    "gpt2": training,
    "llama": training,
    "decode": decoding,
}

if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
