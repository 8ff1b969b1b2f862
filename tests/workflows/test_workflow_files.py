"""The graphs of example_workflows/ against a snapshot of ComfyUI's /object_info: what can be known without
ComfyUI and a browser.

`python tests/comfyui/build_workflows.py` writes both; tests/comfyui opens the same files in the real
frontend.
"""

import json
import tomllib
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "example_workflows"
NODES = json.loads(Path(__file__).with_name("object_info.json").read_text(encoding="utf-8"))
NAMES = [
    "apt_draft_and_refine",
    "apt_long_clip",
    "apt_mini_scale_up",
    "apt_mini_text_to_video",
    "apt_noise_walk",
    "apt_prompts_from_file",
    "apt_seed_contact_sheet",
    "apt_stock_nodes",
    "apt_text_to_image",
    "apt_trained_run_compared",
    "apt_wan21_few_step_lora",
    "apt_wan21_lora_text_to_video",
    "apt_wan21_text_to_video",
    "apt_wan22_5b_text_to_video",
]
WIDGETS = {
    "INT": int,
    "FLOAT": (int, float),
    "STRING": str,
    "BOOLEAN": bool,
    "COMBO": str,
    "COMFY_DYNAMICCOMBO_V3": str,
}
CONTROL = "control_after_generate"
CARD = 16 / 9  # width to height, as the template browser crops pictures


