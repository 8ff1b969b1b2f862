"""The preference study: samples find their partners, and the page shows them and does not tell the sides."""

import base64
import json
import re
import tomllib
from importlib.resources import files
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from two_models import clip, folders, one_sentence, picture

import trainer.preference
from apt_core.errors import AptError
from apt_core.files.media_write import write_image
from trainer.data.media import bare, probe, read_about, read_image
from trainer.preference.page import arrange, make_page
from trainer.preference.pairs import match, read_samples
from trainer.preference.votes import read_key


@pytest.fixture
def study(tmp_path):
    a, b = folders(tmp_path)
    return make_page(a, b, tmp_path / "page.html", seed=3)


# Samples and their partners.


def test_a_file_says_what_it_was_made_from(tmp_path):
    about = {"prompt": "a caf\u00e9 \u2014 <b>\u96e8</b>", "seed": 2**64 - 1, "number": 7}
    for path in (clip(tmp_path / "a.mp4", 90, about=about), tmp_path / "a.png"):
        if path.suffix == ".png":
            write_image(path, np.zeros((8, 8, 3), np.uint8), about=about)
        assert read_about(path) == about
    assert read_about(clip(tmp_path / "b.mp4", 90)) == read_about(picture(tmp_path / "b.png", 0)) == {}


def test_another_programs_comment_is_no_complaint(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        container.metadata["comment"] = "[made by hand"
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(48, 32, "yuv420p")))
        container.mux(stream.encode())
    assert read_about(tmp_path / "a.mp4") == {}


def test_generate_leaves_prompt_seed_and_number_in_its_files(tmp_path):
    from apt_core.engine.pipeline import OneStepPipeline
    from apt_core.engine.request import Request
    from trainer.checkpoints.generate import generate
    from trainer.config import Files

    request = Request(["a red circle", "a blue square"], frames=1, count=2, seed=5)
    written = generate(Path("mini"), request, tmp_path, Files(vae="mini", text_encoder="mini", tokenizer=""))
    assert [read_about(path) for path in written] == [
        {"prompt": request.prompt(n), "seed": 5, "number": n} for n in range(4)
    ]
    pipe = OneStepPipeline.from_checkpoint("mini")
    pipe.write("a red circle", tmp_path / "clip.mp4", seed=6, frames=5)
    assert read_about(tmp_path / "clip.mp4") == {"prompt": "a red circle", "seed": 6, "number": 0}


def partners(a: Path, b: Path) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    pairs, left_a, left_b = match(read_samples(a), read_samples(b))
    return (
        [(p.a.path.name, p.b.path.name) for p in pairs],
        [s.path.name for s in left_a],
        [s.path.name for s in left_b],
    )


