import base64
import io
import json
import os
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from tucker_cam.evaluation.metrics import energy_in_top, mean_saliency
from tucker_cam.explanations.gallery import gallery_entry, write_gallery

RED, BLUE = (128, 0, 0), (0, 0, 128)
NO_COMPONENTS = np.zeros((0, 7, 7), np.float32)
EVIL = '<script>window.hacked = 1</script>"\'&amp;</script>\n<img src=x onerror="window.hacked=1">.png'
COUNT = 1000


def decoded(uri, kind):
    header, _, data = uri.partition(";base64,")
    assert header == f"data:image/{kind}"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def colours(uri):
    return np.asarray(decoded(uri, "png").convert("RGB")).astype(int)


def entry(name, seed=0, methods=("tsm", "mtsm"), shape=(48, 64), count=3):
    random = np.random.default_rng(seed)
    return gallery_entry(
        name,
        random.random((*shape, 3), np.float32),
        {method: random.random(shape, np.float32) ** (1 + seed + i) for i, method in enumerate(methods)},
        random.standard_normal((count, 7, 7), np.float32),
        np.array([4 + seed, 2, 1, 1], np.float32),
    )


# Entries


def test_an_entry_is_the_same_after_a_way_through_json():
    made = entry("caf\xe9 \udcff.png")
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert made["name"] == "caf\xe9 \\udcff.png"


@pytest.mark.parametrize(
    ("shape", "thumbnail", "small"),
    [((224, 224), (224, 224), (56, 56)), ((448, 224), (112, 224), (28, 56)), ((30, 40), (40, 30), (40, 30))],
)
def test_pictures_and_maps_are_shrunk_to_their_longest_side(shape, thumbnail, small):
    made = entry("x", shape=shape)
    assert made["aspect"] == shape[1] / shape[0]
    assert decoded(made["picture"], "jpeg").size == thumbnail
    for method in ("tsm", "mtsm"):
        image = decoded(made["methods"][method]["map"], "png")
        assert (image.mode, image.size) == ("P", small)
    assert [decoded(each["image"], "png").size for each in made["components"]] == [(7, 7)] * 3


def test_the_thumbnail_shows_the_picture():
    picture = np.zeros((40, 60, 3), np.float32)
    picture[:, 30:] = 1, 0.5, 0
    seen = np.asarray(decoded(gallery_entry("x", picture, {}, NO_COMPONENTS, np.ones(1))["picture"], "jpeg"))
    np.testing.assert_allclose(seen[20, 45], [255, 128, 0], atol=6)
    np.testing.assert_allclose(seen[20, 10], [0, 0, 0], atol=6)


def test_the_hottest_and_the_coldest_pixel_have_the_ends_of_the_overlays_colours():
    saliency = np.full((16, 16), 0.5, np.float32)
    saliency[3, 12], saliency[10, 2] = 1, 0
    seen = colours(
        gallery_entry("x", np.zeros((16, 16, 3)), {"tsm": saliency}, NO_COMPONENTS, np.ones(1))["methods"]["tsm"]["map"]
    )
    assert tuple(seen[3, 12]) == RED
    assert tuple(seen[10, 2]) == BLUE
    assert (seen == RED).all(-1).sum() == 1
    assert (seen == BLUE).all(-1).sum() == 1


def test_a_map_is_shrunk_by_averaging():
    saliency = np.zeros((112, 112), np.float32)
    saliency[60:62, 30:32] = [[1, 0], [0, 0]]
    seen = colours(
        gallery_entry("x", np.zeros((112, 112, 3)), {"a": saliency}, NO_COMPONENTS, np.ones(1))["methods"]["a"]["map"]
    )
    assert np.argwhere((seen != BLUE).any(-1)).tolist() == [[30, 15]]
    # A quarter of the way from blue to red.
    np.testing.assert_allclose(seen[30, 15], [0, 128, 255], atol=10)


