"""The page at `/`, as a browser shows it: Chromium without a window, driven by playwright."""

import json
import os
import re
import shutil
from urllib.request import Request, urlopen

import pytest
from helpers import tiny_language_model
from small_server import Server, serving

from gptjax.generation.slots import SlotEngine
from gptjax.serving.app import build_app
from gptjax.serving.metrics import Metrics
from gptjax.serving.scheduler import Scheduler
from gptjax.serving.served import Served
from gptjax.tokenizer.trained import ByteTokenizer

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (CHROMIUM=path)"),
]
QUESTION = "What is the capital of France?"
ANSWER = (
    "The capital of France is Paris. It lies on the river Seine, and has <b>bridges</b>.\n"
    "({} messages, system: {})"
)
expect = sync_api.expect
expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
        )
        yield browser
        browser.close()


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def open_page(browser, server):
    """Opens the page in a window of its own; faults of its code fail the test."""
    faults, contexts = [], []

    def open_page(url=server.url, **options):
        contexts.append(
            browser.new_context(**{"viewport": dict(width=1300, height=800), **options})
        )
        return watched(contexts[-1].new_page(), url, faults)

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def watched(page, url, faults):
    page.set_default_timeout(30_000)
    page.on("pageerror", lambda fault: faults.append(str(fault)))
    page.goto(url)
    return page


def ask(page, text=QUESTION):
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()


def answers(page):
    return page.locator(".assistant .content")


def ended(page, count=1):
    expect(page.locator(".assistant:not(.running)")).to_have_count(count)


def test_chat_with_the_probability_of_each_token(open_page, server):
    page = open_page()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Stop texts").fill("END\nFIN")
    ask(page)
    expect(answers(page)).to_have_text(ANSWER.format(2, "Be brief."))
    assert page.locator(".content b").count() == 0  # text, never HTML
    assert server.requests[0] == {
        "model": "toy",
        "temperature": 0.5,
        "stop": ["END", "FIN"],
        "logprobs": True,
        "top_logprobs": 5,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": QUESTION},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    token = page.locator(".assistant .token").nth(1)
    expect(token).to_have_text(" capital")
    token.hover()
    inspector = page.get_by_role("region", name="Token")
    expect(inspector.get_by_role("listitem")).to_have_count(5)
    expect(inspector).to_contain_text("48.0 %")
    expect(inspector).to_contain_text("1.1 bits")
    colour = "el => getComputedStyle(el).backgroundColor"
    plain = token.evaluate(colour)
    page.get_by_label("Colour by surprise").check()
    expect(page.get_by_role("list", name="How likely a token was")).to_be_visible()
    assert token.evaluate(colour) != plain
    page.get_by_role("button", name="Write the answer again").click()
    expect(answers(page)).to_have_count(1)
    ended(page)
    assert len(server.requests) == 2 and server.requests[0] == server.requests[1]
    ask(page, "And then?")
    ended(page, 2)
    assert [m["role"] for m in server.requests[2]["messages"]] == [
        *("system", "user", "assistant", "user")
    ]


def test_a_server_that_compiles_says_so(open_page):
    page = open_page()
    ask(page, "late please")
    expect(page.locator(".note")).to_contain_text("compiles its programs")
    ended(page)
    expect(page.locator(".note")).to_contain_text("16 tokens")
    speed = page.locator(".note").text_content().split()[-2]
    assert float(speed) > 16 / 3  # what was waited for at first is not in it


def test_a_full_queue_and_a_full_storage_are_told(open_page):
    page = open_page()
    page.get_by_label("Temperature").fill("2")
    ask(page)
    fault = page.locator(".message .error")
    expect(fault).to_have_text("the queue is full. Try again in 7 s.")
    page.evaluate("void (Storage.prototype.setItem = () => { throw new Error('full'); })")
    page.get_by_label("Temperature").fill("")
    expect(page.locator("#notice")).to_contain_text("storage is full")
    page.get_by_role("button", name="Write the answer again").click()
    expect(answers(page)).to_contain_text("The capital")  # goes on, as long as the page is open
    expect(page.locator("#notice")).to_contain_text("storage is full")


def test_stop_keeps_what_is_written_and_frees_the_box(open_page):
    page = open_page()
    ask(page, "slow please")
    expect(answers(page)).to_contain_text("slow slow slow")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".note")).to_contain_text("stopped")
    text = answers(page).text_content()
    assert 2 <= text.count("slow") < 400
    ask(page)
    ended(page, 2)
    assert answers(page).first.text_content() == text


