"""The page of the preference study in a real browser: clicked through with keys and with fingers."""

import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from apt_core.files.media_write import video_writer, write_image
from trainer.preference import QUESTIONS
from trainer.preference.page import make_page
from trainer.preference.votes import count_votes

sys.path.append(str(Path(__file__).parents[1] / "comfyui"))
chromium = import_module("browser").chromium
sys.path.pop()

WIDE, PHONE, NARROW = (
    {"width": 1366, "height": 768},
    {"width": 390, "height": 844},
    {"width": 360, "height": 740},
)
# Of every video that is shown: seconds, playing, can be decoded.
CLIPS = "() => clips.map(v => [v.currentTime, !v.paused && !v.ended, v.videoWidth])"
FITS = "() => document.documentElement.scrollWidth <= window.innerWidth"
# Of every text and button that is shown: contrast with what is behind it (WCAG 2, relative luminance).
CONTRAST = """() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number)
  const linear = c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4
  const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255)
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = parts(getComputedStyle(e).backgroundColor)
      if (colour.length < 4 || colour[3] > .5) return colour
    }
    return [255, 255, 255]
  }
  const all = [...document.querySelectorAll('h1, p, legend, label, dt, dd, kbd, span, button')]
  return all.filter(e => e.offsetParent && e.textContent.trim()).map(e => {
    const [a, b] = [light(parts(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x)
    return [(a + .05) / (b + .05), e.textContent]
  })
}"""


@pytest.fixture(scope="module")
def opened():
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def browser(opened):
    yield opened
    for context in opened.contexts:
        context.close()


class Rater:
    """One rater's browser. `errors`: what the page's scripts throw; `asked`: what addresses were opened."""

    def __init__(
        self,
        browser,
        page: Path,
        size: dict = WIDE,
        touch: bool = False,
        dark: bool = False,
        still: bool = False,
    ):
        self.context = browser.new_context(
            viewport=size,
            has_touch=touch,
            is_mobile=touch,
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce" if still else "no-preference",
        )
        self.page, self.errors, self.asked = self.context.new_page(), [], []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "console", lambda message: self.errors.append(message.text) if message.type == "error" else None
        )
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(page.as_uri())
        self.touch = touch

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def hit(self, selector: str) -> None:
        (self.page.tap if self.touch else self.page.click)(selector)

    def text(self, selector: str) -> str:
        return " ".join(self.page.inner_text(selector).split())

    def chosen(self) -> list[str | None]:
        """The answers that are marked, by question."""
        return [
            self.page.evaluate(
                "n => document.querySelector(`[data-name=${n}] [aria-pressed=true]`)?.dataset.value ?? null",
                name,
            )
            for name in QUESTIONS
        ]

    def save(self, folder: Path, button: str = "#download") -> Path:
        with self.page.expect_download() as download:
            self.hit(button)
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        return path


def one(question: str, answer: str) -> str:
    return f"[data-name={question}] [data-value={answer}]"


def clips(root: Path, pairs: int = 3) -> tuple[Path, Path]:
    for n in range(pairs):
        for name, level in (("a", 60), ("b", 160)):
            about = {
                "prompt": f"thing {n}, with a text so long that it takes more than one line on a telephone",
                "seed": 0,
                "number": n,
            }
            path = root / name / f"{n:04d}-thing-seed0-{name * 6}.mp4"
            with video_writer(path, 64, 112, 12, about=about) as write:
                frames = np.full((12, 64, 112, 3), level, np.uint8)
                for k in range(12):
                    frames[k, 20:44, 6 * k : 6 * k + 24] = 250
                write(frames)
    return root / "a", root / "b"


@pytest.fixture
def study(tmp_path):
    return make_page(*clips(tmp_path), tmp_path / "page.html", seed=5)


def better(study, number: int, model: str) -> str:
    return "left" if study.left[number] == model else "right"


