"""The words of the nodes in other languages: whole, and saying what the English says."""

import json
import re

import pytest
from shown_nodes import NODES, ROOT

LOCALES = ("de", "fr", "ja", "ko", "zh", "zh-TW")
ENGLISH = json.loads((ROOT / "tests/workflows/words.json").read_text(encoding="utf-8"))
"""By `write_words` of tests/comfyui/interface.py: what a real ComfyUI says, in the form of a locale."""
KEPT = {"checkpoint", "dtype", "latent", "sigmas", "vae"}
"""Names of inputs that some languages leave as they are."""
SMALL = {"0", "1", "2"}
"""Numbers that another language may write as digits: 'one', 'the second'."""
SCRIPTS = {
    "ja": "[\u3040-\u30ff\u4e00-\u9fff]",
    "ko": "[\uac00-\ud7a3]",
    "zh": "[\u4e00-\u9fff]",
    "zh-TW": "[\u4e00-\u9fff]",
}


def read(locale: str) -> dict:
    return json.loads((ROOT / "locales" / locale / "nodeDefs.json").read_text(encoding="utf-8"))


def inputs_of(info: dict) -> dict[str, dict]:
    """Key in a locale: options. Also what a dynamic combo opens, and the widget beside a seed."""
    found = {}

    def walk(prefix: str, inputs: dict) -> None:
        for section in ("required", "optional"):
            for name, (_, options) in inputs.get(section, {}).items():
                found[prefix + name] = options
                if options.get("control_after_generate"):
                    found["control_after_generate"] = {}
                for option in options.get("options", []):
                    if isinstance(option, dict):
                        walk(f"{prefix}{name}_", option["inputs"])  # the frontend writes a dot as _

    walk("", info["input"])
    return found


def texts(nodes: dict) -> dict[str, str]:
    """Every text by its path, such as "APTSampler.inputs.seed.tooltip"."""
    found = {}

    def walk(path: str, value: dict | str) -> None:
        if isinstance(value, str):
            found[path] = value
        else:
            for key, part in value.items():
                walk(f"{path}.{key}" if path else key, part)

    walk("", nodes)
    return found


def literals(text: str) -> set[str]:
    """What no language changes: numbers, names of files and other words with digits, _ or /."""
    return {word.strip("./") for word in re.findall(r"[A-Za-z0-9_./]*[0-9_/][A-Za-z0-9_./]*", text)}


def test_these_locales_are_there_and_hold_nothing_else():
    there = {
        path.relative_to(ROOT / "locales").as_posix()
        for path in (ROOT / "locales").rglob("*")
        if path.is_file()
    }
    assert there == {f"{locale}/nodeDefs.json" for locale in LOCALES}


def test_the_english_words_are_those_of_the_nodes():
    assert ENGLISH.keys() == NODES.keys()
    for name, info in NODES.items():
        assert list(ENGLISH[name]["inputs"]) == list(inputs_of(info)), name


@pytest.mark.parametrize("locale", LOCALES)
def test_a_locale_has_every_text_and_no_other(locale):
    assert texts(read(locale)).keys() == texts(ENGLISH).keys()


@pytest.mark.parametrize("locale", LOCALES)
def test_nothing_is_left_in_english(locale):
    for path, text in texts(read(locale)).items():
        english = texts(ENGLISH)[path]
        assert text.strip() == text and text
        if not (path.endswith(".name") and english.lower() in KEPT):
            assert text.lower() != english.lower(), path
            assert (
                re.search(SCRIPTS.get(locale, "[a-z]"), text)
                or path.endswith(".name")
                and text in ("Latent", "Sigmas")
            ), path


@pytest.mark.parametrize("locale", LOCALES)
def test_numbers_names_and_options_are_kept(locale):
    translated = texts(read(locale))
    for path, english in texts(ENGLISH).items():
        kept, found = literals(english), literals(translated[path])
        if path.endswith("tooltip") or path.endswith("description"):
            assert kept <= found, (path, kept - found)
            assert found - kept <= SMALL, (path, found - kept)
    for name, info in NODES.items():
        for key, options in inputs_of(info).items():
            for option in options.get("options", []):
                option = option["key"] if isinstance(option, dict) else option
                path = f"{name}.inputs.{key}.tooltip"
                if re.search(rf"\b{re.escape(option)}\b", texts(ENGLISH)[path]):
                    assert option in translated[path], (path, option)


@pytest.mark.parametrize("locale", LOCALES)
def test_the_frontend_takes_no_text_for_a_formula(locale):
    # vue-i18n: {name} is a value, @:key a link, | the plural.
    assert [path for path, text in texts(read(locale)).items() if re.search(r"[{}@|]", text)] == []


@pytest.mark.parametrize("locale", LOCALES)
def test_names_tell_nodes_and_inputs_apart(locale):
    nodes = read(locale)
    assert len({node["display_name"] for node in nodes.values()}) == len(nodes)
    for name, node in nodes.items():
        names = [given["name"] for given in node["inputs"].values()]
        assert len(set(names)) == len(names), name
