"""The gallery: what is shrunk for it, the file, and the page as a browser shows it."""

import base64
import io
import json
import os
import re
import shutil
from itertools import product

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from tucker_cam.evaluation.metrics import energy_in_top, mean_saliency
from tucker_cam.explanations.gallery import gallery_entry, write_gallery

RED, BLUE = (128, 0, 0), (0, 0, 128)
COUNT = 1000


def decoded(uri, kind):
    header, _, data = uri.partition(";base64,")
    assert header == f"data:image/{kind}"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def colours(uri):
    return np.asarray(decoded(uri, "png").convert("RGB")).astype(int)


def entry(name="x", seed=0, methods=("tsm", "mtsm"), shape=(48, 64), **given):
    random = np.random.default_rng(seed)
    parts = {
        "picture": random.random((*shape, 3), np.float32),
        "maps": {method: random.random(shape, np.float32) ** (1 + seed + i) for i, method in enumerate(methods)},
        "components": random.standard_normal((3, 7, 7), np.float32),
        "values": np.array([4 + seed, 2, 1, 1], np.float32),
    }
    return gallery_entry(name, **parts | given)


@pytest.mark.parametrize(
    ("shape", "thumbnail", "small"),
    [((224, 224), (224, 224), (56, 56)), ((448, 224), (112, 224), (28, 56)), ((30, 40), (40, 30), (40, 30))],
)
def test_pictures_and_maps_are_shrunk_to_their_longest_side_and_can_be_kept_as_json(shape, thumbnail, small):
    made = entry(shape=shape)
    assert made["aspect"] == shape[1] / shape[0]
    assert decoded(made["picture"], "jpeg").size == thumbnail
    assert [decoded(each["map"], "png").size for each in made["methods"].values()] == [small] * 2
    assert [decoded(each["image"], "png").size for each in made["components"]] == [(7, 7)] * 3
    assert json.loads(json.dumps(made, allow_nan=False)) == made


def test_the_picture_has_its_colours_and_maps_those_of_the_overlays():
    picture = np.zeros((40, 40, 3), np.float32)
    picture[:, 20:] = 1, 0.5, 0
    saliency = np.linspace(0, 1, 1600, dtype=np.float32).reshape(40, 40)
    made = entry(picture=picture, maps={"tsm": saliency})
    seen = np.asarray(decoded(made["picture"], "jpeg"))
    np.testing.assert_allclose(seen[20, [10, 30]], [[0, 0, 0], [255, 128, 0]], atol=6)
    seen = colours(made["methods"]["tsm"]["map"])
    assert (tuple(seen[0, 0]), tuple(seen[-1, -1])) == (BLUE, RED)
    jet = cv2.applyColorMap(np.uint8(255 * saliency), cv2.COLORMAP_JET)[..., ::-1]
    # Half of one of 64 levels.
    np.testing.assert_allclose(seen, jet, atol=255 * 4 / 63 / 2 + 6)


def test_a_map_is_shrunk_by_averaging():
    saliency = np.zeros((112, 112), np.float32)
    saliency[60, 30] = 1
    seen = colours(entry(maps={"tsm": saliency})["methods"]["tsm"]["map"])
    assert np.argwhere((seen != BLUE).any(-1)).tolist() == [[30, 15]]
    # A quarter of the way from blue to red.
    np.testing.assert_allclose(seen[30, 15], [0, 128, 255], atol=10)


def test_components_are_white_at_zero_red_above_and_blue_below():
    (made,) = entry(components=np.array([[[0, 2, -2, -1, 4e-9]]], np.float32))["components"]
    zero, high, low, half, tiny = colours(made["image"])[0]
    assert zero.min() > 240
    assert tuple(tiny) == tuple(zero)
    assert high[0] - high[2] > 50
    assert min(low[2] - low[0], half[2] - half[0]) > 50
    assert half.sum() > low.sum()


def test_statistics_are_those_of_the_evaluation():
    random = np.random.default_rng(0)
    # Of 4 x 3 pixels a tenth is no whole number.
    for saliency in random.random((4, 5)), random.random((4, 3)), np.zeros((4, 5)), np.ones((4, 5)):
        made, batch = entry(maps={"tsm": saliency})["methods"]["tsm"], torch.from_numpy(saliency)[None]
        assert made["mean_saliency"] == pytest.approx(mean_saliency(batch).item())
        assert made["energy_in_top"] == pytest.approx(energy_in_top(batch).item())


