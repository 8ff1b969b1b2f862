"""Small files: whole or not at all, and one sentence where they cannot be."""

import json

import pytest

from apt_core.errors import AptError
from apt_core.files.atomic import make_folder, replacing
from apt_core.files.jsonfile import write_json


def test_json_makes_its_folder_and_leaves_nothing_beside_it(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"a": 1})
    assert json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8")) == {"a": 1}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "error, seen",
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), AptError)],
)
def test_an_interrupted_write_leaves_the_old_file(tmp_path, error, seen):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(seen), replacing(path) as part:
        part.write_text("half")
        raise error
    assert path.read_text(encoding="utf-8") == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_file_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    for path in ("file", "file/a", "file/a/b"):
        with pytest.raises(AptError, match="is a file: give another folder"):
            make_folder(tmp_path / path)
    with pytest.raises(AptError, match="is a file"):
        write_json(tmp_path / "file" / "a.json", {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(AptError, match="folder could not be written"):
        write_json(tmp_path / "folder", {})
