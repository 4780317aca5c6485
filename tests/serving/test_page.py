"""The page, in a real browser: typed, streamed, hovered over, by keyboard alone."""

import contextlib
import io
import json
import os
import shlex
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from tests.browser import NEEDS_CHROMIUM, browser, check_accessibility
from tests.conftest import TINY
from tests.serving.services import service
from yuzogpt.cli import main

pytestmark = NEEDS_CHROMIUM
# Where CI keeps what people may want to look at.
ARTEFACTS = Path(os.environ.get("YUZOGPT_TEST_ARTEFACTS", "test-artefacts"))


@pytest.fixture(scope="module")
def served(corpus_dir, tmp_path_factory):
    run = tmp_path_factory.mktemp("page") / "run"
    places = [f"--data_dir={corpus_dir}", f"--out_dir={run}", "--eval_interval=20"]
    main(["train", *TINY, *places, "--num_workers=0", "--max_iters=100"])
    flags = ["--num_replicas=0", "--follow", "--threads=1", "--max_new_tokens=100000"]
    with service(run, *flags) as running:
        yield running


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def page(served, driver):
    driver.get(served.url)
    driver.get_log("browser")  # of the test before
    return driver


def until(page, is_so):
    """Wait until something is so on the page; return what it is."""
    return WebDriverWait(page, 30, 0.05).until(lambda _: is_so())


def text_of(page, name: str) -> str:
    return page.find_element(By.ID, name).text


def tokens(page) -> list:
    return page.find_elements(By.CSS_SELECTOR, "#text .token")


def set_field(page, name: str, value: str) -> None:
    field = page.find_element(By.NAME, name)
    field.clear()
    field.send_keys(value)


def test_by_mouse(served, page):
    until(page, lambda: "run · step" in text_of(page, "model"))
    assert "context 16 tokens · float32 on cpu" in text_of(page, "model")
    until(page, lambda: page.find_element(By.ID, "run").is_displayed())
    assert page.find_elements(By.CSS_SELECTOR, "#curve path.train")
    page.find_element(By.ID, "prompt").send_keys("thou art the king")
    set_field(page, "max_tokens", "80")
    set_field(page, "seed", "5")
    page.find_element(By.ID, "go").click()
    until(page, lambda: "ended by length" in text_of(page, "status"))
    assert "80 tokens, " in text_of(page, "status")
    assert "tokens/s" in text_of(page, "status")
    expected = served.post(prompt="thou art the king", max_tokens=80, seed=5, temperature=0.8)
    (choice,) = expected.json()["choices"]
    script = "return document.getElementById('text').textContent"
    assert page.execute_script(script) == "thou art the king" + choice["text"]

    token = tokens(page)[3]
    webdriver.ActionChains(page).move_to_element(token).perform()
    rows = until(page, lambda: page.find_elements(By.CSS_SELECTOR, "#alternatives tr"))
    assert len(rows) >= 8
    shares = [float(row.text.split()[-1].rstrip("%")) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 100.5
    assert len(page.find_elements(By.CSS_SELECTOR, "#alternatives tr.chosen")) == 1
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    assert page.save_screenshot(str(ARTEFACTS / "page.png"))
    # Nothing was asked of another host, and nothing went wrong.
    asked = page.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert asked
    assert all(name.startswith(served.url) for name in asked)
    assert page.get_log("browser") == []


def test_by_keyboard_alone(served, page):
    until(page, lambda: "run · step" in text_of(page, "model"))
    keys = webdriver.ActionChains(page)
    keys.send_keys("night").key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL)
    keys.perform()
    until(page, lambda: "ended by length" in text_of(page, "status"))
    # Tab to the text, then from token to token.
    until(page, lambda: tab_to(page, "text"))
    webdriver.ActionChains(page).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
    first = page.find_element(By.CSS_SELECTOR, "#alternatives caption").text
    assert page.switch_to.active_element == tokens(page)[1]
    webdriver.ActionChains(page).send_keys(Keys.ARROW_LEFT).perform()
    assert page.switch_to.active_element == tokens(page)[0]
    assert "instead of" in first


