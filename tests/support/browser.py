"""A real browser without a window: Debian's Chromium, by its own driver."""

import base64
import os
import shutil
import time

import pytest


def chromium():
    """A started one; skips where there is none, and says so."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium and chromedriver (Debian: apt-get install chromium-driver)")
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is in the dev extra")
    from selenium.webdriver.chrome.service import Service

    options = selenium.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1280,900")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # it refuses root otherwise
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return selenium.Chrome(options=options, service=Service(driver))


class Browser:
    """What tests do with it."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, fragment=""):
        """A page from a file, once all of it is drawn."""
        self.driver.get("about:blank")
        self.driver.get(f"{path.as_uri()}{fragment}")
        self.until("return document.documentElement.dataset.ready")

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def until(self, script, seconds=60):
        """Waits until a script gives something true, and gives it."""
        ends = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < ends, f"not in {seconds} s: {script}"
            time.sleep(0.05)
        return found

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        return self.driver.find_element("css selector", selector)

    def choose(self, selector, value):
        from selenium.webdriver.support.ui import Select

        Select(self.one(selector)).select_by_value(value)

    def point_at(self, element):
        from selenium.webdriver.common.action_chains import ActionChains

        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        mover = ActionChains(self.driver)
        mover.move_to_element_with_offset(element, 0, 1).pause(0.1)
        mover.move_to_element(element).perform()

    def click(self, element):
        from selenium.webdriver.common.action_chains import ActionChains

        self.point_at(element)
        ActionChains(self.driver).click().perform()

    def as_phone(self, width=390, height=844):
        metrics = dict(width=width, height=height, deviceScaleFactor=1, mobile=True)
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def as_laptop(self):
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def pdf(self):
        options = dict(printBackground=True, preferCSSPageSize=True)
        return base64.b64decode(self.driver.execute_cdp_cmd("Page.printToPDF", options)["data"])

    def said(self):
        """What its console has had since the last call."""
        return [line["message"] for line in self.driver.get_log("browser")]
