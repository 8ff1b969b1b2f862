"""Captions from every source, in one order, and each thing that can be wrong with a folder named in one
sentence.
"""

import json

import pytest

from apt_core.errors import AptError
from trainer.data.captions import Bad, Item, find_items, item_id, refuse_bad


def fill(folder, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def ids(folder, items: list[Item]) -> dict[str, str]:
    return {item_id(folder, item.path): item.caption for item in items}


def refused(folder, *parts: str) -> None:
    with pytest.raises(AptError) as error:
        find_items(folder)
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    for part in parts:
        assert part in text, text


def test_sidecars_in_order_of_paths(tmp_path):
    fill(
        tmp_path,
        {
            "b.mp4": "x",
            "b.txt": " two\n lines ",
            "a/c.PNG": "x",
            "a/c.txt": "\ufeffpicture",
            "B.webm": "x",
            "B.txt": "caps",
        },
    )
    fill(tmp_path, {".hidden/d.mp4": "x", "._e.mp4": "x", "README.md": "x", "notes.txt": "x"})
    items, bad = find_items(tmp_path)
    assert (
        list(ids(tmp_path, items).items())
        == [("B.webm", "caps"), ("a/c.PNG", "picture"), ("b.mp4", "two lines")]
        and not bad
    )
    assert [item.kind for item in items] == ["video", "image", "video"]


@pytest.mark.parametrize("column", ["caption", "text"])
def test_metadata_files(tmp_path, column):
    rows = [("b.mp4", 'a "quoted", caption'), ("a/c.png", "\u5929\u7a7a")]
    for name, text in (
        (
            "metadata.jsonl",
            "\n".join(json.dumps({"file_name": name, column: caption, "more": 1}) for name, caption in rows)
            + "\n\n",
        ),
        (
            "metadata.csv",
            f"more,file_name,{column}\r\n"
            + "\r\n".join(f'1,{n},"{c.replace(chr(34), chr(34) * 2)}"' for n, c in rows),
        ),
    ):
        folder = tmp_path / name
        # metadata goes before a sidecar, and a sidecar serves what metadata leaves out
        fill(
            folder,
            {"b.mp4": "x", "b.txt": "not this", "a/c.png": "x", "d.png": "x", "d.txt": "beside", name: text},
        )
        items, _ = find_items(folder)
        assert ids(folder, items) == {
            "a/c.png": "\u5929\u7a7a",
            "b.mp4": 'a "quoted", caption',
            "d.png": "beside",
        }


def test_one_kind_alone(tmp_path):
    # the clip without a caption is nobody's concern
    fill(tmp_path, {"a.mp4": "x", "b.png": "x", "b.txt": "b"})
    items, bad = find_items(tmp_path, ("image",), skip_bad=False)
    assert ids(tmp_path, items) == {"b.png": "b"} and not bad
    with pytest.raises(AptError, match=r"no captions \(videos in it: 1\): put"):
        find_items(tmp_path, ("video",))


def test_folders_that_cannot_be_used(tmp_path):
    refused(tmp_path / "gone", "gone is not a folder")
    refused(tmp_path, str(tmp_path), "no images or videos")
    fill(tmp_path, {"a.mp4": "x", "b.png": "x"})
    refused(tmp_path, str(tmp_path), "no captions (images or videos in it: 2)")
    with pytest.raises(AptError, match="no captions"):
        find_items(tmp_path, skip_bad=True)
    fill(tmp_path, {"metadata.csv": "file_name,label\na.mp4,x\n"})
    refused(tmp_path, "metadata.csv has the columns file_name, label: it needs file_name and caption")
    fill(tmp_path, {"metadata.jsonl": "{}"})
    refused(tmp_path, "both metadata.jsonl and metadata.csv")


@pytest.mark.parametrize(
    "files, says",
    [
        ({"b.mp4": "x"}, "b.mp4 has no caption: write one into b.txt"),
        ({"b.mp4": "x", "b.txt": " \n"}, "b.mp4 has an empty caption"),
        ({"b.mp4": "x", "b.txt": b"caf\xe9"}, "b.txt is not UTF-8 text"),
        ({"b.mp4": "x", "b.txt": "word".encode("utf-16-le")}, "b.txt is not UTF-8 text"),
        ({"b.flv": "x", "b.txt": "word"}, "b.flv is of a kind that cannot be read (.flv)"),
        (
            {"metadata.jsonl": '{"file_name": "b.mp4", "text": "x"}'},
            "b.mp4 does not exist, but metadata names it",
        ),
        (
            {"metadata.jsonl": '{"file_name": "b.mp4"', "b.mp4": "x", "b.txt": "x"},
            "metadata.jsonl, line 1, is not a JSON object",
        ),
        ({"metadata.jsonl": '\n{"text": "x"}'}, "metadata.jsonl, line 2, has no file_name"),
        (
            {"metadata.jsonl": '{"file_name": "b.mp4", "text": 3}', "b.mp4": "x", "b.txt": "x"},
            "line 1, has a caption that is not text",
        ),
        (
            {"metadata.jsonl": '{"file_name": "b.mp4", "text": "x"}\n' * 2, "b.mp4": "x"},
            "line 2, names b.mp4 a second time",
        ),
        ({"metadata.csv": "file_name,text\nb.mp4,\n", "b.mp4": "x"}, "b.mp4 has an empty caption"),
    ],
)
def test_bad_items_are_named_or_skipped(tmp_path, files, says):
    fill(tmp_path, {"a.mp4": "x", "a.txt": "good", **files})
    refused(tmp_path, says, "; --skip-bad would go on without it.")
    items, bad = find_items(tmp_path, skip_bad=True)
    assert ids(tmp_path, items)["a.mp4"] == "good" and len(bad) == 1 and says in bad[0].reason


def test_all_bad_items_are_found_before_one_is_named(tmp_path):
    fill(tmp_path, {"a.mp4": "x", "a.txt": "good", "b.mp4": "x", "c.mp4": "x", "d.png": "x", "d.txt": ""})
    refused(tmp_path, "b.mp4 has no caption", "2 more cannot be used", "--skip-bad would go on without them")
    items, bad = find_items(tmp_path, skip_bad=True)
    assert [entry.path.name for entry in bad] == ["b.mp4", "c.mp4", "d.png"] and len(items) == 1
    refuse_bad([])
    with pytest.raises(AptError, match="^x is bad; --skip-bad"):
        refuse_bad([Bad(tmp_path, "x is bad.")])


def captions_of(folder) -> dict[str, str]:
    return ids(folder, find_items(folder)[0])


def test_a_csv_loses_nothing(tmp_path):
    media = {"a.mp4": "x", "b.mp4": "x"}
    fill(
        tmp_path / "lines",
        {**media, "metadata.csv": 'file_name,text\na.mp4,one\u2028two\u0085three\nb.mp4,"x, y\nz"\n'},
    )
    assert captions_of(tmp_path / "lines") == {"a.mp4": "one two three", "b.mp4": "x, y z"}
    fill(tmp_path / "commas", {**media, "metadata.csv": "file_name,text\na.mp4,a dog, running\nb.mp4,fine\n"})
    refused(
        tmp_path / "commas",
        "metadata.csv, line 2, has more fields than the header: put a caption with commas in quotation marks",
    )
    assert ids(tmp_path / "commas", find_items(tmp_path / "commas", skip_bad=True)[0]) == {"b.mp4": "fine"}
    fill(tmp_path / "open", {**media, "metadata.csv": 'file_name,text\na.mp4,"a dog\nb.mp4,fine\n'})
    refused(tmp_path / "open", "is not valid CSV (unexpected end of data)")
    fill(tmp_path / "twice", {**media, "metadata.csv": "file_name,text,text\na.mp4,x,y\n"})
    refused(tmp_path / "twice", "has the column text twice")


def test_linked_folders_are_gone_into_once(tmp_path):
    fill(tmp_path / "far", {"a.mp4": "x", "a.txt": "far"})
    fill(tmp_path / "data", {"z/b.mp4": "x", "z/b.txt": "near"})
    (tmp_path / "data" / "link").symlink_to(tmp_path / "far", target_is_directory=True)
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "z", target_is_directory=True)
    (tmp_path / "far" / "loop").symlink_to(tmp_path / "data", target_is_directory=True)
    assert captions_of(tmp_path / "data") == {"link/a.mp4": "far", "z/b.mp4": "near"}
    (tmp_path / "data" / "lost").symlink_to(tmp_path / "unmounted", target_is_directory=True)
    refused(tmp_path / "data", "lost is a link to", "unmounted, which does not exist: mend or remove it")