def test_maps_have_the_colours_of_the_overlays():
    saliency = np.linspace(0, 1, 1600, dtype=np.float32).reshape(40, 40)
    seen = colours(
        gallery_entry("x", np.zeros((40, 40, 3)), {"tsm": saliency}, NO_COMPONENTS, np.ones(1))["methods"]["tsm"]["map"]
    )
    jet = cv2.applyColorMap(np.uint8(255 * saliency), cv2.COLORMAP_JET)[..., ::-1]
    # Half of one of 64 levels.
    np.testing.assert_allclose(seen, jet, atol=255 * 4 / 63 / 2 + 6)


def test_components_are_white_at_zero_red_above_and_blue_below():
    component = np.array([[0, 2, -2, -1, 4e-9]], np.float32)
    (made,) = gallery_entry("x", np.zeros((4, 4, 3)), {}, component[None], np.ones(2))["components"]
    zero, high, low, half, tiny = colours(made["image"])[0]
    assert zero.min() > 240
    assert zero.max() - zero.min() < 5
    assert high[0] - high[2] > 50
    assert low[2] - low[0] > 50
    assert half[2] - half[0] > 50
    assert half.sum() > low.sum()
    assert tuple(tiny) == tuple(zero)


def test_shares_are_of_the_sum_of_all_singular_values():
    made = gallery_entry("x", np.zeros((4, 4, 3)), {}, np.ones((2, 3, 3)), np.array([5, 3, 1, 1], np.float32))
    assert [each["share"] for each in made["components"]] == [0.5, 0.3]
    assert made["first_share"] == 0.5


def test_statistics_are_the_mean_and_the_energy_of_the_highest_tenth():
    saliency = np.full((4, 5), 0.25, np.float32)
    saliency[1, 2], saliency[3, 3], saliency[0, 0] = 1, 0.75, 0.5
    made = gallery_entry("x", np.zeros((4, 5, 3)), {"a": saliency, "b": saliency[:, :3]}, NO_COMPONENTS, np.ones(1))
    assert made["methods"]["a"]["mean_saliency"] == pytest.approx(6.5 / 20)
    assert made["methods"]["a"]["energy_in_top"] == pytest.approx(1.75 / 6.5)
    # A tenth of twelve pixels: the first, and a fifth of the next.
    assert made["methods"]["b"]["energy_in_top"] == pytest.approx((1 + 0.2 * 0.5) / (1.5 + 10 * 0.25))


def test_statistics_are_those_of_the_evaluation():
    saliency = np.random.default_rng(0).random((33, 47), np.float32).round(1)
    made = gallery_entry("x", np.zeros((33, 47, 3)), {"a": saliency}, NO_COMPONENTS, np.ones(1))["methods"]["a"]
    assert made["mean_saliency"] == pytest.approx(mean_saliency(torch.from_numpy(saliency)[None]).item(), rel=1e-5)
    assert made["energy_in_top"] == pytest.approx(energy_in_top(torch.from_numpy(saliency)[None]).item(), rel=1e-5)


@pytest.mark.parametrize(("value", "mean", "top", "colour"), [(0, 0, 0, BLUE), (1, 1, 0.1, RED)])
def test_a_constant_map_has_one_colour_and_no_peak(value, mean, top, colour):
    saliency = np.full((20, 20), value, np.float32)
    made = gallery_entry("x", np.zeros((20, 20, 3)), {"a": saliency}, NO_COMPONENTS, np.ones(1))["methods"]["a"]
    assert made["mean_saliency"] == mean
    assert made["energy_in_top"] == pytest.approx(top)
    assert (colours(made["map"]) == colour).all()