def test_values_that_are_not_finite_count_as_zero_and_zeros_have_no_shares():
    odd = np.diag([np.nan, np.inf, -np.inf, 1]).astype(np.float32)
    made = entry(picture=np.full((8, 8, 3), np.nan), maps={"tsm": odd}, components=odd[None], values=odd.diagonal()[2:])
    assert np.asarray(decoded(made["picture"], "jpeg")).max() == 0
    assert made["methods"]["tsm"]["mean_saliency"] == 1 / 16
    assert np.argwhere((colours(made["methods"]["tsm"]["map"]) != BLUE).any(-1)).tolist() == [[3, 3]]
    assert np.argwhere((colours(made["components"][0]["image"]) < 240).any(-1)).tolist() == [[3, 3]]
    assert made["components"][0]["share"] == 0
    assert entry(values=np.zeros(3, np.float32))["first_share"] == 0


def test_entries_are_written_as_they_come_and_a_page_is_complete_or_absent(tmp_path):
    def broken():
        for _ in range(40):
            yield entry()
        written.extend(file.stat().st_size for file in tmp_path.iterdir() if file != path)
        yield {"share": float("nan")}

    path, written = tmp_path / "gallery.html", []
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON"):
        write_gallery(path, "x", broken())
    assert written[0] > 20 * len(json.dumps(entry()))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def browser():
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not os.environ.get("CI"):
        pytest.importorskip("playwright", reason="the gallery's page is tested with the package playwright")
        if executable is None:
            pytest.skip("the gallery's page is tested in Chromium, which is not installed")
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=executable, args=options)


@pytest.fixture
def show(browser, tmp_path):
    """Write a gallery and open it: the page asks for nothing but itself, and its console stays silent."""
    requests, complaints = [], []
    with browser.new_context(viewport={"width": 1000, "height": 700}) as context:
        page = context.new_page()
        page.set_default_timeout(8000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))

        def show(entries, title="a gallery"):
            write_gallery(tmp_path / "gallery.html", title, entries)
            page.goto((tmp_path / "gallery.html").as_uri())
            return page

        yield show
    assert not complaints
    assert [url for url in requests if not url.startswith("data:")] == [(tmp_path / "gallery.html").as_uri()]


def names(page):
    return page.locator(".thumbnail .name").all_text_contents()


def overlay(page, place=0):
    """Return the source of a thumbnail's overlay, once it has one."""
    # Not wait_for_function: the page's policy forbids the eval that it polls with.
    shown = page.locator(".thumbnail").nth(place).locator(".overlay[src]")
    shown.wait_for(state="attached")
    return shown.get_attribute("src")


def large_overlay(page):
    return page.locator("#views .overlay").first.get_attribute("src")


def focused(page):
    return page.evaluate("document.activeElement.closest('li')?.querySelector('.name').textContent")


THREE = [entry(f"{name}.png", seed) for seed, name in enumerate("abc")]
MAPS = {method: [made["methods"][method]["map"] for made in THREE] for method in ("tsm", "mtsm")}


def test_thumbnails_show_picture_and_overlay_of_the_method_and_opacity_that_are_chosen(show):
    page = show(THREE)
    assert [overlay(page, place) for place in range(3)] == MAPS["tsm"]
    pictures = page.locator(".thumbnail .picture")
    assert [each.get_attribute("src") for each in pictures.all()] == [made["picture"] for made in THREE]
    assert page.locator(".thumbnail .overlay").first.bounding_box() == pictures.first.bounding_box()
    page.get_by_role("radio", name="mtsm").click()
    assert [overlay(page, place) for place in range(3)] == MAPS["mtsm"]
    for key, method in (("1", "tsm"), ("2", "mtsm"), ("3", "mtsm")):
        page.keyboard.press(key)
        assert page.get_by_role("radio", name=method, exact=True).is_checked()
        assert [overlay(page, place) for place in range(3)] == MAPS[method]
    opacities = "[...document.querySelectorAll('.overlay')].map((image) => Number(getComputedStyle(image).opacity))"
    assert set(page.evaluate(opacities)) == {0.5}
    page.locator(".opacity").first.fill("20")
    assert set(page.evaluate(opacities)) == {0.2}
    page.locator(".thumbnail").first.click()
    page.locator("dialog .opacity").fill("90")
    page.keyboard.press("ArrowRight")
    assert set(page.evaluate(opacities)) == {0.91}
    assert page.locator(".opacity").first.input_value() == "91"
    assert page.locator("#detail-name").text_content() == "a.png"


