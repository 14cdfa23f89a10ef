"""The pictures of the page in README and docs, of the real server and a real model.

    python experiments/smollm2/fetch.py --to=runs/smollm2.gguf
    python experiments/serving/screenshots.py [--checkpoint=runs/smollm2.gguf] [--to=docs/img]

Writes serve-chat.png, serve-text.png and serve-phone.png (about a minute on two cores; extras serve
and parity, and the system's Chromium). Greedy, so the texts are the same each time.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="runs/smollm2.gguf")
    parser.add_argument("--to", type=Path, default=Path("docs/img"))
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    flags = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    arguments = [f"--checkpoint={flags.checkpoint}", f"--port={port}", "--slots=2", "--length=1024"]
    server = subprocess.Popen([sys.executable, "-m", "gptjax.serve", *arguments])
    try:
        wait_for(url, server)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=flags.chromium, args=["--no-sandbox", "--disable-gpu"]
            )
            draw_all(browser, url, flags.to)
            browser.close()
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str, server: subprocess.Popen[bytes], *, seconds: int = 120) -> None:
    for _ in range(seconds * 4):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}")
        try:
            urllib.request.urlopen(f"{url}health").close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.25)
    raise SystemExit(f"no server at {url} after {seconds} s")


def draw_all(browser: Browser, url: str, folder: Path) -> None:
    page = opened(browser, url, width=1280, height=800)
    ask(page, "What is the capital of France?", max_tokens=40)
    ask(page, "Name three rivers of that country.", max_tokens=60)
    page.get_by_label("Colour by surprise").check()
    most_surprising(page).hover()
    page.screenshot(path=folder / "serve-chat.png")

    page = opened(browser, url, width=1280, height=800, color_scheme="dark")
    page.locator("#modes").get_by_text("Text").click()
    page.get_by_label("Colour by surprise").check()
    ask(page, "The old lighthouse keeper climbed the stairs and", max_tokens=60)
    most_surprising(page).hover()
    page.screenshot(path=folder / "serve-text.png")

    page = opened(browser, url, width=360, height=720, device_scale_factor=2, color_scheme="dark")
    ask(page, "Write two lines about the sea.", max_tokens=40)
    page.screenshot(path=folder / "serve-phone.png")


def opened(browser: Browser, url: str, *, width: int, height: int, **options: object) -> Page:
    page = browser.new_context(viewport=dict(width=width, height=height), **options).new_page()
    page.goto(url)
    page.wait_for_selector("#model option", state="attached")
    return page


def ask(page: Page, text: str, *, max_tokens: int) -> None:
    fill = "([name, value]) => { const f = document.getElementById(name); f.value = value; }"
    for name, value in (("temperature", "0"), ("max_tokens", str(max_tokens))):
        page.evaluate(fill, [name, value])
        page.dispatch_event(f"#{name}", "input", {"bubbles": True})
    answered = page.locator(".assistant:not(.running)").count()
    page.locator("#text").fill(text)
    page.locator("#send").click()
    page.locator(".assistant:not(.running)").nth(answered).wait_for(timeout=120_000)


def most_surprising(page: Page):  # the last answer's
    answer = page.locator(".assistant").last
    for level in (4, 3, 2, 1, 0):
        tokens = answer.locator(f".token[data-surprise='{level}']")
        if tokens.count():
            return tokens.first
    raise SystemExit("the answer has no tokens")


if __name__ == "__main__":
    main()