def test_values_that_are_not_finite_count_as_zero():
    picture = np.full((8, 8, 3), np.nan, np.float32)
    saliency = np.zeros((8, 8), np.float32)
    saliency[0, 0], saliency[1, 1], saliency[2, 2], saliency[3, 3] = np.nan, np.inf, -np.inf, 1
    components = np.array([[[np.nan, np.inf], [1, -1]], [[np.nan] * 2] * 2, [[0, 0]] * 2], np.float32)
    made = gallery_entry("x", picture, {"a": saliency}, components, np.array([np.nan, 3, 1, np.inf], np.float32))
    json.dumps(made, allow_nan=False)
    assert np.asarray(decoded(made["picture"], "jpeg")).max() == 0
    assert made["methods"]["a"]["mean_saliency"] == 1 / 64
    assert np.argwhere((colours(made["methods"]["a"]["map"]) != BLUE).any(-1)).tolist() == [[3, 3]]
    mixed, empty, zero = (colours(each["image"]) for each in made["components"])
    assert (mixed[0] > 240).all()
    assert mixed[1, 0, 0] > mixed[1, 0, 2]
    assert (empty > 240).all()
    assert (zero > 240).all()
    assert [each["share"] for each in made["components"]] == [0, 0.75, 0.25]


def test_values_that_are_all_zero_have_no_shares():
    made = gallery_entry("x", np.zeros((4, 4, 3)), {}, np.zeros((1, 2, 2)), np.zeros(3))
    assert made["first_share"] == 0
    assert made["components"][0]["share"] == 0


def test_a_thousand_pictures_take_some_twenty_megabytes():
    gradient = np.linspace(0, 1, 224, dtype=np.float32)
    bump = np.outer(np.sin(np.pi * gradient), np.sin(np.pi * gradient)).astype(np.float32)
    noise = np.random.default_rng(0).random((28, 28, 3), np.float32).repeat(8, 0).repeat(8, 1)
    made = gallery_entry("x", noise, {"tsm": bump, "mtsm": bump}, np.ones((6, 7, 7), np.float32), np.ones(49))
    assert len(json.dumps(made)) < 30_000


# The file


def test_a_page_is_complete_or_absent(tmp_path):
    def broken():
        yield entry("a")
        raise KeyboardInterrupt

    path = tmp_path / "gallery.html"
    with pytest.raises(KeyboardInterrupt):
        write_gallery(path, "x", broken())
    assert not list(tmp_path.iterdir())
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON"):
        write_gallery(path, "x", [{"share": float("nan")}])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_entries_are_written_as_they_come(tmp_path):
    def watched():
        for _ in range(40):
            yield entry("a")
        (unfinished,) = tmp_path.iterdir()
        sizes.append(unfinished.stat().st_size)

    sizes = []
    write_gallery(tmp_path / "gallery.html", "x", watched())
    assert sizes[0] > 0.9 * (tmp_path / "gallery.html").stat().st_size - 50_000
    assert sizes[0] > 40_000


def test_the_policy_allows_nothing_but_the_page_itself(tmp_path):
    write_gallery(tmp_path / "gallery.html", "x", [])
    (policy,) = re.findall('Content-Security-Policy" content="([^"]*)"', (tmp_path / "gallery.html").read_text())
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.pop("img-src") == "data:"
    assert rules.pop("script-src").startswith("'sha256-")
    assert rules.pop("style-src").startswith("'sha256-")
    assert rules == {"default-src": "'none'", "base-uri": "'none'", "form-action": "'none'"}


# The page in a browser


def unavailable(reason):
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser():
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        unavailable("the gallery's page is tested with the package playwright")
    if executable is None:
        unavailable("the gallery's page is tested in Chromium, which is not installed")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu", *quiet])
        yield browser
        browser.close()


@pytest.fixture
def complaints():
    """What the page's console said, and its errors; nothing, when the test ends."""
    complaints = []
    yield complaints
    assert not complaints


@pytest.fixture
def requests(tmp_path):
    """What the page asked for; nothing but itself, when the test ends."""
    requests = []
    yield requests
    assert [url for url in requests if not url.startswith("data:")] == [(tmp_path / "gallery.html").as_uri()]


