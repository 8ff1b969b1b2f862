"""What the Comfy Registry reads: pyproject.toml, and the zip that .comfyignore leaves."""

import re
import tomllib
from pathlib import Path

from PIL import Image
from server import packed_files

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_zip_holds_what_the_nodes_need_and_no_more():
    files = set(packed_files())
    assert {file.split("/")[0] for file in files} == {
        "LICENSE",
        "README.md",
        "__init__.py",
        "apt_core",
        "example_workflows",
        "locales",
        "nodes",
        "pyproject.toml",
        "requirements.txt",
        "subgraphs",
    }
    code = {
        path.relative_to(ROOT).as_posix()
        for folder in ("apt_core", "nodes")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert code <= files
    assets = {
        file.removeprefix("apt_core/assets/mini/") for file in files if file.startswith("apt_core/assets/")
    }
    assert assets == {
        "diffusion_models/apt_mini.safetensors",
        "prompts.txt",
        "text_encoder.safetensors",
        "vae/apt_mini_vae.safetensors",
    }


def test_pyproject_has_what_the_registry_asks_for():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    # Named here, torch would be replaced by pip in the user's ComfyUI.
    assert project["dependencies"] == []
    assert all(
        line.startswith("#") for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    )
    assert project["urls"]["Repository"].startswith("https://github.com/")
    assert comfy.keys() >= {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui"}
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    for key, limit in (("Icon", (800, 400)), ("Banner", (1260, 540))):
        name = comfy[key].rsplit("/main/", 1)[1]
        with Image.open(ROOT / name) as picture:
            assert picture.width <= limit[0] and picture.height <= limit[1]
