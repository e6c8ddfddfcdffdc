"""The page in a real browser: ask, colours, the blind test, a thousand users, keys, by keyboard, on a phone."""

import json
import math
import shutil
from pathlib import Path

import openai
import pytest
from serve_fixtures import EVIL, serving

from perce_lite.serve.directory import Entry

playwright = pytest.importorskip("playwright.sync_api")

pytest_plugins = ["cli_fixtures", "serve_fixtures"]

QUESTION = "write a small note about the garden"
BROWSER = shutil.which("chromium")


@pytest.fixture(scope="module")
def server(fleet_folder):
    with serving(None, fleet_folder) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no chromium on PATH")
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, server):
    """The page, 390 px wide; nothing may be loaded from elsewhere, and the console stays silent."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    opened, said, foreign = context.new_page(), [], []
    opened.set_default_timeout(60_000)
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on(
        "request", lambda request: request.url.startswith((server.url, "blob:", "data:")) or foreign.append(request)
    )
    opened.goto(server.url)
    playwright.expect(opened.get_by_role("combobox", name="Who answers")).not_to_have_value("")
    yield opened
    refused = "Failed to load resource: the server responded with a status of"  # Chromium's own line
    assert [line for line in said if not line.startswith(refused)] == []
    assert foreign == []
    context.close()


def choose(page, user: str) -> None:
    page.get_by_role("combobox", name="Who answers").fill(user)
    page.locator("#users [role=option]").first.click()


def ask(page, user: str, tokens: int = 8) -> None:
    """Asks the question and waits for both answers."""
    choose(page, user)
    page.get_by_label("Tokens at the most").fill(str(tokens))
    page.get_by_role("textbox", name="Question").fill(QUESTION)
    page.get_by_role("button", name="Ask", exact=True).click()
    playwright.expect(page.get_by_role("button", name="Ask", exact=True)).to_be_enabled()


def answers_of(server, user: str, **more) -> openai.types.chat.ChatCompletion:
    client = openai.OpenAI(base_url=f"{server.url}v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": QUESTION}]
    return client.chat.completions.create(
        model=user, messages=messages, max_tokens=8, extra_body={"lean": True, **more}
    )


def fits(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_base_and_adapter_answer_side_by_side_coloured_by_their_leaning(page, server):
    counting = "new MutationObserver(() => window.grew++).observe(at('adapter'), {childList: true})"
    page.evaluate(f"() => {{ window.grew = 0; {counting}; }}")
    ask(page, "ann")
    assert page.evaluate("grew") > 4  # it was streamed
    for place, use_adapter in (("#adapter", True), ("#base", False)):
        expected = answers_of(server, "ann", use_adapter=use_adapter)
        assert page.locator(place).text_content().strip() == expected.choices[0].message.content
        units = [unit for unit in expected.choices[0].lean if not unit["end_of_turn"]]
        bounds = page.evaluate("state.bounds")
        classes = [f"p{sum(unit['pir'] > bound for bound in bounds)}" for unit in units]
        words = page.locator(f"{place} span")
        assert words.evaluate_all("spans => spans.map(span => span.className)") == classes
        words.first.hover()
        told = page.locator("#told").text_content()
        assert f"PIR {units[0]['pir']:+.2f}".replace("-", "−") in told
        assert f"log-prob with the profile {units[0]['factual']:.2f}" in told
    assert not page.locator("#chosen").is_visible()
    page.get_by_text("Texts chosen as profile").click()
    assert page.locator("#chosen").text_content() == expected.profile
    assert page.locator("#chosen").is_visible()
    assert fits(page)


def test_a_slider_makes_answers_more_like_the_user(page, server):
    slider = page.get_by_label("More like me")
    slider.focus()
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    assert page.locator("#strength").text_content() == "2"
    ask(page, "ann")
    said = answers_of(server, "ann", personal=2).choices[0].message.content
    assert page.locator("#adapter").text_content().strip() == said
    assert said != answers_of(server, "ann").choices[0].message.content


def test_a_profile_of_ones_own_and_none(page):
    page.get_by_label("this text:").check()
    page.get_by_role("textbox", name="Text of the profile").fill("I keep <b>otters</b>.")
    ask(page, "ann", 2)
    assert page.locator("#chosen").text_content() == "I keep <b>otters</b>."
    page.get_by_label("none").check()
    ask(page, "ann", 2)
    playwright.expect(page.get_by_text("There was no profile in the prompt")).to_be_visible()
    assert page.locator("#adapter span").count() == 0
    ask(page, "base", 2)
    assert not page.locator("#adapter").is_visible()


def test_what_does_not_work_is_told(page, server, monkeypatch):
    ask(page, "ann", 4000)
    playwright.expect(page.locator("#status")).to_contain_text("the model looks at")
    page.locator("#tokens").fill("4")
    monkeypatch.setattr(server.service.answers, "answer", lambda *args: 1 / 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("perce_lite.serve.app.warn", lambda text: None)
        ask(page, "ann", 4)
    playwright.expect(page.locator("#status")).to_contain_text("could not answer")


def test_a_user_who_is_called_like_a_tag_is_text(page):
    ask(page, EVIL)
    assert page.title() == "Ask: PerCE Lite"
    assert page.get_by_role("heading", name=f"Adapter of {EVIL}").is_visible()
    assert page.locator("main script").count() == 0


def test_a_thousand_users_are_found_by_typing(page, server, monkeypatch):
    many = [Entry(f"user{number:04}", "user", f"user{number:04}", number / 1000) for number in range(1000)]
    monkeypatch.setattr(server.service.directory, "entries", lambda: many)
    page.reload()
    field, options = page.get_by_role("combobox", name="Who answers"), page.locator("#users [role=option]")
    playwright.expect(field).to_have_value("user0000")
    field.click()
    assert options.count() == 50
    assert "and 950 more" in page.locator("#users").text_content()
    field.press_sequentially("R077", delay=0)
    assert options.all_text_contents() == [f"user077{digit}+0.77{digit} nats" for digit in range(10)]
    for _ in range(3):
        field.press("ArrowDown")
    assert page.evaluate("document.getElementById(at('user').getAttribute('aria-activedescendant')).dataset.model") == (
        "user0772"
    )
    field.press("Enter")
    assert field.input_value() == "user0772"
    assert "+0.772 nats a token better" in page.locator("#serves").text_content()
    field.fill("nobody")
    assert "nobody of that name" in page.locator("#users").text_content()
    field.press("Escape")
    page.keyboard.press("Tab")
    assert field.input_value() == "user0772"
    assert fits(page)


def test_the_keyboard_is_enough(page):
    keys = page.keyboard
    for key in ("Tab", "Tab"):  # the tabs, then the users
        keys.press(key)
    keys.type("cy")
    for key in ("ArrowDown", "Enter", "Tab"):
        keys.press(key)
    keys.type(QUESTION)
    keys.press("Enter")
    playwright.expect(page.locator("#stop")).to_be_visible()
    playwright.expect(page.locator("#stop")).to_be_hidden()
    assert page.get_by_role("combobox").input_value() == "cy"
    for _ in range(6):  # profile, tokens, more like me, temperature, ask, then the first word of the base
        keys.press("Tab")
    first = page.locator("#told").text_content()
    assert first.startswith("“")
    keys.press("ArrowRight")
    assert page.locator("#told").text_content() != first
    keys.press("ArrowLeft")
    assert page.locator("#told").text_content() == first
    page.locator("#tab-ask").focus()
    keys.press("ArrowRight")
    assert page.locator("#blind").is_visible()
    assert not page.locator("#ask").is_visible()


# The blind test


def binomial_tail(n: int, k: int, p: float) -> float:
    """P(X >= k)."""
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def test_the_sign_test_and_its_interval(page):
    cases = [(k, n) for n in (1, 10, 11, 40) for k in range(n + 1)]
    found = page.evaluate("cases => cases.map(([k, n]) => signTest(k, n))", cases)
    for (k, n), test in zip(cases, found, strict=True):
        assert test["p"] == pytest.approx(min(1, 2 * binomial_tail(n, max(k, n - k), 0.5)), rel=1e-9)
        low, high = test["low"], test["high"]
        assert low == 0 if k == 0 else binomial_tail(n, k, low) == pytest.approx(0.025, rel=1e-6)
        assert high == 1 if k == n else 1 - binomial_tail(n, k + 1, high) == pytest.approx(0.025, rel=1e-6)


@pytest.mark.parametrize("against", ["base", "written"])
def test_ten_choices_say_whether_they_can_be_told_apart(page, server, against):
    choose(page, "ann")
    page.evaluate(
        "() => { let n = 0; Math.random = () => [0.1, 0.6, 0.9][n++ % 3]; }"
    )  # the test decides nothing by chance
    page.locator("#tokens").fill("3")
    page.get_by_role("tab", name="Blind test").click()
    page.locator(f"[name=against][value={against}]").check()
    page.get_by_role("button", name="Begin").click()
    for number in range(1, 13):
        playwright.expect(page.locator("#blind-status")).to_contain_text(f"{number} of 12. Which")
        adapter_first = page.evaluate("state.blind.pair.adapterFirst")
        page.locator("#asked").click()
        page.keyboard.press("1" if adapter_first == (against == "base") else "2")
    playwright.expect(page.locator("#blind-status")).to_have_text("All 12 questions were asked.")
    told = page.locator("#verdict").text_content()
    assert "12 of 12, 100 % (95 % interval 74 % to 100 %, sign test p = 0.000)" in told
    assert told.startswith("The adapter sounds more like ann" if against == "base" else "You can tell")
    assert fits(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as JSON").click()
    saved = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert (saved["user"], saved["against"], saved["chosen"], saved["of"]) == ("ann", against, 12, 12)
    assert len({choice["adapter_was"] for choice in saved["choices"]}) == 2  # in random order
    rows = server.service.held_out.of("ann")
    assert sorted(choice["query"] for choice in saved["choices"]) == sorted(row["query"] for row in rows)
    if against == "written":
        assert {choice["other"] for choice in saved["choices"]} == {row["written"] for row in rows}


def test_own_questions_and_few_choices(page):
    choose(page, "ann")
    page.locator("#tokens").fill("2")
    page.get_by_role("tab", name="Blind test").click()
    page.get_by_label("Questions, one a line").fill(f"{QUESTION}\n\n")
    page.get_by_role("button", name="Begin").click()
    playwright.expect(page.locator("#asked")).to_have_text(QUESTION)
    page.get_by_role("button", name="2: this one").click()
    playwright.expect(page.locator("#verdict")).to_have_text("1 of 10 choices.")
    playwright.expect(page.locator("#blind-status")).to_contain_text("The one question was asked. 10 are wanted")
    assert not page.locator("#trial").is_visible()


# Keys


def test_a_key_is_asked_for_and_shows_its_user_alone(browser, fleet_folder, tmp_path):
    key = "k-of-ann-0123456789"
    (tmp_path / "keys.txt").write_text(f"{key} ann")
    with serving(None, fleet_folder, api_key_file=tmp_path / "keys.txt") as server:
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.goto(server.url)
        page.get_by_label("Key of this server").fill("wrong" * 4)
        page.get_by_role("button", name="Use it").click()
        playwright.expect(page.locator("#status")).to_contain_text("A key is needed")
        page.get_by_label("Key of this server").fill(key)
        page.get_by_role("button", name="Use it").click()
        playwright.expect(page.get_by_role("combobox", name="Who answers")).to_have_value("ann")
        page.get_by_role("combobox").click()
        assert page.locator("#users [role=option]").evaluate_all("all => all.map(one => one.dataset.model)") == (
            ["base", "ann"]
        )
        ask(page, "ann", 2)
        assert page.locator("#adapter").text_content()
        page.close()