@pytest.fixture
def show(browser, tmp_path, requests, complaints):
    """Write a gallery and open it."""
    contexts = []

    def show(entries, title="a gallery", **options):
        path = tmp_path / "gallery.html"
        write_gallery(path, title, entries)
        contexts.append(browser.new_context(viewport={"width": 1000, "height": 700}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(8000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield show
    for context in contexts:
        context.close()


def names(page):
    return page.locator(".thumbnail .name").all_text_contents()


def shown_overlay(page, place=0):
    """Return the source of a thumbnail's overlay, once it has one."""
    # Not wait_for_function: the page's policy forbids the eval that it polls with.
    overlay = page.locator(".thumbnail").nth(place).locator(".overlay[src]")
    overlay.wait_for(state="attached")
    return overlay.get_attribute("src")


def slide(page, percent, place=0):
    page.locator(".opacity").nth(place).evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true})); }",
        percent,
    )


def focused(page):
    return page.evaluate("document.activeElement.closest('li')?.querySelector('.name').textContent")


THREE = [entry(f"{name}.png", seed) for seed, name in enumerate("abc")]


def test_thumbnails_show_picture_and_overlay(show):
    page = show(THREE)
    for place, made in enumerate(THREE):
        assert shown_overlay(page, place) == made["methods"]["tsm"]["map"]
        assert page.locator(".thumbnail .picture").nth(place).get_attribute("src") == made["picture"]
    page.evaluate("Promise.all([...document.querySelectorAll('img[src]')].map((image) => image.decode()))")
    assert page.locator("#count").text_content() == "3 pictures"
    picture, overlay = (page.locator(f".thumbnail .{kind}").first.bounding_box() for kind in ("picture", "overlay"))
    assert overlay == picture
    assert picture["width"] / picture["height"] == pytest.approx(64 / 48, rel=0.02)


def test_nothing_can_be_fetched(show, requests, complaints):
    page = show(THREE)
    blocked = page.evaluate(
        """() => new Promise((done) => {
            const image = new Image();
            image.onload = () => done(false);
            document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
            image.src = "https://example.invalid/x.png";
        })"""
    )
    assert blocked == "img-src"
    assert requests.pop() == "https://example.invalid/x.png"
    assert "violates the following Content Security Policy" in complaints.pop()


def test_the_slider_changes_the_opacity_of_every_overlay(show):
    page = show(THREE)
    opacities = "[...document.querySelectorAll('.overlay')].map((image) => Number(getComputedStyle(image).opacity))"
    assert set(page.evaluate(opacities)) == {0.5}
    slide(page, 20)
    assert set(page.evaluate(opacities)) == {0.2}
    page.locator(".thumbnail").first.click()
    slide(page, 90, place=1)
    assert set(page.evaluate(opacities)) == {0.9}
    assert page.locator(".opacity").first.input_value() == "90"


def test_the_slider_is_moved_by_the_arrow_keys_and_the_picture_stays(show):
    page = show(THREE)
    page.locator(".thumbnail").first.click()
    page.locator("dialog .opacity").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("getComputedStyle(document.querySelector('.overlay')).opacity") == "0.51"
    assert page.locator("#detail-name").text_content() == "a.png"


@pytest.mark.parametrize("by", ["click", "key"])
def test_the_method_switch_changes_all_thumbnails(show, by):
    page = show(THREE)
    shown_overlay(page)
    if by == "click":
        page.get_by_role("radio", name="mtsm").click()
    else:
        page.keyboard.press("2")
    assert page.get_by_role("radio", name="mtsm").is_checked()
    for place, made in enumerate(THREE):
        assert shown_overlay(page, place) == made["methods"]["mtsm"]["map"]
    page.keyboard.press("3")
    assert page.get_by_role("radio", name="mtsm").is_checked()