def tab_to(page, name: str) -> bool:
    webdriver.ActionChains(page).send_keys(Keys.TAB).perform()
    return page.switch_to.active_element.get_attribute("id") == name


def test_escape_stops_and_frees_the_slot(served, page):
    until(page, lambda: "run · step" in text_of(page, "model"))
    set_field(page, "max_tokens", "100000")
    page.find_element(By.ID, "go").click()
    until(page, lambda: len(tokens(page)) > 3)
    webdriver.ActionChains(page).send_keys(Keys.ESCAPE).perform()
    until(page, lambda: "stopped" in text_of(page, "status"))
    served.wait_until(lambda: served.gauge("running_requests") == 0)
    assert not page.find_element(By.ID, "stop").is_enabled()


def test_what_the_server_refuses_is_shown(page):
    until(page, lambda: "run · step" in text_of(page, "model"))
    set_field(page, "max_tokens", "5")
    set_field(page, "temperature", "101")
    page.execute_script("document.getElementById('form').noValidate = true")
    page.find_element(By.ID, "go").click()
    until(page, lambda: "temperature" in text_of(page, "text"))


# Answers with the first event of a stream, and ends.
CUT = r"""
const real = window.fetch;
const logprobs = {tokens: ["a"], text_offset: [0], token_logprobs: [-1], top_logprobs: [{a: -1}]};
const event = {choices: [{text: "a", finish_reason: null, logprobs}]};
window.fetch = (path, options) => path === "v1/completions"
  ? Promise.resolve(new Response(`data: ${JSON.stringify(event)}\n\n`)) : real(path, options);
"""


def test_a_stream_that_is_cut_off_is_not_taken_for_a_whole_one(page):
    until(page, lambda: "run · step" in text_of(page, "model"))
    page.execute_script(CUT)
    page.find_element(By.ID, "go").click()
    until(page, lambda: "the connection ended before the text did" in text_of(page, "text"))
    assert len(tokens(page)) == 1


def test_a_text_that_a_stop_string_ends_is_shown_whole(served, page):
    until(page, lambda: "run · step" in text_of(page, "model"))
    whole = served.post(prompt="thou", max_tokens=60, seed=5, temperature=0.8)
    text = whole.json()["choices"][0]["text"]
    stop = text[30:33]
    page.find_element(By.ID, "prompt").send_keys("thou")
    set_field(page, "max_tokens", "60")
    set_field(page, "seed", "5")
    set_field(page, "stop", stop)
    page.find_element(By.ID, "go").click()
    until(page, lambda: "ended by stop" in text_of(page, "status"))
    script = "return document.getElementById('text').textContent"
    assert page.execute_script(script) == "thou" + text[: text.index(stop)]
    assert len(tokens(page)) == text.index(stop)


# Counts the looks that are to come, and those that have ended.
TIMERS = r"""
window.pending = new Set();
window.looks = 0;
const [set, clear, real] = [window.setTimeout, window.clearTimeout, window.fetch];
window.setTimeout = (call, delay) => {
  const timer = set(() => { window.pending.delete(timer); call(); }, delay);
  if (delay === 5000) window.pending.add(timer);
  return timer;
};
window.clearTimeout = (timer) => { window.pending.delete(timer); clear(timer); };
window.fetch = async (path, options) => {
  const answer = await real(path, options);
  if (path === "v1/run") set(() => { window.looks += 1; }, 100);
  return answer;
};
for (let n = 0; n < 5; n += 1) document.getElementById("key").dispatchEvent(new Event("change"));
"""


def test_a_changed_key_does_not_begin_another_chain_of_looks(page):
    until(page, lambda: "run · step" in text_of(page, "model"))
    page.execute_script(TIMERS)
    until(page, lambda: page.execute_script("return window.looks") >= 5)
    assert page.execute_script("return window.pending.size") == 1


