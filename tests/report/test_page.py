"""The report's page in a real browser."""

from selenium.webdriver.common.by import By

from tests.browser import NEEDS_CHROMIUM, browser, check_accessibility
from tests.report.test_report import RESTARTED, write
from yuzogpt.cli import main

pytestmark = NEEDS_CHROMIUM


def test_at_all_widths_in_the_dark_and_enlarged(tmp_path, request):
    main(["report", str(write(tmp_path / "run", RESTARTED))])
    with browser(tmp_path / "profile") as page:
        page.get((tmp_path / "run" / "report.html").as_uri())
        check_accessibility(page, request.config.getoption("axe"))
        plot = page.find_element(By.CSS_SELECTOR, "figure svg")
        before = plot.size["width"]
        page.find_element(By.CSS_SELECTOR, "figure input").click()
        assert plot.size["width"] > 1.5 * before
        check_accessibility(page, request.config.getoption("axe"))
        assert page.get_log("browser") == []