def test_a_link_to_no_file_is_called_so(tmp_path):
    fill(tmp_path, {"a.mp4": "x", "a.txt": "a", "b.txt": "b"})
    (tmp_path / "b.mp4").symlink_to(tmp_path / "gone.mp4")
    refused(tmp_path, "b.mp4 is a link to", "gone.mp4, which does not exist")


def test_names_of_other_trainers_cameras_and_nas(tmp_path):
    fill(
        tmp_path / "upper",
        {"A.MP4": "x", "A.TXT": "upper", "@eaDir/A.MP4/thumb.jpg": "x", "__MACOSX/b.mp4": "x"},
    )
    assert captions_of(tmp_path / "upper") == {"A.MP4": "upper"}
    for name in ("a.caption", "a.mp4.txt"):
        fill(tmp_path / name, {"a.mp4": "x", name: "word"})
        refused(tmp_path / name, "has no captions", f"{name} beside it is not read: rename it to a.txt")
        fill(tmp_path / name, {"c.mp4": "x", "c.txt": "word"})
        refused(tmp_path / name, f"a.mp4 has no caption; {name} beside it is not read: rename it to a.txt")
    fill(
        tmp_path / "list",
        {"clips/a.mp4": "x", "metadata.jsonl": json.dumps({"file_name": "clips\\a.mp4", "text": "word"})},
    )
    assert captions_of(tmp_path / "list") == {"clips/a.mp4": "word"}