def generate(page, **fields: str) -> str:
    """Generate with other values of fields; return the whole text."""
    for name, value in fields.items():
        set_field(page, name, value)
    page.find_element(By.ID, "go").click()
    until(page, lambda: "ended by" in text_of(page, "status"))
    return page.execute_script("return document.getElementById('text').textContent")


def test_the_request_as_code_gives_the_same_text(served, page):
    until(page, lambda: "run · step" in text_of(page, "model"))
    page.find_element(By.ID, "prompt").send_keys("thou art")
    text = generate(page, max_tokens="40", seed="5", top_k="7", stop='it\'s \\n$HOME\n"x"')
    page.find_element(By.ID, "curl").click()
    curl, url, *options = shlex.split(text_of(page, "code"))
    assert (curl, url) == ("curl", f"{served.url}v1/completions")
    body = json.loads(options[-1])
    assert body["stop"] == ["it's \n$HOME", '"x"']
    assert "thou art" + served.post(**body).json()["choices"][0]["text"] == text
    page.find_element(By.ID, "python").click()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(text_of(page, "code"), {})
    assert "thou art" + printed.getvalue() == text + "\n"
    page.find_element(By.ID, "python").click()
    assert not page.find_element(By.ID, "code").is_displayed()


def test_the_history_brings_back_text_and_settings(page):
    until(page, lambda: "run · step" in text_of(page, "model"))
    first = generate(page, max_tokens="20", seed="5")
    assert generate(page, seed="6", max_tokens="30") != first
    page.find_element(By.CSS_SELECTOR, "#history summary").click()
    page.find_elements(By.CSS_SELECTOR, "#history button")[1].click()
    assert page.find_element(By.ID, "text").get_property("textContent") == first
    assert page.find_element(By.NAME, "seed").get_property("value") == "5"
    webdriver.ActionChains(page).move_to_element(tokens(page)[3]).perform()
    until(page, lambda: page.find_elements(By.CSS_SELECTOR, "#alternatives tr"))


# The looks at the server follow each other at once.
IMPATIENT = "const set = setTimeout; setTimeout = (call, delay) => set(call, Math.min(delay, 50));"


def test_a_server_that_is_gone_is_named_and_looked_for(page):
    until(page, lambda: "run · step" in text_of(page, "model"))
    page.execute_script(IMPATIENT)
    page.set_network_conditions(offline=True, latency=0, throughput=-1)
    page.find_element(By.ID, "go").click()
    until(page, lambda: "does not answer" in text_of(page, "text"))
    until(page, lambda: "does not answer" in text_of(page, "model"))
    page.delete_network_conditions()
    until(page, lambda: "run · step" in text_of(page, "model"))


FOCUS_AT_THE_BOTTOM = """
const [token] = arguments;
document.activeElement.blur();
scrollBy(0, token.getBoundingClientRect().bottom - innerHeight);
token.focus();
"""
TOP = "return arguments[0].getBoundingClientRect().top"


def test_at_all_widths_and_in_the_dark(page, request):
    until(page, lambda: page.find_element(By.ID, "run").is_displayed())
    page.find_element(By.CSS_SELECTOR, "#examples button").click()
    until(page, lambda: "ended by" in text_of(page, "status"))
    page.find_element(By.ID, "curl").click()
    page.execute_script("document.querySelector('#text .token').focus()")
    check_accessibility(page, request.config.getoption("axe"))
    phone = {"width": 390, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    for token in (tokens(page)[0], tokens(page)[-1]):
        page.execute_script(FOCUS_AT_THE_BOTTOM, token)
        covering = page.find_element(By.ID, "alternatives")
        below = page.execute_script(TOP, token) + token.size["height"]
        assert 0 < below <= page.execute_script(TOP, covering)