def load(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def inputs_of(node: dict) -> dict[str, tuple[str, dict]]:
    """Name: (type, options) of a node's inputs in the snapshot's order, with those that the chosen keys of
    its dynamic combos open.
    """
    found = {}

    def walk(prefix: str, inputs: dict) -> None:
        for section in ("required", "optional"):
            for name, (kind, options) in inputs.get(section, {}).items():
                found[prefix + name] = kind, options
                if kind == "COMFY_DYNAMICCOMBO_V3":
                    chosen = node["widgets_values_named"][prefix + name]
                    opened = {option["key"]: option["inputs"] for option in options["options"]}
                    assert chosen in opened, f"{node['type']} has no {prefix + name} {chosen!r}"
                    walk(f"{prefix}{name}.", opened[chosen])

    walk("", NODES[node["type"]]["input"])
    return found


def widgets_of(node: dict) -> list[str]:
    """Names of a node's widgets in the order of their saved values; a seed is followed by what becomes of it
    after each run.
    """
    names = []
    for name, (kind, options) in inputs_of(node).items():
        if kind in WIDGETS and not options.get("forceInput"):
            names += [name] + [CONTROL] * bool(options.get("control_after_generate"))
    return names


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_fits_a_small_window_in_three_groups(name):
    graph = load(name)
    boxes = [(*node["pos"], *node["size"]) for node in graph["nodes"]] + [
        group["bounding"] for group in graph["groups"]
    ]
    assert max(x + width for x, _, width, _ in boxes) - min(x for x, *_ in boxes) <= 1650
    assert [group["title"] for group in graph["groups"]] == ["1 Model", "2 Prompt", "3 Result"]
    assert len({group["color"] for group in graph["groups"]}) == 3
    for node in ours_and_stock(name):
        (x, y), (width, height) = node["pos"], node["size"]
        around = [
            g
            for g in graph["groups"]
            for a, b, w, h in [g["bounding"]]
            if a < x and x + width < a + w and b < y - 30 and y + height < b + h
        ]
        assert len(around) == 1, node["type"]


def ours_and_stock(name: str) -> list[dict]:
    return [node for node in load(name)["nodes"] if node["type"] != "MarkdownNote"]


def test_every_workflow_is_here_with_its_picture_and_nothing_else():
    # ComfyUI offers every *.json of the folder as a template, and looks for a .jpg of the same name.
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(
        ["README.md", *(f"{name}.{end}" for name in NAMES for end in ("jpg", "json"))]
    )


@pytest.mark.parametrize("name", NAMES)
def test_picture(name):
    path = FOLDER / f"{name}.jpg"
    with Image.open(path) as picture:
        assert picture.format == "JPEG"
        width, height = picture.size
    assert width >= 512 and abs(width / height - CARD) < 0.01
    assert path.stat().st_size < 200_000


@pytest.mark.parametrize("name", NAMES)
def test_nodes_exist_and_say_where_they_come_from(name):
    pack = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    nodes = ours_and_stock(name)
    assert any(node["type"].startswith("APT") for node in nodes)
    for node in nodes:
        assert node["type"] in NODES
        assert node["properties"]["cnr_id"] == (pack if node["type"].startswith("APT") else "comfy-core")
        assert node["properties"]["ver"]
    notes = [node for node in load(name)["nodes"] if node["type"] == "MarkdownNote"]
    assert len(notes) == 1 and 100 < len(notes[0]["widgets_values"][0]) < 1500


@pytest.mark.parametrize("name", NAMES)
def test_links_join_outputs_to_inputs_of_their_type(name):
    graph = load(name)
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) and max(nodes) == graph["last_node_id"]
    ids = [link[0] for link in graph["links"]]
    assert len(set(ids)) == len(ids) and max(ids) <= graph["last_link_id"]
    said_by_nodes = set()
    for node in graph["nodes"]:
        said_by_nodes |= {
            (link, node["id"], i, "out")
            for i, slot in enumerate(node["outputs"])
            for link in slot["links"] or []
        }
        said_by_nodes |= {
            (slot["link"], node["id"], i, "in")
            for i, slot in enumerate(node["inputs"])
            if slot["link"] is not None
        }
    said_by_links = {(link, source, i, "out") for link, source, i, *_ in graph["links"]}
    said_by_links |= {(link, target, i, "in") for link, _, _, target, i, _ in graph["links"]}
    assert said_by_nodes == said_by_links
    for _, source, output, target, slot, kind in graph["links"]:
        given = NODES[nodes[source]["type"]]["output"][output]
        wanted, _ = inputs_of(nodes[target])[nodes[target]["inputs"][slot]["name"]]
        assert given == kind == wanted, (nodes[source]["type"], nodes[target]["type"], given, kind, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_those_of_the_snapshot(name):
    for node in ours_and_stock(name):
        slots, known = {slot["name"]: slot for slot in node["inputs"]}, inputs_of(node)
        assert {key: slot["type"] for key, slot in slots.items()} == {
            key: kind for key, (kind, _) in known.items()
        }, node["type"]
        for key in NODES[node["type"]]["input"].get("required", {}):
            assert "widget" in slots[key] or slots[key]["link"] is not None, (
                f"{node['type']}.{key} is not connected"
            )


@pytest.mark.parametrize("name", NAMES)
def test_values_are_in_the_order_of_the_widgets_and_allowed(name):
    for node in ours_and_stock(name):
        values, known = node.get("widgets_values_named", {}), inputs_of(node)
        assert list(values) == widgets_of(node) and list(values.values()) == node.get("widgets_values", []), (
            node["type"]
        )
        for key, value in values.items():
            where = f"{node['type']}.{key} = {value!r}"
            if key == CONTROL:
                assert value in ("fixed", "randomize"), where
                continue
            kind, options = known[key]
            assert isinstance(value, WIDGETS[kind]), where
            if kind in ("INT", "FLOAT"):
                assert options.get("min", value) <= value <= options.get("max", value), where
            if kind == "COMBO" and options.get("options"):
                assert value in options["options"], where


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_public_come_with_their_address(name):
    for node in ours_and_stock(name):
        named = [
            value
            for value in node.get("widgets_values", [])
            if isinstance(value, str) and value.endswith(".safetensors")
        ]
        models = node["properties"].get("models", [])
        assert [model["name"] for model in models] == [
            file for file in named if "apt" not in file and not file.startswith("demo/")
        ]
        for model in models:
            assert model["directory"] in ("diffusion_models", "loras", "text_encoders", "vae")
            lora = model["directory"] == "loras"
            owner, folder = ("Kijai", "Lightx2v") if lora else ("Comfy-Org", model["directory"])
            assert model["url"].startswith(f"https://huggingface.co/{owner}/")
            assert model["url"].endswith(f"/{folder}/{model['name']}")


def test_each_of_our_nodes_is_shown_in_a_workflow():
    shown = {node["type"] for name in NAMES for node in ours_and_stock(name)}
    assert shown >= {name for name in NODES if name.startswith("APT")}


def test_a_clone_of_the_repository_offers_its_templates_too():
    # ComfyUI lists *.json of all these folders, and serves those of the first one that is there.
    known = [ROOT / name for name in ("example_workflows", "example", "examples", "workflow", "workflows")]
    there = [folder for folder in known if folder.is_dir()]
    assert there[0] == FOLDER and [path for folder in there[1:] for path in folder.glob("*.json")] == []


def test_the_blueprint_is_one_node_with_a_way_out():
    graph = json.loads((ROOT / "subgraphs" / "APT text to video.json").read_text(encoding="utf-8"))
    (inside,) = graph["definitions"]["subgraphs"]
    (node,) = graph["nodes"]
    assert node["type"] == inside["id"] and graph["links"] == []
    assert [output["type"] for output in inside["outputs"]] == ["VIDEO"]
    nodes = {str(one["id"]): one for one in inside["nodes"]}
    for one in nodes.values():
        assert one["type"] in NODES and one["properties"]["cnr_id"] in ("comfyui-apt", "comfy-core")
    for key, widget in node["properties"]["proxyWidgets"]:
        assert widget == CONTROL or widget in inputs_of(nodes[key])