def test_partners_by_name_by_prompt_and_seed_and_by_generates_name(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, level in ((a, 0), (b, 9)):
        picture(folder / "same.png", level)
    picture(a / "x.png", 1, "a dog", 4, 0)
    picture(b / "y.png", 2, "a dog", 4, 0)
    picture(b / "other-seed.png", 2, "a dog", 5, 0)
    picture(a / "0003-cat-seed1-0123ab.png", 3)
    picture(b / "0003-cat-seed1-ba3210.png", 3)
    picture(a / "0004-cat-seed1-0123ab.png", 3)
    picture(a / "0005-long-seed1-000000.png", 3, "long one", 1, 5)
    picture(b / "0005-long-seed1-111111.png", 3, "long other", 1, 5)
    pairs, left_a, left_b = partners(a, b)
    assert pairs == [
        ("0003-cat-seed1-0123ab.png", "0003-cat-seed1-ba3210.png"),
        ("same.png", "same.png"),
        ("x.png", "y.png"),
    ]
    assert left_a == ["0004-cat-seed1-0123ab.png", "0005-long-seed1-000000.png"]
    assert left_b == ["0005-long-seed1-111111.png", "other-seed.png"]


def test_several_samples_of_a_prompt_keep_their_numbers(tmp_path):
    for n in (0, 1, 2):
        picture(tmp_path / "a" / f"a{n}.png", n, "a dog", 0, n)
    for n in (2, 1):
        picture(tmp_path / "b" / f"b{9 - n}.png", 50 + n, "a dog", 0, n)
    pairs, left_a, _ = partners(tmp_path / "a", tmp_path / "b")
    assert pairs == [("a1.png", "b8.png"), ("a2.png", "b7.png")] and left_a == ["a0.png"]


def test_captions_beside_the_files_are_prompts(tmp_path):
    for name, level in (("a", 0), ("b", 9)):
        picture(tmp_path / name / "one.png", level)
    (tmp_path / "a" / "notes.txt").write_text("not a caption")
    (tmp_path / "a" / "one.txt").write_text("one\n thing ")
    made, _ = arrange(tmp_path / "a", tmp_path / "b", 0)
    assert [pair.prompt for pair in made.pairs] == ["one thing"]


# The page.


def contents(page: Path) -> tuple[dict, dict[str, bytes]]:
    text = page.read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="study">(.*?)</script>', text, re.S)[1])
    return data, {
        name: base64.b64decode(content)
        for name, content in re.findall(r'<script type="text/plain" id="(.*?)">(.*?)</script>', text)
    }


def test_the_page_shows_the_samples_where_the_key_says(study, tmp_path):
    data, media = contents(tmp_path / "page.html")
    key = json.loads((tmp_path / "page.key.json").read_text())
    assert data["study"] == key["study"] == study.id and len(data["pairs"]) == 4
    for shown, known in zip(data["pairs"], key["pairs"]):
        assert shown["pair"] == known["pair"] and shown["prompt"] == known["prompt"]
        n = int(known["prompt"].removeprefix("thing "))
        for side in ("left", "right"):
            (tmp_path / "shown.png").write_bytes(media[shown[side][1:]])
            is_a = (side == "left") == (known["left"] == "a")
            assert read_image(tmp_path / "shown.png", 8, 8).mean() == (n if is_a else 128 + n)
    assert sorted(row["left"] for row in key["pairs"]) == ["a", "a", "b", "b"]


def test_the_page_does_not_tell_the_sides(tmp_path):
    """Files of A are named and sized unlike those of B, and say so in their headers; nothing of it is in the
    page."""
    for n in range(6):
        clip(
            tmp_path / "sharp" / f"sample-{n}.mp4",
            90 + n,
            noise=40,
            about={"prompt": f"thing {n}", "model": "sharpmodel"},
        )
        clip(
            tmp_path / "blurred" / f"sample-{n}.mp4",
            90 + n,
            about={"prompt": f"thing {n}", "model": "blurredmodel"},
        )
    sizes = [
        [(tmp_path / name / f"sample-{n}.mp4").stat().st_size for n in range(6)]
        for name in ("sharp", "blurred")
    ]
    assert min(sizes[0]) > max(sizes[1])
    made = make_page(tmp_path / "sharp", tmp_path / "blurred", tmp_path / "page.html")
    data, media = contents(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_bytes() + b"".join(media.values())
    for word in (b"sharp/", b"blurred", b"sharpmodel", b"sample-", str(tmp_path).encode()):
        assert word not in text
    assert set(data["pairs"][0]) == {"pair", "kind", "prompt", "left", "right"}
    for n, pair in enumerate(data["pairs"]):
        left, right = (media[pair[side][1:]] for side in ("left", "right"))
        assert len(left) == len(right) and left != right
        for side, content in (("left", left), ("right", right)):
            path = tmp_path / "shown.mp4"
            path.write_bytes(content)
            with av.open(str(path)) as shown, av.open(str(made.side(n, side).path)) as source:
                pixels = [
                    np.stack([f.to_ndarray(format="gray") for f in container.decode(video=0)])
                    for container in (shown, source)
                ]
            np.testing.assert_array_equal(*pixels)
            assert probe(path).fps == 8 and read_about(path) == {}


def test_order_and_sides_follow_from_the_seed(tmp_path):
    a, b = folders(tmp_path, 12)
    studies = [arrange(a, b, seed)[0] for seed in (0, 0, 1)]
    orders = [[pair.prompt for pair in study.pairs] for study in studies]
    assert studies[0].id == studies[1].id != studies[2].id
    assert (
        orders[0] == orders[1] != orders[2]
        and sorted(orders[0]) == sorted(orders[2])
        and orders[0] != sorted(orders[0])
    )
    assert studies[0].left == studies[1].left and all(
        sorted(study.left) == ["a"] * 6 + ["b"] * 6 for study in studies
    )
    swapped = arrange(b, a, 0)[0]
    assert swapped.id != studies[0].id


def test_the_last_of_an_odd_number_is_up_to_chance(tmp_path):
    a, b = folders(tmp_path, 1)
    assert {arrange(a, b, seed)[0].left[0] for seed in range(20)} == {"a", "b"}


def test_nothing_in_a_prompt_ends_its_element(tmp_path):
    prompt = "</script><script>alert(1)</script> <!-- \u2028 & @@SCRIPT@@ @@SAMPLES@@"
    for name, level in (("a", 0), ("b", 9)):
        picture(tmp_path / name / "0.png", level, prompt)
    make_page(tmp_path / "a", tmp_path / "b", tmp_path / "page.html")
    data, media = contents(tmp_path / "page.html")
    assert data["pairs"][0]["prompt"] == " ".join(prompt.split()) and len(media) == 2
    assert "<script>alert" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_linked_samples_lie_beside_the_page(tmp_path):
    a, b = folders(tmp_path)
    make_page(a, b, tmp_path / "page.html", link=True, limit=1)
    data, media = contents(tmp_path / "page.html")
    names = [pair[side] for pair in data["pairs"] for side in ("left", "right")]
    assert media == {} and sorted(names) == sorted(
        f"page.files/{path.name}" for path in (tmp_path / "page.files").iterdir()
    )
    assert (
        all(re.fullmatch(r"page\.files/[0-9a-f]{16}\.png", name) for name in names) and len(set(names)) == 8
    )


def test_the_template_goes_into_the_package():
    globs = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]["trainer"]
    packed = {
        path for pattern in globs for path in Path(trainer.preference.__file__).parents[1].glob(pattern)
    }
    assert {Path(str(path)) for path in files("trainer.preference").joinpath("template").iterdir()} <= packed


def test_a_picture_is_upright_and_bare(tmp_path):
    image = Image.new("RGB", (8, 4), "red")
    exif = image.getexif()
    exif[0x0112], exif[0x010E] = 6, "by the sharp model"
    image.save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "b.png").write_bytes(bare(tmp_path / "a.jpg"))
    with Image.open(tmp_path / "b.png") as shown:
        assert shown.size == (4, 8) and dict(shown.getexif()) == {} and shown.info == {}


