"""The public interface of nodes, cut out of ComfyUI's /object_info: ids, inputs in their order, types, limits
and outputs; and their words.
"""

import json
from pathlib import Path

SNAPSHOT = Path(__file__).parents[1] / "workflows" / "object_info.json"
WORDS = SNAPSHOT.with_name("words.json")
KEPT = ("default", "min", "max", "step", "control_after_generate", "multiline", "forceInput")
# what these list depends on the machine
FILES = (
    "checkpoint",
    "text_encoder",
    "vae_name",
    "unet_name",
    "clip_name",
    "lora_name",
    "file",
)


def interface(info: dict) -> dict:
    """One node's entry of /object_info without its words, which may change, and without the files of this
    machine.
    """
    return {
        "display_name": info["display_name"],
        "input": {section: _inputs(given) for section, given in info["input"].items() if section != "hidden"},
        "output": info["output"],
        "output_name": info["output_name"],
    }


def _inputs(given: dict) -> dict:
    return {name: _input(name, *spec) for name, spec in given.items()}


def _input(name: str, kind: str | list, options: dict | None = None) -> list:
    options = options or {}
    kept = {key: options[key] for key in KEPT if key in options}
    choices = kind if isinstance(kind, list) else options.get("options", [])
    kind = "COMBO" if isinstance(kind, list) else kind
    if kind == "COMFY_DYNAMICCOMBO_V3":
        kept["options"] = [
            {"key": choice["key"], "inputs": {s: _inputs(g) for s, g in choice["inputs"].items()}}
            for choice in choices
        ]
    elif kind == "COMBO" and name not in FILES:
        kept["options"] = choices
    if name in FILES:
        kept.pop("default", None)
    return [kind, kept]


def read_snapshot() -> dict:
    return json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def write_snapshot(object_info: dict, stock: set[str]) -> None:
    """Ours, all of them, and the stock nodes that our workflows use."""
    nodes = {
        name: interface(info) for name, info in sorted(object_info.items()) if is_ours(info) or name in stock
    }
    SNAPSHOT.write_text(json.dumps(nodes, indent=1) + "\n")


def words(object_info: dict) -> dict:
    """The texts of our nodes in the form of locales/*/nodeDefs.json. Inputs go by their ids."""
    return {name: _words_of(info) for name, info in sorted(object_info.items()) if is_ours(info)}


def _words_of(info: dict) -> dict:
    inputs = {}

    def walk(prefix: str, given: dict) -> None:
        for section in ("required", "optional"):
            for name, (_, options) in given.get(section, {}).items():
                inputs[prefix + name] = {"name": name, "tooltip": options["tooltip"]}
                if options.get("control_after_generate"):
                    inputs["control_after_generate"] = {"name": "control_after_generate"}
                for option in options.get("options", []):
                    if isinstance(option, dict):
                        walk(f"{prefix}{name}_", option["inputs"])  # the frontend writes a dot as _

    walk("", info["input"])
    outputs = {}
    told = zip(info["output"], info["output_name"], info["output_tooltips"])
    for i, (kind, name, tooltip) in enumerate(told):
        outputs[str(i)] = {"name": name} if name != kind else {}
        outputs[str(i)]["tooltip"] = tooltip
    texts = {"display_name": info["display_name"], "description": info["description"], "inputs": inputs}
    return texts | ({"outputs": outputs} if outputs else {})


def write_words(object_info: dict) -> None:
    WORDS.write_text(json.dumps(words(object_info), indent=1) + "\n", encoding="utf-8")


def is_ours(info: dict) -> bool:
    return info["python_module"] == "custom_nodes.ComfyUI-APT"
