"""Chromium for tests of pages: `Browser`. The fixture `browser` is one."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from free_ports import free_port
from processes import eventually

if TYPE_CHECKING:
    from managed_vllm.agent.viewer import WrittenPage

CHROMIUM_FLAGS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "disable-dev-shm-usage",
    "window-size=1400,1000",
)


class Browser:
    """Chromium, through its driver, with the page that it shows."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, written: WrittenPage, fragment: str = "") -> Browser:
        self.go(written.path.as_uri() + fragment)
        self.until("return document.body.dataset.read === 'whole'")
        return self

    def go(self, url: str) -> None:
        """Begins to load a page."""
        self.driver.get("about:blank")  # with another fragment alone the same page would stay
        self.until("return location.href === 'about:blank'")
        self.driver.get(url)
        self.until("return location.href !== 'about:blank' && document.body !== null")

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, *arguments: Any) -> Any:
        return eventually(lambda: self.js(script, *arguments), script)

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def click(self, selector: str) -> None:
        """Waits for the element: a page that is served may be about to show it, or to put another in its place."""
        eventually(lambda: self._clicked(selector), f"{selector} is there to be clicked")

    def _clicked(self, selector: str) -> bool:
        from selenium.common import exceptions

        with contextlib.suppress(exceptions.NoSuchElementException, exceptions.StaleElementReferenceException):
            self.driver.find_element("css selector", selector).click()
            return True
        return False

    def texts(self, selector: str) -> list[str]:
        texts: list[str] = self.js(
            # The driver can't hand over half a surrogate pair.
            "return [...document.querySelectorAll(arguments[0])].map((each) => each.textContent.toWellFormed())",
            selector,
        )
        return texts

    def tile(self, name: str) -> str:
        (text,) = self.texts(f'[data-tile="{name}"]')
        return text

    def tasks(self) -> list[str]:
        return self.texts("#body tr[data-at] a")

    def set(self, name: str, value: str) -> None:
        script = "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        self.js(f"{script} e.dispatchEvent(new Event('input', {{bubbles: true}}))", name, value)

    @property
    def fragment(self) -> str:
        return str(self.js("return decodeURIComponent(location.hash)"))

    @property
    def step(self) -> str | None:
        found: str | None = self.js("return document.querySelector('#strip [aria-current]')?.dataset.step")
        return found

    def middle(self, selector: str) -> tuple[float, float]:
        """Of an element, in pixels of the window."""
        x, y = self.js(
            "const r = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [r.left + r.width / 2, r.top + r.height / 2]",
            selector,
        )
        return x, y

    def box(self, selector: str) -> tuple[float, float, float, float]:
        left, top, width, height = self.js(
            "const r = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [r.left, r.top, r.width, r.height]",
            selector,
        )
        return left, top, width, height

    def assert_silent(self) -> None:
        """Nothing went wrong in the page, and nothing was refused by its policy."""
        assert [each["message"] for each in self.driver.get_log("browser")] == []


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    for name, path in found.items():
        if path is None:
            pytest.skip(f"{name} is not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    for flag in CHROMIUM_FLAGS:
        options.add_argument(f"--{flag}")
    options.page_load_strategy = "none"  # a page is looked at while it is being read
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    folder = tmp_path_factory.mktemp("chromium")
    environ = {**os.environ, "TMPDIR": str(folder)}
    service = webdriver.ChromeService(found["chromedriver"], port=free_port(), env=environ)
    driver = webdriver.Chrome(options, service)
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    chromium.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    chromium.driver.get_log("browser")
    yield chromium
    chromium.assert_silent()