def test_with_keys_from_the_page_to_the_score(study, browser, tmp_path):
    """A always has the better fidelity, B the structure, and the text is the same."""
    rater = Rater(browser, tmp_path / "page.html")
    page = rater.page
    assert (
        rater.text("h1") == "Which one is better?"
        and "3 pairs" in rater.text("#start")
        and page.is_hidden("#pair")
    )
    rater.press("Tab", "Tab")
    page.focus("#rater")
    rater.press("Enter")
    assert page.is_hidden("#pair")  # without a name nothing starts
    page.keyboard.type("Ann 123")
    rater.press("Enter")
    for n in range(3):
        assert rater.text("h1") == f"Pair {n + 1} of 3" and study.pairs[n].prompt in rater.text("#prompt")
        assert rater.chosen() == [None, None, None]
        rater.press("ArrowRight")
        assert (
            rater.text("h1") == f"Pair {n + 1} of 3"
            and rater.text("#note") == "Answer all three questions to go on."
        )
        left = study.left[n] == "a"
        rater.press("1" if left else "3", "3" if left else "1", "2")
        assert rater.chosen() == [better(study, n, "a"), better(study, n, "b"), "same"]
        rater.press("ArrowRight")
    assert rater.text("h1") == "Finished" and "Thank you, Ann 123." in rater.text("#thanks")
    path = rater.save(tmp_path)
    assert (
        path.name == f"votes-{study.id[:6]}-Ann-123.json" and rater.text("#saved") == f"Saved as {path.name}."
    )
    saved = json.loads(path.read_text())
    assert saved["study"] == study.id and saved["rater"] == "Ann 123" and len(saved["votes"]) == 3
    scores = count_votes([path]).scores
    assert [scores[name].score for name in QUESTIONS] == [1, -1, 0]
    assert rater.errors == [] and all(url.startswith(("file:", "blob:")) for url in rater.asked)


def test_with_fingers_on_a_phone(study, browser, tmp_path):
    rater = Rater(browser, tmp_path / "page.html", PHONE, touch=True)
    page = rater.page
    page.fill("#rater", "Ben")
    rater.hit("#begin")
    boxes = [page.locator(f"[data-side={side}]").bounding_box() for side in ("left", "right")]
    # one above the other
    assert boxes[0]["width"] > 350 and boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
    assert (
        rater.text(one("text", "left")) == "Top better"
        and rater.text("[data-side=right] figcaption") == "Bottom"
    )
    for n in range(3):
        for question, model in (("fidelity", "b"), ("structure", "b"), ("text", "a")):
            rater.hit(one(question, better(study, n, model)))
        rater.hit("#forward")
    assert rater.text("h1") == "Finished"
    scores = count_votes([rater.save(tmp_path)]).scores
    assert [scores[name].score for name in QUESTIONS] == [-1, -1, 1] and rater.errors == []


def test_the_clips_start_together_and_loop_together(study, browser, tmp_path):
    rater = Rater(browser, tmp_path / "page.html")
    page = rater.page
    page.fill("#rater", "Ann")
    page.click("#begin")
    page.wait_for_function("() => clips.length === 2 && clips.every(c => c.currentTime > .2)")
    (first, playing, width), (second, also, _) = page.evaluate(CLIPS)
    assert playing and also and width == 112 and abs(first - second) < 0.1
    page.wait_for_function(
        "() => { const old = window.last; window.last = clips[0].currentTime; return window.last < old }",
        timeout=20_000,
    )
    page.wait_for_function("() => clips.every(c => c.currentTime > .1 && !c.paused && !c.ended)")
    (first, _, _), (second, _, _) = page.evaluate(CLIPS)
    assert abs(first - second) < 0.1
    rater.press("Space")
    assert not any(playing for _, playing, _ in page.evaluate(CLIPS)) and rater.text("#pause") == "Play"
    rater.press("r")
    page.wait_for_function("() => clips.every(c => !c.paused)")
    assert rater.text("#pause") == "Pause" and rater.errors == []


def test_no_motion_for_those_who_want_none(study, browser, tmp_path):
    rater = Rater(browser, tmp_path / "page.html", still=True)
    rater.page.fill("#rater", "Ann")
    rater.page.click("#begin")
    rater.page.wait_for_function("() => clips.length === 2 && clips.every(c => c.readyState >= 3)")
    rater.page.wait_for_timeout(200)
    assert [clip[:2] for clip in rater.page.evaluate(CLIPS)] == [[0, False], [0, False]] and rater.text(
        "#pause"
    ) == "Play"


def test_back_and_another_answer_and_a_reload(study, browser, tmp_path):
    rater = Rater(browser, tmp_path / "page.html")
    page = rater.page
    page.fill("#rater", "Ann")
    page.click("#begin")
    rater.press("1", "1", "1", "ArrowRight", "2", "ArrowLeft")
    assert rater.text("h1") == "Pair 1 of 3" and rater.chosen() == ["left", "left", "left"]
    rater.press("ArrowDown", "3")  # from the first question to the second
    assert rater.chosen() == ["left", "right", "left"]
    rater.press("ArrowUp", "2")
    assert rater.chosen() == ["same", "right", "left"]
    rater.press("ArrowRight")
    assert rater.chosen() == ["same", None, None]
    early = json.loads(rater.save(tmp_path, "#early").read_text())
    assert early["votes"][0] == {
        "pair": study.mark(0),
        "fidelity": "same",
        "structure": "right",
        "text": "left",
    }
    assert early["votes"][1]["structure"] is None and early["votes"][2]["fidelity"] is None
    page.reload()
    assert (
        rater.text("h1") == "Pair 2 of 3"
        and rater.chosen() == ["same", None, None]
        and rater.text("#done") == "1 of 3 answered"
    )
    rater.press("3", "3", "ArrowRight", "1", "1", "1", "ArrowRight")
    assert rater.text("h1") == "Finished"
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("#other")
    assert page.input_value("#rater") == "" and rater.text("#begin") == "Start"
    page.reload()
    assert page.is_visible("#start") and rater.errors == []