@pytest.mark.parametrize(
    "case, parts",
    [
        ("same folder", ("are the same folder: give the samples of two models",)),
        ("no folder", ("nowhere is not a folder",)),
        ("empty", ("empty holds no videos or pictures",)),
        ("no pairs", ("share no sample: make both with generate from the same prompts and seed",)),
        ("no prompt", ("2 of 2 pairs have no prompt", "write it into 0.txt beside the sample")),
        ("same samples", ("hold the same samples",)),
        ("a picture and a video", ("one is a picture and one a video",)),
        ("too much", ("the samples of 4 pairs are more than 0 MiB", "--link puts them")),
        ("codec", ("is in mpeg4, which not every browser plays: convert it to H.264",)),
        ("damaged", ("cannot be read as a video",)),
        ("name", ("page.txt does not end in .html",)),
        ("another key", ("page.key.json belongs to another study",)),
    ],
)
def test_what_cannot_become_a_page_is_one_sentence(case, parts, tmp_path):
    a, b = folders(tmp_path)
    out, limit = tmp_path / "page.html", 10**6
    if case == "same folder":
        (tmp_path / "link").symlink_to(a)
        b = tmp_path / "link"
    if case == "no folder":
        b = tmp_path / "nowhere"
    if case == "empty":
        (b := tmp_path / "empty").mkdir()
    if case == "no pairs":
        picture((b := tmp_path / "c") / "else.png", 0, "something else")
    if case == "no prompt":
        a, b = tmp_path / "c", tmp_path / "d"
        for n in range(2):
            picture(a / f"{n}.png", n), picture(b / f"{n}.png", n + 9)
    if case == "same samples":
        (b := tmp_path / "copy").mkdir()
        for path in a.iterdir():
            (b / path.name).write_bytes(path.read_bytes())
    if case == "a picture and a video":
        clip(b / "0.mp4", 90), picture(a / "0.png", 0, "x")
    if case == "too much":
        limit = 100
    if case in ("codec", "damaged"):
        clip(a / "0.mp4", 9, about={"prompt": "x"})
        with av.open(str(b / "0.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            container.mux(stream.encode(av.VideoFrame(48, 32, "yuv420p")))
            container.mux(stream.encode())
    if case == "damaged":
        (b / "0.mp4").write_bytes(b"\0" * 100)
    if case == "name":
        out = tmp_path / "page.txt"
    if case == "another key":
        make_page(a, b, out, seed=1)
        before = out.read_bytes()
    with pytest.raises(AptError) as error:
        make_page(a, b, out, seed=2, limit=limit)
    one_sentence(error, *parts)
    if case == "another key":
        assert (
            out.read_bytes() == before
            and read_key(tmp_path / "page.key.json").study == arrange(a, b, 1)[0].id
        )
    else:
        assert not list(tmp_path.glob("page*"))
