"""Debian's Chromium for tests, and what every page must be: wide enough, named, readable."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
NEEDS_CHROMIUM = [
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"
    ),
    pytest.mark.slow,
]
WIDTHS, THEMES = (390, 1280), ("light", "dark")  # pixels: of a phone, of a desk

# Texts against the first opaque colour behind them, edges of controls against the page: [what,
# ratio] of all whose contrast is too low (WCAG 2.2, 1.4.3 and 1.4.11).
LOW_CONTRAST = r"""
const parts = (color) => color.match(/[\d.]+/g).map(Number);
const light = (color) => {
  const [r, g, b] = parts(color).map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ratio = (a, b) => {
  const [dark, bright] = [light(a), light(b)].sort((x, y) => x - y);
  return (bright + 0.05) / (dark + 0.05);
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const color = getComputedStyle(at).backgroundColor;
    if (color.startsWith("rgb(")) return color;
  }
  return "rgb(255, 255, 255)";
};
const low = [];
for (const element of document.body.querySelectorAll("*")) {
  if (element.disabled || !element.checkVisibility() || element.closest("svg")) continue;
  const style = getComputedStyle(element);
  const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  const name = `${element.tagName} ${element.id} ${element.textContent.slice(0, 20)}`;
  const add = (found, least) => found < least && low.push([name, found]);
  if (hasText || element.value) add(ratio(style.color, behind(element)), 4.5);
  if (["TEXTAREA", "INPUT"].includes(element.tagName) && element.type !== "checkbox")
    add(ratio(style.borderTopColor, behind(element.parentElement)), 3);
}
return low;
"""
AXE = "const done = arguments[0]; axe.run().then((found) => done(found.violations))"


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[webdriver.Chrome]:
    """Run a browser that asks nothing of other hosts."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--window-size=1100,1000", f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def check_accessibility(page: webdriver.Chrome, axe: str | None) -> None:
    """Hold a page at both widths, light and dark, against WCAG; `axe`: axe-core's file, if given.

    axe-core's findings of impact serious or critical are mistakes.
    """
    for width in WIDTHS:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for theme in THEMES:
            media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
            page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            wide = page.execute_script("return document.documentElement.scrollWidth")
            assert wide <= width
            assert page.execute_script(LOW_CONTRAST) == []
            if axe:
                page.execute_script(Path(axe).read_text())
                found = page.execute_async_script(AXE)
                assert [v for v in found if v["impact"] in ("serious", "critical")] == []
    for control in page.find_elements("css selector", "button, input, textarea, [role], summary"):
        assert not control.is_displayed() or control.accessible_name or control.text
