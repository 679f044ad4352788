"""The page, in headless Chromium, on the real server: from a prompt to a picture. ROLLING_SHOTS names a folder for
pictures of it."""

import os

import pytest
from own_browser import chromium, shot, wait


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    started = chromium(tmp_path_factory.mktemp("profile"), "900,1100")
    yield started
    started.quit()


@pytest.fixture()
def page(browser, server):
    browser.get("about:blank")
    browser.get(server.url)
    wait(browser, "return document.querySelectorAll('#order option').length > 0")
    return browser


def find(page, name):
    return page.find_element("id", name)


def draw(page, prompt, size="64x64", seed="7", order="top-to-bottom"):
    """What a user does with the keyboard and nothing else."""
    from selenium.webdriver import Keys

    page.execute_script("document.getElementById('size').add(new Option(arguments[0], arguments[0]))", size)
    for name, value in (("size", size), ("order", order)):
        page.execute_script("document.getElementById(arguments[0]).value = arguments[1]", name, value)
    find(page, "seed").clear()
    find(page, "seed").send_keys(seed)
    find(page, "prompt").clear()
    find(page, "prompt").send_keys(prompt, Keys.CONTROL, Keys.ENTER)


FINISHED = "return document.getElementById('status').textContent === 'The picture is finished.'"


def test_from_a_prompt_to_a_picture(page, server):
    assert page.title == "Autoregressive Rolling Diffusion"
    assert page.switch_to.active_element == find(page, "prompt")
    draw(page, "a red ball above a blue boat", "256x256" if os.environ.get("ROLLING_SHOTS") else "128x128")
    first = wait(page, "return document.getElementById('picture').getAttribute('src')")
    wait(page, "return document.getElementById('progress').value > 0.7")
    shot(page, "drawing")
    assert find(page, "picture").get_attribute("alt").startswith("Being drawn: ")
    wait(page, FINISHED, 120)
    image = find(page, "picture")
    assert image.get_attribute("src") != first and image.get_attribute("alt") == "a red ball above a blue boat"
    assert page.execute_script("return arguments[0].naturalWidth", image) in (128, 256)
    assert find(page, "draw").is_enabled() and not find(page, "progress").is_displayed()
    shot(page, "finished")
    draw(page, "a green tree", seed="")
    wait(page, "return document.querySelectorAll('#earlier li').length === 1")
    wait(page, FINISHED)
    page.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    shot(page, "earlier")
    earlier = page.find_element("css selector", "#earlier img")
    assert earlier.get_attribute("alt") == "a red ball above a blue boat" and earlier.is_displayed()
    # The link says again what was said, and works in a page that is opened anew.
    link = page.find_element("css selector", "#earlier a").get_attribute("href")
    page.get("about:blank")
    page.get(link)
    wait(page, "return document.getElementById('prompt').value === 'a red ball above a blue boat'")
    assert find(page, "seed").get_attribute("value") == "7" and find(page, "size").get_attribute("value") in link
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_picture_can_be_stopped(page, server):
    ended = server.count("stopped_total")
    draw(page, "a house", "512x512")
    wait(page, "return !document.getElementById('progress').hidden")
    find(page, "stop").click()
    wait(page, "return document.getElementById('status').textContent === 'Stopped.'")
    server.until(server.idle)
    assert server.count("stopped_total") == ended + 1 and not find(page, "stop").is_displayed()


def test_an_error_is_announced(page):
    draw(page, "a house", "40x40")
    wait(page, "return document.getElementById('error').textContent.includes('multiples of 16')")
    shot(page, "error")
    assert find(page, "error").get_attribute("role") == "alert" and find(page, "draw").is_enabled()


def test_a_key_is_asked_for(browser, rolled):
    from own_serve import hosted
    from selenium.webdriver import Keys

    from rolling_diffusion.serve import Studio, make_app

    with hosted(make_app(Studio(rolled, "embedded"), key="a-key")) as url:
        browser.get(url)
        wait(browser, "return !document.getElementById('key-row').hidden")
        shot(browser, "key")
        assert "API key" in find(browser, "error").text
        find(browser, "key").send_keys("a-key", Keys.TAB)
        wait(browser, "return document.querySelectorAll('#order option').length > 0")
        draw(browser, "a house", "32x32")
        wait(browser, FINISHED)


def test_every_field_has_a_name_and_the_keyboard_reaches_it(page):
    from selenium.webdriver import Keys

    for name in ("prompt", "order", "size", "seed"):
        assert find(page, name).accessible_name
    assert find(page, "draw").aria_role == "button" and find(page, "status").get_attribute("role") == "status"
    find(page, "prompt").click()
    reached = []
    for _ in range(4):
        page.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(page.switch_to.active_element.get_attribute("id"))
    assert reached == ["order", "size", "seed", "draw"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_the_light_and_in_the_dark(page, scheme):
    """At least 4.5 to 1, as WCAG asks of text."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    shot(page, scheme)
    colours = page.execute_script("""
        const pair = (front, back) => [getComputedStyle(document.querySelector(front)).color,
                                       getComputedStyle(document.querySelector(back)).backgroundColor];
        return [pair('body', 'body'), pair('#hint', 'body'), pair('#draw', '#draw'), pair('textarea', 'textarea')]""")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert all(contrast(*pair) >= 4.5 for pair in colours), colours
    dark = luminance(colours[0][1]) < 0.2
    assert dark == (scheme == "dark")


def luminance(colour):
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_narrow_screen_shows_it_whole(page):
    size = page.get_window_size()
    page.set_window_size(500, 900)
    wide = page.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    shot(page, "narrow")
    page.set_window_size(size["width"], size["height"])
    assert wide <= 0
