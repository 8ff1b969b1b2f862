"""The page of an evaluation in a real browser: the players of a prompt start together and stay so."""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from apt_core.files.media_write import write_image, write_video
from trainer.evaluate.page import write_page
from trainer.mini.clips import draw

sys.path.append(str(Path(__file__).parents[2] / "comfyui"))
chromium = import_module("browser").chromium
sys.path.pop()

TIMES = "() => [...document.querySelectorAll('video')].map(v => [v.currentTime, v.paused])"
PROMPT = "a <b>red</b> circle @@TABLE@@"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two models, one prompt; the second's clip is four times as long."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    folder = tmp_path_factory.mktemp("page")
    clip = draw(0, [0], True)[0][0]
    models = []
    for name, frames in (("short", clip), ("long [x] & y", np.concatenate([clip] * 4))):
        write_video(folder / f"{len(models)}.mp4", frames, 8)
        figures = {"motion": {"value": 0.25, "of_real": None}, "fd_x": {"value": 1.5, "of_real": None}}
        clips = [{"file": f"{len(models)}.mp4", "metrics": {"motion": 0.25}}]
        weights = {"checkpoint": {"name": "a.safetensors", "sha256": "0" * 64}}
        models.append(
            {
                "label": name,
                "ema": None,
                "phase": "image",
                "updates": 10 * len(models),
                "series": 0,
                "steps": 1,
                "weights": weights,
                "seconds_each": 0.5,
            }
            | {"metrics": figures, "clips": clips}
        )
    size = {"height": 48, "width": 48, "frames": 9, "fps": 8.0}
    about = {"device": "cpu", "versions": {"torch": "2"}, "real": None}
    result = {"prompts": [PROMPT], "seed": 0, "count": 1, "size": size, "features": [], "models": models}
    write_page(folder / "page.html", result | about)
    write_image(folder / "0.png", clip[:1])
    still = models[0] | {"clips": [{"file": "0.png", "metrics": {}}]}
    write_page(folder / "still.html", result | about | {"models": [still]})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 1400})
        page.errors, page.asked = [], []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda message: page.errors.append(message.text))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto((folder / "page.html").as_uri())
        yield page
        browser.close()


def test_players_start_together_and_again_when_all_have_ended(page):
    page.wait_for_function("() => [...document.querySelectorAll('video')].every(v => v.currentTime > 0.3)")
    (first, first_paused), (second, second_paused) = page.evaluate(TIMES)
    assert abs(first - second) < 0.25 and not first_paused and not second_paused
    page.wait_for_function("() => document.querySelectorAll('video')[0].ended")  # it waits for the longer one
    assert page.evaluate(TIMES)[1][0] < 4.5 and not page.evaluate(TIMES)[1][1]
    page.wait_for_function(
        "() => [...document.querySelectorAll('video')].every(v => v.currentTime > 0 && v.currentTime < 1)",
        timeout=15000,
    )
    page.click("#play")
    assert [paused for _, paused in page.evaluate(TIMES)] == [True, True]
    assert page.inner_text("#play") == "Play"
    page.click("#restart")
    page.wait_for_function("() => [...document.querySelectorAll('video')].every(v => !v.paused)")


def test_texts_are_shown_as_they_are_and_nothing_is_fetched(page):
    assert page.locator("h2").last.inner_text() == PROMPT
    assert page.locator(".row figcaption").all_inner_texts() == ["short", "long [x] & y"]
    assert page.locator("tbody tr").first.locator("td").all_inner_texts()[1:] == ["0.25", "0.25"]
    assert "fd_x" in page.inner_text("table") and page.errors == []
    assert all(url.startswith(("file:", "data:")) for url in page.asked)
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")


def test_curves_are_drawn_in_the_page(page):
    assert page.locator(".curves figure").count() == 2  # motion and fd_x
    box = page.locator(".curves svg").first.bounding_box()
    assert box["width"] > 200 and 80 < box["height"] < 400
    assert page.locator(".curves .best").count() == 1  # of fd_x: without real clips nothing says it of motion


@pytest.mark.parametrize("width", [390, 1000])
def test_clips_of_a_prompt_stand_side_by_side_on_a_phone_too(page, width):
    page.set_viewport_size({"width": width, "height": 844})
    boxes = [video.bounding_box() for video in page.locator("video").all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert all(100 < box["width"] <= 288 for box in boxes)  # small clips are not blown up
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    page.set_viewport_size({"width": 1000, "height": 1400})


def test_pictures_have_no_player(page):
    assert page.is_visible("nav")
    other = page.context.browser.new_page()
    other.goto(page.url.replace("page.html", "still.html"))
    assert other.locator("img").count() == 1 and not other.is_visible("nav")
    other.close()