def test_an_edited_message_is_answered_anew_and_what_followed_is_gone(open_page, server):
    page = open_page()
    ask(page)
    ended(page)
    ask(page, "A second one")
    ended(page, 2)
    page.get_by_role("button", name="Edit your message").first.click()
    page.get_by_role("textbox", name="Your message").fill("Another question")
    page.get_by_role("button", name="Save and answer").click()
    ended(page, 1)
    expect(page.locator(".user .content")).to_have_text("Another question")
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "Another question"}]
    page.get_by_role("button", name="Edit the answer").click()
    page.get_by_role("textbox", name="The answer", exact=True).fill("Lyon, they say.")
    page.get_by_role("button", name="Save", exact=True).click()
    ask(page, "Really?")
    ended(page, 2)
    assert server.requests[-1]["messages"][1] == {"role": "assistant", "content": "Lyon, they say."}


def test_conversations_outlive_a_reload_and_travel_as_json(open_page, tmp_path):
    page = open_page()
    page.get_by_label("Seed").fill("7")
    ask(page)
    ended(page)
    page.get_by_role("button", name="Rename").click()
    page.get_by_label("Name of the conversation").fill("France")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="New conversation").click()
    ask(page, "Another one")
    ended(page)
    page.reload()
    expect(answers(page)).to_have_text(ANSWER.format(1, "none"))
    page.get_by_role("button", name="France", exact=True).click()
    expect(page.locator(".user .content")).to_have_text(QUESTION)
    expect(page.get_by_label("Seed")).to_have_value("7")
    page.locator(".assistant .token").nth(1).hover()
    expect(page.get_by_role("region", name="Token")).to_contain_text("48.0 %")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    path = tmp_path / "conversations.json"
    download.value.save_as(path)
    assert [c["title"] for c in json.loads(path.read_text())["conversations"]] == ["", "France"]
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete France").click()
    expect(page.get_by_role("button", name="France", exact=True)).to_have_count(0)
    page.locator("#import-file").set_input_files(path)
    expect(page.get_by_role("button", name="France", exact=True)).to_have_count(1)
    expect(page.locator("#list li")).to_have_count(3)
    path.write_text('{"format": "something else"}')
    page.locator("#import-file").set_input_files(path)
    expect(page.locator("#notice")).to_contain_text("not imported")


def test_a_schema_is_sent_and_its_faults_are_shown(open_page, server):
    page = open_page()
    box = page.get_by_label("JSON schema of the answer")
    box.fill("{no json")
    ask(page)
    expect(page.locator("#schema-error")).to_contain_text("not JSON")
    assert not server.requests  # and the question waits in its box
    box.fill('{"type": "nonsense"}')
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".message .error")).to_contain_text("none of JSON schema's")
    expect(page.locator("#schema-error")).to_contain_text("none of JSON schema's")
    expect(box).to_have_attribute("aria-invalid", "true")
    box.fill('{"type": "object"}')
    expect(page.locator("#schema-error")).to_be_hidden()
    page.get_by_role("button", name="Write the answer again").click()
    expect(answers(page)).to_have_text('{"city": "Paris"}')
    assert server.requests[-1]["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": {"type": "object"}},
    }