@pytest.mark.parametrize("by", ["click", "Enter"])
def test_the_detail_view_opens_shows_all_and_gives_the_focus_back(show, by):
    page = show(THREE)
    assert not page.locator("dialog").is_visible()
    if by == "click":
        page.locator(".thumbnail").nth(1).click()
    else:
        page.locator(".thumbnail").nth(1).focus()
        page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="b.png")
    assert dialog.is_visible()
    made = THREE[1]
    assert dialog.locator("#large .overlay").get_attribute("src") == made["methods"]["tsm"]["map"]
    assert dialog.get_by_role("img", name="b.png, overlaid with its tsm map").is_visible()
    assert [tile.get_attribute("src") for tile in dialog.locator(".tile .overlay").all()] == [
        made["methods"][method]["map"] for method in ("tsm", "mtsm")
    ]
    for tile, (method, shown) in zip(dialog.locator(".tile").all(), made["methods"].items(), strict=True):
        text = tile.inner_text()
        assert method in text
        assert f"{shown['mean_saliency']:.3f}" in text
        assert f"{100 * shown['energy_in_top']:.1f} %" in text
    components = dialog.locator("#components img")
    assert [image.get_attribute("src") for image in components.all()] == [each["image"] for each in made["components"]]
    # The singular values are 5, 2, 1 and 1.
    assert dialog.locator("#components figcaption").all_text_contents() == ["1: 55.6 %", "2: 22.2 %", "3: 11.1 %"]
    assert dialog.locator("#first-share").text_content() == "55.6 %"
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="hidden")
    page.locator("li:focus-within", has_text="b.png").wait_for()