def test_where_nothing_is_kept_it_is_said(study, browser, tmp_path):
    rater = Rater(browser, tmp_path / "page.html")
    rater.page.add_init_script(
        "Object.defineProperty(window, 'localStorage', {get() { throw new Error('denied') }})"
    )
    rater.page.reload()
    assert "This browser keeps nothing" in rater.text("#store")
    rater.page.fill("#rater", "Ann")
    rater.page.click("#begin")
    rater.press("1", "2", "3")
    assert rater.chosen() == ["left", "same", "right"] and rater.errors == []


@pytest.mark.parametrize("link", [False, True])
def test_pictures_in_the_page_and_beside_it(link, browser, tmp_path):
    for name, level in (("a", 60), ("b", 160)):
        write_image(
            tmp_path / name / "0.png",
            np.full((32, 32, 3), level, np.uint8),
            about={"prompt": "<b>grey</b>", "seed": 0, "number": 0},
        )
    made = make_page(tmp_path / "a", tmp_path / "b", tmp_path / "page.html", link=link)
    rater = Rater(browser, tmp_path / "page.html")
    rater.page.fill("#rater", "Ann")
    rater.page.click("#begin")
    rater.page.wait_for_function(
        "() => [...document.querySelectorAll('img')].filter(i => i.naturalWidth === 32).length === 2"
    )
    levels = rater.page.evaluate("""() => [...document.querySelectorAll('figure img')].map(i => {
        const c = new OffscreenCanvas(1, 1).getContext('2d')
        c.drawImage(i, 0, 0)
        try { return c.getImageData(0, 0, 1, 1).data[0] } catch { return null }
    })""")
    # A file beside the page is another origin: it is seen, but cannot be read.
    assert levels == ([None, None] if link else [60, 160] if made.left[0] == "a" else [160, 60])
    assert (
        rater.text("#prompt") == "\u201c<b>grey</b>\u201d"
        and rater.page.is_hidden("#playing")
        and rater.errors == []
    )


def test_linked_clips_play(browser, tmp_path):
    make_page(*clips(tmp_path, 1), tmp_path / "page.html", link=True)
    rater = Rater(browser, tmp_path / "page.html")
    rater.page.fill("#rater", "Ann")
    rater.page.click("#begin")
    rater.page.wait_for_function("() => clips.length === 2 && clips.every(c => c.currentTime > .2)")
    assert rater.errors == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [WIDE, PHONE, NARROW], ids=lambda size: str(size["width"]))
def test_it_fits_and_can_be_read(size, dark, study, browser, tmp_path):
    """Nothing sticks out to the side, at 1366x768 a pair needs no scrolling, buttons are large enough for
    fingers, and text stands out."""
    touch = size is not WIDE
    rater = Rater(browser, tmp_path / "page.html", size, touch, dark)
    page = rater.page

    def check() -> None:
        assert page.evaluate(FITS)
        assert [text for contrast, text in page.evaluate(CONTRAST) if contrast < 4.5] == []
        boxes = [button.bounding_box() for button in page.locator("button:visible").all()]
        assert boxes and all(box["height"] >= (48 if touch else 44) and box["width"] >= 44 for box in boxes)

    check()
    page.fill("#rater", "Ann")
    rater.hit("#begin")
    rater.hit(one("fidelity", "left"))
    check()
    if not touch:
        assert page.evaluate("() => document.documentElement.scrollHeight <= window.innerHeight")
    rater.hit(one("structure", "same")), rater.hit(one("text", "right"))
    check()


def test_it_says_what_its_parts_are(study, browser, tmp_path):
    rater = Rater(browser, tmp_path / "page.html")
    page = rater.page
    page.get_by_label("Your name").fill("Ann")
    page.get_by_role("button", name="Start").click()
    assert page.evaluate("document.activeElement.id") == "where"  # a reader says which pair it is
    for title, _ in QUESTIONS.values():
        group = page.get_by_role("group", name=title)
        group.get_by_role("button", name="Same").click()
        assert group.get_by_role("button", name="Same", pressed=True).count() == 1
    assert page.get_by_role("progressbar", name="Pairs answered").count() == 1
    rater.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert page.evaluate("document.activeElement.tagName") == "BUTTON" and outline == "3px"