def test_without_a_network_and_without_the_server(open_page, server):
    page = open_page("about:blank")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    policy = page.goto(server.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    ask(page)
    ended(page)
    assert len(asked) > 8 and all(url.startswith(server.url) for url in asked)
    ask(page, "slow please")
    expect(answers(page).last).to_contain_text("slow slow")
    server.stop()
    expect(page.locator("#notice")).to_contain_text("The server does not answer")
    expect(page.locator(".message .error")).to_contain_text("ended before the answer did")
    expect(answers(page).last).to_contain_text("slow slow")
    ask(page, "Is anybody there?")
    expect(page.locator(".message .error").last).to_contain_text("does not answer")
    server.start()
    expect(page.locator("#notice")).to_be_hidden()
    page.get_by_role("button", name="Write the answer again").last.click()
    expect(answers(page).last).to_contain_text("The capital")


def test_by_keyboard_alone(open_page):
    page = open_page()
    press, focus = page.keyboard.press, lambda: page.evaluate("document.activeElement.id")
    press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    press("Enter")
    page.wait_for_function("document.activeElement.id == 'text'")
    page.keyboard.type("What is")
    press("Shift+Enter")
    page.keyboard.type("this?")
    press("Enter")
    ended(page)
    expect(page.locator(".user .content")).to_have_text("What is\nthis?")
    assert focus() == "text"
    while not page.evaluate("document.activeElement.classList.contains('tokens')"):
        press("Shift+Tab")  # fails by the test's timeout, should it never get there
    press("ArrowRight")
    press("ArrowRight")
    expect(page.get_by_role("region", name="Token")).to_contain_text("48.0 %")
    said = page.locator("#token-spoken")
    expect(said).to_contain_text("capital, 48.0 %. Instead: other, 3.0 %")
    outline = page.evaluate("getComputedStyle(document.activeElement).boxShadow")
    assert outline != "none"
    press("Escape")
    expect(page.get_by_role("region", name="Token")).to_be_hidden()
    press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Again"
    press("Enter")
    ended(page)
    said = page.locator("#spoken p")  # by sentences, as they come
    expect(said).to_have_text(
        ["Writing.", *ANSWER.format(1, "none").replace(". ", ".\n").split("\n")]
    )


def test_on_a_narrow_screen(open_page):
    page = open_page(viewport=dict(width=320, height=640), has_touch=True, is_mobile=True)
    fits = (
        "[document.documentElement, document.getElementById('messages')]"
        ".every((e) => e.scrollWidth <= e.clientWidth)"
    )
    expect(page.get_by_label("System prompt")).to_be_hidden()
    assert page.evaluate(fits)
    ask(page, "a" * 200)
    ended(page)
    assert page.evaluate(fits)
    page.locator(".assistant .token").nth(1).tap()
    box = page.get_by_role("region", name="Token").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 320
    for name, inside in (("Settings", "System prompt"), ("Conversations", "New conversation")):
        opener = page.get_by_role("button", name=name, exact=True)
        opener.click()
        expect(page.get_by_text(inside)).to_be_visible()
        assert page.evaluate("document.querySelector('main').inert")
        page.keyboard.press("Escape")
        expect(opener).to_be_focused()
    sizes = [b.bounding_box() for b in page.get_by_role("button").all() if b.is_visible()]
    assert all(size["height"] >= 24 and size["width"] >= 24 for size in sizes)


def test_in_the_dark(open_page):
    page = open_page(color_scheme="dark")
    back = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((n) => n < 60)"
    assert page.evaluate(back)
    page.get_by_text("Light", exact=True).click()
    assert not page.evaluate(back)
    page.reload()
    assert not page.evaluate(back)
    page.emulate_media(color_scheme="light")
    page.get_by_text("Dark", exact=True).click()
    assert page.evaluate(back)
    page.get_by_text("Device", exact=True).click()
    assert not page.evaluate(back)


def test_two_tabs_lose_nothing_of_each_other(open_page, server):
    first = open_page()
    ask(first)
    ended(first)
    second = watched(first.context.new_page(), first.url, [])
    expect(answers(second)).to_have_count(1)
    ask(first, "slow please")  # grows in one tab while the other writes into the same conversation
    expect(answers(first).last).to_contain_text("slow slow")
    ask(second, "From the second tab")
    expect(first.locator(".user .content")).to_have_text(
        [QUESTION, "slow please", "From the second tab"]
    )
    first.get_by_role("button", name="Stop").click()
    shared = first.url
    second.get_by_role("button", name="New conversation").click()
    ask(second, "In a conversation of its own")
    expect(first.locator("#list li")).to_have_count(2)
    for page in (first, second):
        page.goto(shared)
        page.reload()
        expect(page.locator(".user")).to_have_count(3)
        expect(answers(page)).to_have_count(3)
        assert "slow slow" in answers(page).nth(1).text_content()


def test_a_model_without_chat_writes_on_from_a_text(open_page, server):
    page = open_page()
    page.get_by_label("Model").select_option("base")
    expect(page.get_by_label("Chat", exact=True)).to_be_disabled()
    page.get_by_label("Text to go on from").fill("Once upon a time")
    page.get_by_role("button", name="Go on").click()
    expect(answers(page)).to_have_text(" and so on 5 €.")
    assert server.requests[0]["prompt"] == "Once upon a time"
    assert server.requests[0]["max_tokens"] == 100
    page.locator(".assistant .token").nth(1).hover()
    page.get_by_role("button", name=re.compile("Go on with else")).click()
    expect(answers(page)).to_have_text(" and else and so on 5 €.")
    assert server.requests[1]["prompt"] == "Once upon a time and else"
    expect(page.locator(".assistant .token")).to_have_count(10)


def test_a_key_is_asked_for_where_the_server_wants_one(open_page):
    with serving(key="secret") as server:
        page = open_page(server.url)
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Use this key").click()
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Use this key").click()
        expect(page.get_by_label("Model")).to_have_value("toy")
        ask(page)
        ended(page)
        page.reload()
        expect(page.get_by_label("Model")).to_have_value("toy")
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


def test_the_server_of_this_package_with_tokens_that_are_parts_of_characters(open_page):
    engine = SlotEngine(tiny_language_model("llama", tokenizer=ByteTokenizer(), vocab=257), slots=2)
    scheduler = Scheduler(engine, Metrics())
    scheduler.start()
    server = Server(build_app(Served("bytes", engine), scheduler))
    try:
        body = dict(model="bytes", prompt="Once", seed=4, max_tokens=40, stop=["never"], logprobs=5)
        sent = Request(f"{server.url}v1/completions", json.dumps(body).encode())
        sent.add_header("Content-Type", "application/json")
        with urlopen(sent) as answer:  # before the page, which would wait for the compiler too
            expected = json.load(answer)["choices"][0]["text"]
        page = open_page(server.url)
        expect(page.get_by_label("Chat", exact=True)).to_be_disabled()
        for name, value in (("Seed", "4"), ("Max tokens", "40"), ("Stop texts", "never")):
            page.get_by_label(name).fill(value)
        page.get_by_label("Text to go on from").fill("Once")
        page.get_by_role("button", name="Go on").click()
        ended(page)
        assert answers(page).evaluate("(element) => element.textContent") == expected
        spans = page.locator(".assistant .token")
        expect(spans).to_have_count(40)
        spans.and_(page.locator(":visible")).last.hover()  # others end within a character
        expect(page.get_by_role("region", name="Token").get_by_role("listitem")).to_have_count(5)
        page.get_by_label("Max tokens").fill("4000")
        page.get_by_role("button", name="Write the answer again").click()
        expect(page.locator(".message .error")).to_contain_text("max_tokens")
    finally:
        server.stop()
        scheduler.close(drain=False)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 320])
def test_axe_finds_no_serious_fault(open_page, scheme, width):
    axe_api = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = open_page(color_scheme=scheme, viewport=dict(width=width, height=700))
    check = lambda: [
        (row["id"], row["impact"], [node["html"] for node in row["nodes"]])
        for row in axe_api.Axe().run(page).response["violations"]
        if row["impact"] in ("serious", "critical")
    ]
    assert check() == []
    ask(page)
    ended(page)
    page.get_by_label("Colour by surprise").check()
    page.locator(".assistant .token").nth(5).hover()
    assert check() == []
    page.get_by_role("button", name="Edit your message").click()
    assert check() == []
    page.keyboard.press("Escape")
    if width < 400:
        page.get_by_role("button", name="Settings").click()
        assert check() == []
