"""The page of findings as a browser shows it: pointer, keyboard, dark, narrow, screen readers."""

import os
import shutil

import pytest
from helpers import tiny_language_model

from gptjax.interpretability import difference, page, survey
from gptjax.tokenizer.trained import ByteTokenizer

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (CHROMIUM=path)"),
]
PROMPT = "a <b>cat</b>"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    lm = tiny_language_model("llama", layers=1, vocab=257, tokenizer=ByteTokenizer())
    findings = survey.survey(
        lm, PROMPT, name="toy", corrupted="a <b>dog</b>", other=lm, other_name="itself"
    )
    assert difference.compare(lm, lm, PROMPT).moved == []
    path = tmp_path_factory.mktemp("page") / "interpret.html"
    path.write_text(page.to_html(findings))
    return path


@pytest.fixture
def open_page(path):
    """Opens the page; faults of its code and requests to elsewhere fail the test."""
    faults = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
        )

        def open_page(**options):
            context = browser.new_context(**{"viewport": dict(width=1300, height=800), **options})
            shown = context.new_page()
            shown.set_default_timeout(60_000)
            shown.on("pageerror", lambda fault: faults.append(str(fault)))
            shown.on("request", lambda request: faults.append(request.url))
            shown.goto(path.as_uri())
            return shown

        yield open_page
        browser.close()
    assert [fault for fault in faults if fault != path.as_uri()] == []


def test_what_is_chosen_is_followed_everywhere(open_page):
    shown = open_page()
    assert shown.locator("main b").count() == 0  # the prompt's
    tokens = shown.locator("#prompt button")
    assert tokens.count() == len(PROMPT) and tokens.last.get_attribute("aria-checked") == "true"
    tokens.nth(3).click()
    attention = shown.locator("section[aria-labelledby=attention]")
    assert attention.locator("button[aria-checked=true]").inner_text().startswith("b")
    lens = shown.locator("section[aria-labelledby=lens]")
    assert lens.locator("td.chosen").count() == 1 and "after “b”" in lens.inner_text()
    shown.locator("section[aria-labelledby=heads] td").nth(2).click()
    assert attention.locator("h3").inner_text() == "Layer 0, head 2"
    assert attention.locator("button[aria-pressed=true]").count() == 1
    for name in ("patching", "difference", "attribution"):
        assert shown.locator(f"section[aria-labelledby={name}]").is_visible()


def test_the_arrow_keys_move_in_every_table(open_page):
    shown = open_page()
    for table in shown.locator("table[role=grid]").all():
        assert table.locator("td[tabindex='0']").count() == 1
    shown.locator("section[aria-labelledby=lens] td").first.focus()
    label = lambda: shown.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label().startswith("embedding, after a:")
    shown.keyboard.press("ArrowRight")
    shown.keyboard.press("ArrowDown")
    assert label().startswith("layer 0, after ·:")
    shown.keyboard.press("ArrowDown")  # there is no lower row
    shown.keyboard.press("End")
    assert label().startswith("layer 0, after >:")
    shown.keyboard.press("Home")
    shown.keyboard.press("Enter")
    assert shown.locator("#prompt button").first.get_attribute("aria-checked") == "true"
    shown.locator("#pattern").focus()
    shown.keyboard.press("ArrowDown")
    output = shown.locator("section[aria-labelledby=attention] output")
    assert output.inner_text().startswith("“·” looks at “a”:")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1300])
def test_it_fits_and_axe_finds_no_serious_fault(open_page, scheme, width):
    axe_api = pytest.importorskip("axe_playwright_python.sync_playwright")
    shown = open_page(color_scheme=scheme, viewport=dict(width=width, height=800))
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    faults = []
    for row in axe_api.Axe().run(shown).response["violations"]:
        if row["impact"] in ("serious", "critical"):
            faults.append((row["id"], [node["html"][:200] for node in row["nodes"]][:3]))
    assert faults == []