def test_the_detail_view_shows_all_of_a_picture_and_is_moved_and_switched_by_keys_and_buttons(show):
    page = show(THREE)
    page.locator(".thumbnail").nth(1).focus()
    page.keyboard.press("Enter")
    dialog, made = page.get_by_role("dialog", name="b.png"), THREE[1]
    assert dialog.get_by_role("img", name="b.png, overlaid with its tsm map").is_visible()
    assert large_overlay(page) == MAPS["tsm"][1]
    for tile, (method, shown) in zip(dialog.locator(".tile").all(), made["methods"].items(), strict=True):
        assert tile.locator(".overlay").get_attribute("src") == shown["map"]
        for said in (method, f"{shown['mean_saliency']:.3f}", f"{100 * shown['energy_in_top']:.1f} %"):
            assert said in tile.inner_text()
    components = dialog.locator("#components img").all()
    assert [image.get_attribute("src") for image in components] == [each["image"] for each in made["components"]]
    # The singular values are 5, 2, 1 and 1.
    assert dialog.locator("#components figcaption").all_text_contents() == ["1: 55.6 %", "2: 22.2 %", "3: 11.1 %"]
    assert dialog.locator("#first-share").text_content() == "55.6 %"
    page.keyboard.press("Escape")
    page.locator("li:focus-within", has_text="b.png").wait_for()
    page.locator(".thumbnail").first.click()
    seen = []
    for key in ("ArrowLeft", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight"):
        page.keyboard.press(key)
        seen.append((page.locator("#detail-name").text_content(), page.locator("#place").text_content()))
    assert seen == [(f"{'abc'[place - 1]}.png", f"{place} / 3") for place in (1, 2, 3, 3, 2, 3)]
    assert page.locator("#next").is_disabled()
    page.locator("#previous").click()
    assert large_overlay(page) == MAPS["tsm"][1]
    page.keyboard.press("2")
    assert large_overlay(page) == MAPS["mtsm"][1]
    page.locator(".tile").first.click()
    assert large_overlay(page) == MAPS["tsm"][1]
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    page.locator("#close").click()
    page.locator("li:focus-within", has_text="b.png").wait_for()


def test_two_methods_stand_side_by_side_under_one_slider_and_stay_from_picture_to_picture(show):
    page = show(THREE)
    page.locator(".thumbnail").first.click()
    left, right = page.locator("#views figure").all()
    assert left.is_visible()
    assert not right.is_visible()
    page.get_by_label("Beside it").focus()
    page.keyboard.press("End")
    page.keyboard.press("Tab")
    for width in (1280, 390, 320):
        page.set_viewport_size({"width": width, "height": 800})
        boxes = [view.locator(".stage").bounding_box() for view in (left, right)]
        assert boxes[0]["y"] == boxes[1]["y"]
        assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
        assert boxes[1]["x"] + boxes[1]["width"] <= width
        assert boxes[0]["width"] == boxes[1]["width"] > 0.38 * width
    page.locator("dialog .opacity").fill("70")
    opacity = "image => getComputedStyle(image).opacity"
    for place in (0, 1):
        for view, method in ((left, "tsm"), (right, "mtsm")):
            assert view.locator(".overlay").get_attribute("src") == MAPS[method][place]
            assert view.locator(".picture").get_attribute("src") == THREE[place]["picture"]
            assert view.locator("b").text_content() == method
            assert view.locator(".overlay").evaluate(opacity) == "0.7"
        page.locator("#next").click()
    page.get_by_label("Beside it").select_option("no other method")
    assert not right.is_visible()


@pytest.mark.parametrize("colormap", ["jet", "viridis"])
def test_the_overlays_that_were_written_are_linked(show, tmp_path, colormap):
    Image.new("RGB", (600, 400)).save(tmp_path / "a 1%.png")
    made = {**THREE[0], "methods": {**THREE[0]["methods"]}}
    made["methods"]["tsm"] = {**made["methods"]["tsm"], "file": "a%201%25.png", "colormap": colormap}
    page = show([made, THREE[1]])
    page.locator(".thumbnail").first.click()
    link = page.locator("#views a").first
    assert link.text_content() == "full-size overlay" + (", in viridis" if colormap == "viridis" else "")
    with page.context.expect_page() as opened:
        link.click()
    opened.value.wait_for_load_state()
    assert opened.value.evaluate("document.images[0].naturalWidth") == 600
    page.keyboard.press("2")
    assert not link.is_visible()
    page.keyboard.press("1")
    page.keyboard.press("ArrowRight")
    assert not link.is_visible()


def test_tab_and_the_arrow_keys_move_through_the_thumbnails(show):
    page = show([entry(f"{number}.png") for number in range(12)])
    page.locator(".thumbnail").first.focus()
    page.keyboard.press("Tab")
    assert focused(page) == "1.png"
    columns = len({each.bounding_box()["x"] for each in page.locator(".thumbnail").all()})
    assert 3 <= columns <= 8
    for key, expected in {"ArrowRight": 2, "ArrowDown": 2 + columns, "ArrowLeft": 1 + columns, "ArrowUp": 1}.items():
        page.keyboard.press(key)
        assert focused(page) == f"{expected}.png"


def test_pictures_are_sorted_and_a_thumbnail_keeps_the_focus(show):
    made = [entry(f"picture-{number}.png", seed) for seed, number in enumerate((9, 10, 2, 1))]
    made[2]["methods"]["tsm"]["mean_saliency"] = 0.9
    made[1]["first_share"] = 0.01

    def rank(each):
        number = int(re.search("[0-9]+", each["name"])[0])
        return {"name": number, "first_share": each["first_share"], **each["methods"][method]}[key]

    page = show(made)
    keys = ("name", "mean_saliency", "energy_in_top", "first_share")
    for key, direction, method in product(keys, ("ascending", "descending"), ("tsm", "mtsm")):
        page.locator("#key").select_option(key)
        if page.locator("#direction").text_content() != direction:
            page.locator("#direction").click()
        page.locator(".thumbnail").nth(1).focus()
        before = focused(page)
        page.keyboard.press("1" if method == "tsm" else "2")
        assert focused(page) == before
        expected = sorted(made, key=rank, reverse=direction == "descending")
        assert names(page) == [each["name"] for each in expected]
        assert [overlay(page, place) for place in range(4)] == [each["methods"][method]["map"] for each in expected]


def test_pictures_are_found_by_name(show):
    page = show(THREE)
    page.locator("#wanted").fill("B.p")
    assert names(page) == ["b.png"]
    assert page.locator("#count").text_content() == "1 of 3 pictures"
    page.locator("#wanted").press_sequentially("2")
    assert page.get_by_role("radio", name="tsm", exact=True).is_checked()
    assert page.locator("#empty").is_visible()
    page.locator("#wanted").fill("")
    assert names(page) == ["a.png", "b.png", "c.png"]


def test_a_missing_method_is_said_and_sorted_last(show):
    page = show([entry("a.png", methods=("tsm",), components=np.zeros((0, 7, 7), np.float32)), *THREE[1:]])
    first, second = (page.locator(".thumbnail").nth(place).get_by_text("no map of mtsm") for place in (0, 1))
    page.keyboard.press("2")
    first.wait_for()
    assert not second.is_visible()
    assert not page.locator(".thumbnail .overlay").first.is_visible()
    page.locator(".thumbnail").first.click()
    assert page.locator("#views").get_by_text("no map of mtsm").is_visible()
    assert page.locator(".tile b").all_text_contents() == ["tsm"]
    assert not page.locator("#components-section").is_visible()
    page.keyboard.press("Escape")
    page.locator("#key").select_option("mean_saliency")
    for _ in range(2):
        assert names(page)[-1] == "a.png"
        page.locator("#direction").click()


def test_names_and_titles_are_text_whatever_they_hold(show):
    title = "</title><script>window.hacked = 1</script> & \udcfe {{policy}} {{title}} <!-- entries -->"
    evil = [
        '<script>window.hacked = 1</script>"\'&amp;</script>\n<img src=x onerror="window.hacked=1">.png',
        "&lt;b&gt; \udcff\u2028 <!--<script>",
    ]
    page = show([entry(name) for name in evil], title)
    assert set(names(page)) == {name.replace("\udcff", "\\udcff") for name in evil}
    assert page.locator("h1").text_content() == page.title() == title.replace("\udcfe", "\\udcfe")
    page.locator(".thumbnail").first.click()
    for name in names(page):
        assert page.locator("#detail-name").text_content() == name
        page.keyboard.press("ArrowRight")
    assert page.evaluate("window.hacked") is None
    assert page.locator("script, img[onerror]").count() == 1


def test_an_empty_gallery_says_so(show):
    page = show([])
    assert page.get_by_text("There are no pictures in this gallery.").is_visible()
    assert not page.locator("#key").is_visible()


def test_a_dark_screen_and_that_of_a_phone_are_followed(show):
    page = show([*THREE, entry(f"{'long' * 30}.png")])
    said = page.get_by_text("Red: the features are strong together there; blue: they are weak. No label was asked for.")
    within = "(selector) => { const box = document.querySelector(selector); return box.scrollWidth <= box.clientWidth }"
    for width in (320, 390):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate(within, "html")
        assert said.is_visible()
        assert page.locator(".thumbnail").nth(1).bounding_box()["x"] > 100
        page.locator(".thumbnail").last.click()
        assert page.evaluate(within, "dialog")
        close = page.locator("#close").bounding_box()
        assert close["x"] + close["width"] <= width
        page.locator("#close").click()
    sums = """["backgroundColor", "color"].map((each) =>
        getComputedStyle(document.body)[each].match(/[0-9]+/g).map(Number).reduce((a, b) => a + b))"""
    for scheme, order in (("light", -1), ("dark", 1)):
        page.emulate_media(color_scheme=scheme)
        darker, lighter = page.evaluate(sums)[::order]
        assert darker < 200 < 600 < lighter


def test_a_thousand_pictures_hold_images_only_near_the_screen(show):
    made = [entry("x", seed) for seed in range(5)]
    page = show({**made[i % 5], "name": f"{i}.png", "first_share": (i * 379 % COUNT) / COUNT} for i in range(COUNT))
    attached = "document.querySelectorAll('.thumbnail .overlay[src]').length"
    overlay(page)
    assert page.evaluate(attached) < 150
    # Whatever the slider, the switch and the order do to the page's elements is counted.
    page.evaluate(
        """() => {
            window.changes = 0;
            const observer = new MutationObserver((records) => { window.changes += records.length; });
            observer.observe(document.querySelector("main"), { subtree: true, attributes: true, childList: true });
        }"""
    )
    page.locator(".opacity").first.fill("80")
    assert page.evaluate("Promise.resolve().then(() => window.changes)") == 0
    page.keyboard.press("2")
    assert overlay(page) == made[0]["methods"]["mtsm"]["map"]
    assert 0 < page.evaluate("window.changes") < 150 * 6
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    assert overlay(page, COUNT - 1) == made[(COUNT - 1) % 5]["methods"]["mtsm"]["map"]
    page.locator("li:first-child .overlay:not([src])").wait_for(state="attached")
    assert page.evaluate(attached) < 150
    page.locator("#key").select_option("first_share")
    assert names(page) == [f"{i}.png" for i in sorted(range(COUNT), key=lambda i: i * 379 % COUNT)]
    page.evaluate("scrollTo(0, 0)")
    assert overlay(page) == made[0]["methods"]["mtsm"]["map"]
    assert page.evaluate(attached) < 300


def test_the_policy_allows_nothing_but_the_page_itself(tmp_path):
    write_gallery(tmp_path / "gallery.html", "x", [])
    page = (tmp_path / "gallery.html").read_text()
    (policy,) = re.findall('<meta http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    for own in ("script-src", "style-src"):
        assert rules.pop(own).startswith("'sha256-")
    assert rules == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}
