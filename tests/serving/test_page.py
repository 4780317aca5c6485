"""The page, in a real browser: typed, streamed, hovered over, by keyboard alone."""

import os
import shutil
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from tests.conftest import TINY
from tests.serving.services import service
from yuzogpt.cli import main

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"
    ),
    pytest.mark.slow,
]
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


@pytest.fixture
def page(served, tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--window-size=1100,1000", f"--user-data-dir={tmp_path}/profile",
    ):  # fmt: skip
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.get(served.url)
    yield driver
    driver.quit()


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
    assert "float32 on cpu" in text_of(page, "model")
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