def test_the_arrow_keys_move_in_the_detail_view_and_stop_at_the_ends(show):
    page = show(THREE)
    page.locator(".thumbnail").first.click()
    seen = []
    for key in ("ArrowLeft", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight"):
        page.keyboard.press(key)
        seen.append((page.locator("#detail-name").text_content(), page.locator("#place").text_content()))
    assert seen == [(f"{'abc'[place - 1]}.png", f"{place} / 3") for place in (1, 2, 3, 3, 2, 3)]
    assert page.locator("#large .overlay").get_attribute("src") == THREE[2]["methods"]["tsm"]["map"]
    assert page.locator("#next").is_disabled()
    page.locator("#previous").click()
    assert page.locator("#detail-name").text_content() == "b.png"
    page.keyboard.press("Escape")
    page.locator("li:focus-within", has_text="b.png").wait_for()


def test_the_method_is_switched_in_the_detail_view_too(show):
    page = show(THREE)
    page.locator(".thumbnail").first.click()
    page.keyboard.press("2")
    assert page.locator("#large .overlay").get_attribute("src") == THREE[0]["methods"]["mtsm"]["map"]
    page.locator(".tile").first.click()
    assert page.locator("#large .overlay").get_attribute("src") == THREE[0]["methods"]["tsm"]["map"]
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    page.locator("#close").click()
    assert shown_overlay(page) == THREE[0]["methods"]["tsm"]["map"]


def test_tab_and_the_arrow_keys_move_through_the_thumbnails(show):
    page = show([entry(f"{number}.png") for number in range(12)])
    page.locator(".thumbnail").first.focus()
    page.keyboard.press("Tab")
    assert focused(page) == "1.png"
    columns = page.evaluate(
        "new Set([...document.querySelectorAll('.thumbnail')].map((each) => each.getBoundingClientRect().x)).size"
    )
    assert 3 <= columns <= 8
    for key, expected in [
        ("ArrowRight", 2),
        ("ArrowDown", 2 + columns),
        ("ArrowLeft", 1 + columns),
        ("ArrowUp", 1),
        ("ArrowUp", 1),
    ]:
        page.keyboard.press(key)
        assert focused(page) == f"{expected}.png"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2


UNSORTED = [entry(f"picture-{number}.png", seed) for seed, number in enumerate((9, 10, 2, 1))]
UNSORTED[2]["methods"]["tsm"]["mean_saliency"] = 0.9
UNSORTED[1]["first_share"] = 0.01


@pytest.mark.parametrize("direction", ["ascending", "descending"])
@pytest.mark.parametrize("method", ["tsm", "mtsm"])
@pytest.mark.parametrize("key", ["name", "mean_saliency", "energy_in_top", "first_share"])
def test_pictures_are_sorted(show, key, method, direction):
    page = show(UNSORTED)
    page.locator("#key").select_option(key)
    page.get_by_role("radio", name=method, exact=True).click()
    if direction == "descending":
        page.locator("#direction").click()

    def rank(made):
        if key == "name":
            return int(re.search("[0-9]+", made["name"])[0])
        return made[key] if key == "first_share" else made["methods"][method][key]

    expected = sorted(UNSORTED, key=rank, reverse=direction == "descending")
    assert names(page) == [made["name"] for made in expected]
    assert page.locator("#direction").text_content() == direction
    overlays = [shown_overlay(page, place) for place in range(4)]
    assert overlays == [made["methods"][method]["map"] for made in expected]


def test_a_thumbnail_keeps_the_focus_when_the_order_changes(show):
    page = show(UNSORTED)
    page.locator("#key").select_option("mean_saliency")
    page.locator(".thumbnail").nth(1).focus()
    before = focused(page)
    page.keyboard.press("2")
    assert focused(page) == before


def test_pictures_are_found_by_name(show):
    page = show(THREE)
    page.locator("#wanted").fill("B.p")
    assert names(page) == ["b.png"]
    assert page.locator("#count").text_content() == "1 of 3 pictures"
    page.locator("#wanted").press_sequentially("2")
    assert names(page) == []
    assert page.get_by_role("radio", name="tsm", exact=True).is_checked()
    assert page.locator("#empty").is_visible()
    page.locator("#wanted").fill("")
    assert names(page) == ["a.png", "b.png", "c.png"]


def test_a_missing_method_is_said_and_sorted_last(show):
    page = show([entry("a.png", methods=("tsm",), count=0), *THREE[1:]])
    shown_overlay(page)
    assert not page.get_by_text("no map of").first.is_visible()
    page.keyboard.press("2")
    assert page.locator(".thumbnail").first.get_by_text("no map of mtsm").is_visible()
    assert not page.locator(".thumbnail .overlay").first.is_visible()
    assert not page.locator(".thumbnail").nth(1).get_by_text("no map of mtsm").is_visible()
    page.locator(".thumbnail").first.click()
    assert page.locator("#large").get_by_text("no map of mtsm").is_visible()
    assert page.locator(".tile b").all_text_contents() == ["tsm"]
    assert not page.locator("#components-section").is_visible()
    page.keyboard.press("Escape")
    for _ in range(2):
        page.locator("#key").select_option("mean_saliency")
        assert names(page)[-1] == "a.png"
        page.locator("#direction").click()
    assert page.locator(".thumbnail .number").last.text_content() == ""


def test_names_and_titles_are_text_whatever_they_hold(show):
    title = "</title><script>window.hacked = 1</script> & \udcfe {{policy}} <!-- entries -->"
    evil = [EVIL, "&amp;&lt;b&gt;.png", "\udcff\u2028.png", "<!--<script>"]
    page = show([entry(name) for name in evil], title)
    expected = {EVIL, "&amp;&lt;b&gt;.png", "\\udcff\u2028.png", "<!--<script>"}
    assert set(names(page)) == expected
    assert page.locator("h1").text_content() == title.replace("\udcfe", "\\udcfe")
    assert page.title() == title.replace("\udcfe", "\\udcfe")
    seen = set()
    page.locator(".thumbnail").first.click()
    for _ in evil:
        seen.add(page.locator("#detail-name").text_content())
        page.keyboard.press("ArrowRight")
    assert seen == expected
    assert page.evaluate("window.hacked") is None
    assert page.locator("script").count() == 1
    assert page.locator("img[onerror]").count() == 0


def test_a_title_like_a_placeholder_does_not_change_the_policy(show):
    page = show(THREE, "{{policy}} {{title}}")
    assert page.locator("h1").text_content() == "{{policy}} {{title}}"


def test_an_empty_gallery_says_so(show):
    page = show([])
    assert page.get_by_text("There are no pictures in this gallery.").is_visible()
    assert not page.locator("#key").is_visible()


def test_dark_and_light_differ(show):
    page = show(THREE)
    seen = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        seen[scheme] = page.evaluate(
            """["backgroundColor", "color"].map((each) =>
                getComputedStyle(document.body)[each].match(/[0-9]+/g).map(Number).reduce((a, b) => a + b))"""
        )
    (light_paper, light_ink), (dark_paper, dark_ink) = seen["light"], seen["dark"]
    assert light_paper > 600 > 200 > light_ink
    assert dark_ink > 600 > 200 > dark_paper


@pytest.mark.parametrize("width", [320, 390])
def test_nothing_is_cut_off_at_the_width_of_a_phone(show, width):
    page = show([*THREE, entry(f"{'long' * 30}.png")])
    page.set_viewport_size({"width": width, "height": 700})
    within = "(selector) => { const box = document.querySelector(selector); return box.scrollWidth <= box.clientWidth }"
    assert page.evaluate(within, "html")
    assert page.locator(".thumbnail").nth(1).bounding_box()["x"] > 100
    page.locator(".thumbnail").last.click()
    assert page.evaluate(within, "dialog")
    close = page.locator("#close").bounding_box()
    assert close["x"] + close["width"] <= width


def test_a_thousand_pictures_hold_images_only_near_the_screen(show):
    made = [entry("x", seed) for seed in range(5)]
    page = show({**made[i % 5], "name": f"{i}.png", "first_share": (i * 379 % COUNT) / COUNT} for i in range(COUNT))
    attached = "document.querySelectorAll('.thumbnail .overlay[src]').length"
    shown_overlay(page)
    assert page.locator("#count").text_content() == f"{COUNT} pictures"
    assert page.evaluate(attached) < 150
    # Whatever the slider, the switch and the order do to the page's elements is counted.
    page.evaluate(
        """() => {
            window.changes = 0;
            const observer = new MutationObserver((records) => { window.changes += records.length; });
            observer.observe(document.querySelector("main"), { subtree: true, attributes: true, childList: true });
        }"""
    )
    slide(page, 80)
    assert page.evaluate("Promise.resolve().then(() => window.changes)") == 0
    page.keyboard.press("2")
    assert shown_overlay(page) == made[0]["methods"]["mtsm"]["map"]
    assert 0 < page.evaluate("window.changes") < 150 * 6
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    assert shown_overlay(page, COUNT - 1) == made[(COUNT - 1) % 5]["methods"]["mtsm"]["map"]
    page.locator("li:first-child .overlay:not([src])").wait_for(state="attached")
    assert page.evaluate(attached) < 150
    page.locator("#key").select_option("first_share")
    expected = sorted(range(COUNT), key=lambda i: i * 379 % COUNT)
    assert names(page) == [f"{i}.png" for i in expected]
    page.evaluate("scrollTo(0, 0)")
    assert shown_overlay(page) == made[0]["methods"]["mtsm"]["map"]
    assert page.evaluate(attached) < 300


def test_a_thousand_pictures_do_not_stall_the_page(show):
    made = entry("x")
    page = show({**made, "name": f"{i}.png"} for i in range(COUNT))
    shown_overlay(page)
    shortest = page.evaluate(
        """() => {
            const settled = () => document.body.getBoundingClientRect();
            const actions = {
                method: (turn) => document.querySelectorAll("[name=method]")[1 - turn % 2].click(),
                order: () => document.querySelector("#direction").click(),
                slider: (turn) => {
                    const slider = document.querySelector(".opacity");
                    slider.value = 20 + turn;
                    slider.dispatchEvent(new Event("input"));
                },
            };
            return Object.values(actions).map((act) => Math.min(...[0, 1, 2].map((turn) => {
                const start = performance.now();
                act(turn);
                settled();
                return performance.now() - start;
            })));
        }"""
    )
    # Milliseconds; some 30 for the order and less for the others, unless the machine has much else to do.
    assert max(shortest) < 1000
