"""Headless Chromium. ROLLING_SHOTS names a folder for pictures of its pages."""

import os
import shutil
import time
from pathlib import Path

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def needs():
    """Skips where selenium or Chromium is not there."""
    pytest.importorskip("selenium.webdriver")
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("chromium and chromedriver are not installed")


def chromium(profile: Path, size: str):
    """A browser with a profile of its own, and a window of such a size, as in "900,1100"; the caller quits it."""
    needs()
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")  # pyright: ignore[reportAttributeAccessIssue]
    for flag in (*FLAGS, f"--window-size={size}", f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def wait(browser, condition: str, seconds: int = 60):
    """What the script returns, once it is true."""
    for _ in range(seconds * 20):
        answer = browser.execute_script(condition)
        if answer:
            return answer
        time.sleep(0.05)
    raise TimeoutError(condition)


def shot(browser, name: str) -> None:
    if os.environ.get("ROLLING_SHOTS"):
        browser.save_screenshot(f"{os.environ['ROLLING_SHOTS']}/{name}.png")
