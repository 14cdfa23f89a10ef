"""The picture of `gptjax.interpret`'s page in README and docs: SmolLM2 looks a capital up.

    python experiments/smollm2/fetch.py --to=runs/smollm2.gguf
    python experiments/smollm2/inside.py [--checkpoint=runs/smollm2.gguf] [--to=docs/img]

Writes interpret.png (about two minutes on two cores; extra parity, and the system's Chromium).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="runs/smollm2.gguf")
    parser.add_argument("--to", type=Path, default=Path("docs/img"))
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    parser.add_argument("--page", type=Path, help="a page that is there already")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = flags.page or Path(folder) / "interpret.html"
        if flags.page is None:
            prompts = ["--prompt=The capital of France is", "--corrupted=The capital of Italy is"]
            arguments = [f"--checkpoint={flags.checkpoint}", *prompts, f"--out={path}"]
            subprocess.run([sys.executable, "-m", "gptjax.interpret", *arguments], check=True)
        draw(path, flags.to / "interpret.png", flags.chromium)


def draw(path: Path, picture: Path, chromium: str | None) -> None:
    """The section on attention, with the head that looks at the country."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport=dict(width=1240, height=790))
        page.goto(path.absolute().as_uri())
        page.evaluate("document.getElementById('attention').scrollIntoView({behavior: 'instant'})")
        page.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main()
