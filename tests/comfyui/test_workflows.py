"""Every graph of workflows/ in ComfyUI's own frontend, in a real browser: opens whole, converts, validates, and runs where it can."""

import json
from pathlib import Path

import numpy as np
import pytest
from cards import read_video
from graphs import RUNNABLE, WORKFLOWS
from server import failure

from trainer.mini.judge import read_clip

FOLDER = Path(__file__).parents[2] / "workflows"
NAMES = sorted(WORKFLOWS)


def load(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def convert(frontend, name: str) -> dict:
    workflow = load(name)
    assert sorted(frontend.open(workflow)) == sorted(node["type"] for node in workflow["nodes"])
    assert frontend.missing() == []
    return frontend.prompt()


def outputs(server, prompt: dict) -> dict[str, Path]:
    """The one file of each output node, by the node's title."""
    return {prompt[node]["_meta"]["title"]: file for node, (file,) in server.run(prompt).items()}


@pytest.mark.parametrize("name", NAMES)
def test_opens_whole_and_its_prompt_validates(frontend, server, name):
    prompt = convert(frontend, name)
    nodes = {str(node["id"]): node for node in load(name)["nodes"] if node["type"] != "MarkdownNote"}
    assert {key: node["class_type"] for key, node in prompt.items()} == {key: node["type"] for key, node in nodes.items()}
    for key, node in nodes.items():
        values = {name: value for name, value in node.get("widgets_values_named", {}).items() if name != "control_after_generate"}
        given = prompt[key]["inputs"]
        # A list is a link, which takes the place of the widget's value.
        assert {name: given[name] for name in values if not isinstance(given[name], list)}.items() <= values.items()
    prompt_id = server.queue(prompt)  # raises what the server does not like
    if name not in RUNNABLE:
        server.post("/queue", {"delete": [prompt_id]})
        server.interrupt(prompt_id)
    else:
        entry = server.wait(prompt_id)
        assert entry["status"]["status_str"] == "success", failure(entry)
    assert frontend.errors == []


@pytest.mark.parametrize("name", NAMES)
def test_is_what_the_frontend_itself_would_save(frontend, name):
    workflow = load(name)
    frontend.open(workflow)
    saved = json.loads(frontend.page.evaluate("() => JSON.stringify(window.app.graph.serialize())"))
    for mine, theirs in zip(workflow["nodes"], sorted(saved["nodes"], key=lambda node: node["id"]), strict=True):
        for key in ("id", "type", "pos", "inputs", "outputs", "properties", "widgets_values"):
            if key == "inputs" and not mine["type"].startswith("APT"):
                # The frontend itself lists the inputs under a choice before or after it, by whether the node is new or loaded.
                assert by_name(mine) == by_name(theirs), mine["type"]
            else:
                assert mine.get(key) == theirs.get(key), (mine["type"], key)
    assert sorted(workflow["links"]) == sorted(saved["links"])


def test_a_graph_from_before_a_setting_opens_with_its_default(frontend, server):
    workflow = load("apt_mini_text_to_video")
    (sampler,) = (node for node in workflow["nodes"] if node["type"] == "APTSampler")
    assert sampler["inputs"].pop()["name"] == "seed_noise"
    assert sampler["widgets_values"].pop() == sampler["widgets_values_named"].pop("seed_noise") == "comfyui"
    frontend.open(workflow)
    assert frontend.missing() == []
    prompt = frontend.prompt()
    inputs = prompt[str(sampler["id"])]["inputs"]
    assert (inputs["seed"], inputs["steps"], inputs["seed_noise"]) == (5, 1, "comfyui")
    del inputs["seed_noise"]  # a prompt from before it
    server.run(prompt)


def by_name(node: dict) -> list[dict]:
    return sorted(node.get("inputs", []), key=lambda entry: entry["name"])


def test_the_miniature_makes_the_clip_of_its_prompt(frontend, server):
    prompt = convert(frontend, "apt_mini_text_to_video")
    (path,) = outputs(server, prompt).values()
    reading = read_clip(read_video(path))
    caption = next(node["inputs"]["text"] for node in prompt.values() if node["class_type"] == "CLIPTextEncode")
    # One in eight seeds makes a clip that goes astray; the graph comes with one that does not.
    assert caption == f"a {reading.color} {reading.shape} moving {reading.direction} on a {reading.background} background", reading


def test_stock_nodes_make_the_same_clip(frontend, server):
    ours, stock = (read_video(path).astype(int) for _, path in sorted(outputs(server, convert(frontend, "apt_stock_nodes")).items()))
    assert ours.shape == stock.shape == (9, 48, 48, 3)
    # Two encodings of the same frames.
    assert np.abs(ours - stock).mean() < 4


def test_a_closed_walk_comes_back_in_small_steps(frontend, server):
    (path,) = outputs(server, convert(frontend, "apt_noise_walk")).values()
    pictures = read_video(path).astype(int)
    assert pictures.shape == (48, 48, 48, 3)
    steps = np.abs(pictures - np.roll(pictures, 1, axis=0)).mean((1, 2, 3))
    apart = np.abs(pictures - np.roll(pictures, 24, axis=0)).mean()
    assert steps.max() < apart / 2, (steps, apart)
