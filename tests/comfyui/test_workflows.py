"""Every graph of example_workflows/ in ComfyUI's own frontend, in a real browser: opens whole, converts,
validates, and runs where it can.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from canvas import MUTED
from cards import read_video
from graphs import RUNNABLE, WORKFLOWS
from prompts import MINI, MINI_TEXT, MINI_VAE
from safetensors.torch import load_file
from server import failure

from apt_core.loading.checkpoint import load_transformer
from apt_core.loading.text_files import load_text_encoder
from apt_core.method.generator import predict_velocity
from apt_core.method.noise import draw
from apt_core.models.latents import normalize
from apt_core.models.vae import load_vae
from trainer.mini import ASSETS, GENERATOR, VAE
from trainer.mini.judge import read_clip

FOLDER = Path(__file__).parents[2] / "example_workflows"
NAMES = sorted(WORKFLOWS)


def load(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def convert(frontend, name: str) -> dict:
    workflow = load(name)
    assert sorted(frontend.open(workflow)) == sorted(node["type"] for node in workflow["nodes"])
    assert frontend.missing() == []
    return frontend.prompt()


# Of every link: from and to which node, and the points of its way.
WAYS = """() => [...window.app.graph.links.values()].map(link => {
    const graph = window.app.graph, between = []
    const from = graph.getNodeById(link.origin_id), to = graph.getNodeById(link.target_id)
    for (let id = link.parentId; id !== undefined; id = graph.reroutes.get(id).parentId) {
        between.unshift([...graph.reroutes.get(id).pos])
    }
    const ends = [[...from.getOutputPos(link.origin_slot)], [...to.getInputPos(link.target_slot)]]
    return [from.id, to.id, [ends[0], ...between, ends[1]]]
})"""
BOXES = (
    "() => window.app.graph.nodes.map(n => [n.id, n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], "
    "n.pos[1] + n.size[1]])"
)


def curve(points: list) -> np.ndarray:
    """Points on a link as the canvas draws it: from each point to the next one a spline that leaves and
    arrives level.
    """
    t = np.linspace(0, 1, 200)[:, None]
    pieces = []
    for a, b in zip(np.array(points), np.array(points[1:])):
        reach = np.array([np.hypot(*(b - a)) / 4, 0])
        pieces.append(
            (1 - t) ** 3 * a
            + 3 * (1 - t) ** 2 * t * (a + reach)
            + 3 * (1 - t) * t**2 * (b - reach)
            + t**3 * b
        )
    return np.concatenate(pieces)


@contextmanager
def window(frontend, width: int, height: int):
    """The page in a window of that size."""
    before = frontend.page.viewport_size
    frontend.page.set_viewport_size({"width": width, "height": height})
    frontend.page.wait_for_timeout(500)
    yield frontend
    frontend.page.set_viewport_size(before)


@pytest.fixture
def small_window(frontend):
    with window(frontend, 1366, 768) as page:
        yield page


@pytest.fixture
def large_window(frontend):
    with window(frontend, 1920, 1080) as page:
        yield page


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_is_whole_and_larger_in_a_large_window(large_window, name):
    large_window.open(load(name))
    large_window.page.wait_for_timeout(1000)
    scale, (left, top) = large_window.page.evaluate(
        "() => [window.app.canvas.ds.scale, [...window.app.canvas.ds.offset]]"
    )
    assert scale * 14 >= 10
    for node, *box in large_window.page.evaluate(BOXES):
        x0, y0, x1, y1 = ((value + start) * scale for value, start in zip(box, (left, top) * 2))
        assert 0 <= x0 and x1 <= 1920 and 0 <= y0 and y1 <= 1080, node


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_opens_with_its_text_and_wires_in_sight(small_window, name):
    small_window.open(load(name))
    small_window.page.wait_for_timeout(1000)
    scale = small_window.page.evaluate("() => window.app.canvas.ds.scale")
    assert scale * 14 >= 8, "ComfyUI leaves out text below 8 pixels"
    note = (
        "() => [...document.querySelectorAll('.comfy-markdown h1, .comfy-markdown h2')].map(e => "
        "parseFloat(getComputedStyle(e).fontSize))"
    )
    sizes = small_window.page.evaluate(note)
    assert len(sizes) >= 3 and min(sizes) * scale >= 8
    boxes = small_window.page.evaluate(BOXES)
    ways = small_window.page.evaluate(WAYS)
    assert len(ways) == len(load(name)["links"])
    for source, target, points in ways:
        if len(points) == 2:
            assert points[0][0] < points[1][0], "goes back"
        way = curve(points)
        for node, left, top, right, bottom in boxes:
            # Its own two nodes it may touch at their edges.
            margin = 15 if node in (source, target) else 0
            inside = (
                (way[:, 0] > left + margin)
                & (way[:, 0] < right - margin)
                & (way[:, 1] > top)
                & (way[:, 1] < bottom)
            )
            assert not inside.any(), (source, target, "runs behind", node)


def inside(box: list, border: list, margin: float = 0) -> bool:
    (a, b, c, d), (left, top, right, bottom) = box, border
    return a >= left + margin and b >= top + margin and c <= right - margin and d <= bottom - margin


def apart(one: list, other: list) -> bool:
    (a, b, c, d), (left, top, right, bottom) = one, other
    return c <= left or right <= a or d <= top or bottom <= b


# As ComfyUI draws them, which makes a node that is narrower than its widgets wider than its file says.
GROUPS_AND_NODES = """() => {
    const group = g => [g.pos[0], g.pos[1], g.pos[0] + g.size[0], g.pos[1] + g.size[1]]
    const height = n => Math.max(n.size[1], n.computeSize()[1])
    const node = n => [n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + height(n)]
    const {groups, nodes} = window.app.graph
    return [groups.map(g => [g.title, group(g)]), nodes.map(n => [`${n.type} ${n.title}`, node(n)])]
}"""


DONE = """async () => {
    await window.app.queuePrompt(0)
    for (;;) {
        const {queue_running, queue_pending} = await (await fetch("/queue")).json()
        if (!queue_running.length && !queue_pending.length) return
        await new Promise(done => setTimeout(done, 200))
    }
}"""


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_nodes_lie_within_their_groups_and_apart(small_window, name, ran):
    small_window.open(load(name))
    small_window.page.wait_for_timeout(500)
    if ran:
        if name not in RUNNABLE | {"apt_trained_run_compared"}:
            pytest.skip("needs a big model")
        small_window.page.evaluate(DONE)
        small_window.page.wait_for_timeout(1500)  # for previews to arrive
    groups, nodes = small_window.page.evaluate(GROUPS_AND_NODES)
    for i, (node, box) in enumerate(nodes):
        assert all(apart(box, other) for _, other in nodes[:i]), (node, "lies on another node", nodes)
        around = [title for title, border in groups if inside(box, border, margin=4)]
        touched = [title for title, border in groups if not apart(box, border)]
        assert around == touched and len(around) == ("Note" not in node), (node, around, touched)


def test_templates_are_listed_with_the_one_to_begin_with_first_and_then_those_that_need_nothing(frontend):
    names = frontend.page.evaluate("async () => (await window.app.api.getWorkflowTemplates())['ComfyUI-APT']")
    first, *others = names
    assert first == "apt_mini_text_to_video" and others == [name for name in NAMES if name != first]
    assert set(names[: len(RUNNABLE)]) == RUNNABLE


def custom_size(frontend, **at_once: int) -> list[int]:
    """What a user finds who chooses custom in the open graph's Empty APT Latent, and sets some values before
    the file has been asked.
    """
    return frontend.page.evaluate(
        """async values => {
        const latent = window.app.graph.nodes.find(n => n.type === "APTEmptyLatent")
        const widget = name => latent.widgets.find(w => w.name === name), size = widget("size")
        size.value = "custom"
        size.callback("custom", window.app.canvas, latent)
        for (const [name, value] of Object.entries(values)) widget(`size.${name}`).value = value
        await new Promise(done => setTimeout(done, 3000))
        return ["width", "height", "frames"].map(name => widget(`size.${name}`).value)
    }""",
        at_once,
    )


@pytest.mark.parametrize(
    "name, size",
    [
        ("apt_mini_text_to_video", [48, 48, 9]),
        ("apt_wan22_5b_text_to_video", [1280, 704, 49]),
        ("apt_wan21_lora_text_to_video", [832, 480, 49]),
    ],
)
def test_a_custom_size_starts_at_the_models_own(frontend, name, size):
    frontend.open(load(name))
    assert custom_size(frontend) == size


def test_a_custom_size_starts_at_that_of_a_stock_loaders_model_and_keeps_what_was_set(frontend):
    workflow = load("apt_wan21_lora_text_to_video")
    (loader,) = (node for node in workflow["nodes"] if node["type"] == "UNETLoader")
    loader["widgets_values"][0] = loader["widgets_values_named"]["unet_name"] = "apt_mini.safetensors"
    frontend.open(workflow)
    assert custom_size(frontend) == [48, 48, 9]
    frontend.open(workflow)
    assert custom_size(frontend, frames=1) == [48, 48, 1]


def outputs(server, prompt: dict) -> dict[str, Path]:
    """The one file of each output node, by the node's title."""
    return {prompt[node]["_meta"]["title"]: file for node, (file,) in server.run(prompt).items()}


@pytest.mark.parametrize("name", NAMES)
def test_opens_whole_and_its_prompt_validates(frontend, server, name):
    prompt = convert(frontend, name)
    nodes = {
        str(node["id"]): node
        for node in load(name)["nodes"]
        if node["type"] != "MarkdownNote" and node["mode"] != MUTED
    }
    assert {key: node["class_type"] for key, node in prompt.items()} == {
        key: node["type"] for key, node in nodes.items()
    }
    for key, node in nodes.items():
        values = {
            name: value
            for name, value in node.get("widgets_values_named", {}).items()
            if name != "control_after_generate"
        }
        given = prompt[key]["inputs"]
        # A list is a link, which takes the place of the widget's value.
        assert {
            name: given[name] for name in values if not isinstance(given[name], list)
        }.items() <= values.items()
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
    for mine, theirs in zip(
        workflow["nodes"], sorted(saved["nodes"], key=lambda node: node["id"]), strict=True
    ):
        for key in ("id", "type", "pos", "inputs", "outputs", "properties", "widgets_values"):
            if key == "inputs" and not mine["type"].startswith("APT"):
                # The frontend itself lists the inputs under a choice before or after it, by whether the node
                # is new or loaded.
                assert by_name(mine) == by_name(theirs), mine["type"]
            else:
                assert mine.get(key) == theirs.get(key), (mine["type"], key)
    assert sorted(workflow["links"]) == sorted(saved["links"])


def test_a_graph_from_before_a_setting_opens_with_its_default(frontend, server):
    workflow = load("apt_mini_text_to_video")
    (sampler,) = (node for node in workflow["nodes"] if node["type"] == "APTSampler")
    defaults = {"times": "file", "seed_noise": "comfyui"}  # last things first
    for name, value in defaults.items():
        assert sampler["inputs"].pop()["name"] == name
        assert sampler["widgets_values"].pop() == sampler["widgets_values_named"].pop(name) == value
    frontend.open(workflow)
    assert frontend.missing() == []
    prompt = frontend.prompt()
    inputs = prompt[str(sampler["id"])]["inputs"]
    assert (inputs["seed"], inputs["steps"]) == (5, 2)
    assert {
        name: inputs.pop(name) for name in defaults
    } == defaults  # what is left is a prompt from before them
    server.run(prompt)


def by_name(node: dict) -> list[dict]:
    return sorted(node.get("inputs", []), key=lambda entry: entry["name"])


def caption_of_title(prompt: dict, title: str) -> str:
    return next(node["inputs"]["text"] for node in prompt.values() if node["_meta"]["title"] == title)


def caption_of(prompt: dict) -> str:
    return next(node["inputs"]["text"] for node in prompt.values() if node["class_type"] == "CLIPTextEncode")


def caption_seen(frames: np.ndarray) -> str:
    seen = read_clip(frames)
    return f"a {seen.color} {seen.shape} moving {seen.direction} on a {seen.background} background"


# One in eight seeds makes a clip that goes astray; the graphs come with ones that do not.
@pytest.mark.parametrize("name", ["apt_mini_text_to_video", "apt_mini_scale_up"])
def test_the_miniature_makes_the_clip_of_its_prompt(frontend, server, name):
    prompt = convert(frontend, name)
    (path,) = outputs(server, prompt).values()
    frames = read_video(path)
    factor = 8 if name == "apt_mini_scale_up" else 1
    assert frames.shape == (9, 48 * factor, 48 * factor, 3)
    assert caption_seen(frames[:, factor // 2 :: factor, factor // 2 :: factor]) == caption_of(prompt)


def latents(server, prompt: dict, *titles: str) -> list[torch.Tensor]:
    """What the samplers of these titles gave, as the VAE has it."""
    added = {}
    for title in titles:
        (key,) = (key for key, node in prompt.items() if node["_meta"]["title"] == title)
        added[f"save {title}"] = {
            "class_type": "SaveLatent",
            "inputs": {"samples": [key, 0], "filename_prefix": f"latents/{title}"},
        }
    files = server.run(prompt | added)
    return [load_file(files[name][0])["latent_tensor"] for name in added]


def test_a_draft_is_refined_by_noise_of_time_0_7_and_a_second_call(frontend, server):
    prompt = convert(frontend, "apt_draft_and_refine")
    draft, refined = latents(server, prompt, "Draft", "Refine")
    model, vae = load_transformer(GENERATOR), load_vae(VAE)
    encoder = load_text_encoder(ASSETS / "text_encoder.safetensors")
    text = encoder.pad(encoder.encode([caption_of(prompt)]), encoder.text_length)
    z, fresh = (draw("comfyui", seed, 0, draft.shape[1:])[None] for seed in (5, 1))
    with torch.no_grad():
        first = z - predict_velocity(model, z, torch.tensor([1.0]), text)
        noisy = 0.3 * first + 0.7 * fresh
        second = noisy - 0.7 * predict_velocity(model, noisy, torch.tensor([0.7]), text)
    torch.testing.assert_close(normalize(draft, vae), first, rtol=0, atol=1e-4)
    torch.testing.assert_close(normalize(refined, vae), second, rtol=0, atol=1e-4)


def test_a_contact_sheet_shows_first_frames_and_one_clip_is_decoded(frontend, server):
    prompt = convert(frontend, "apt_seed_contact_sheet")
    (chosen,) = (key for key, node in prompt.items() if node["class_type"] == "LatentFromBatch")
    prompt[chosen]["inputs"]["batch_index"] = 3
    by_title = {node["_meta"]["title"]: key for key, node in prompt.items()}
    samples, vae = [chosen, 0], [by_title["Load VAE"], 0]
    prompt["whole"] = {"class_type": "APTVAEDecode", "inputs": {"vae": vae, "samples": samples}}
    prompt["save"] = {
        "class_type": "SaveImage",
        "inputs": {"images": ["whole", 0], "filename_prefix": "whole"},
    }
    files = server.run(prompt)
    sheet, whole = (
        np.concatenate([read_video(file) for file in files[key]]).astype(int)
        for key in (by_title["Contact sheet"], "save")
    )
    assert sheet.shape == (16, 48, 48, 3) and whole.shape == (9, 48, 48, 3)
    # A batch is summed in another order than one item, which may round a level the other way.
    same = [np.abs(picture - whole[0]).max() <= 1 for picture in sheet]
    assert same == [i == 3 for i in range(16)]
    assert read_video(files[by_title["Save Video"]][0]).shape == (9, 48, 48, 3)


def test_a_choice_of_another_seed_samples_nothing_anew(frontend, server):
    prompt = convert(frontend, "apt_seed_contact_sheet")
    server.run(prompt)
    (choice,) = (node for node in prompt.values() if node["class_type"] == "LatentFromBatch")
    choice["inputs"]["batch_index"] = 7
    entry = server.wait(server.queue(prompt))
    (cached,) = (data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached")
    anew = {node["class_type"] for key, node in prompt.items() if key not in cached}
    assert anew == {"LatentFromBatch", "APTVAEDecodeToVideo", "SaveVideo"}


def test_a_long_clip_keeps_its_scene_beyond_the_trained_length(frontend, server):
    prompt = convert(frontend, "apt_long_clip")
    (path,) = outputs(server, prompt).values()
    frames = read_video(path)
    assert frames.shape == (33, 48, 48, 3)
    for start in range(0, 33 - 9 + 1, 8):  # windows of 3 latent frames, of 4 frames each
        seen = read_clip(frames[start : start + 9])
        assert (seen.color, seen.background) == ("red", "blue"), start


def test_every_prompt_of_the_file_becomes_a_clip_in_its_order(frontend, server):
    prompt = convert(frontend, "apt_prompts_from_file")
    lines = (ASSETS / "prompts.txt").read_text(encoding="utf-8").splitlines()
    ((_, files),) = server.run(prompt).items()
    assert len(files) == len(lines) == 8
    seen = [caption_seen(read_video(file)) for file in sorted(files)]
    assert sum(map(str.__eq__, seen, lines)) >= 7, seen
    (loader,) = (node for node in prompt.values() if node["class_type"] == "APTLoadPrompts")
    loader["inputs"] |= {"start": 3, "count": 2}
    ((_, part),) = server.run(prompt).items()
    assert [caption_seen(read_video(file)) for file in sorted(part)] == seen[3:5]


def test_a_run_is_compared_in_four_clips_of_one_picture(frontend, server):
    prompt = convert(frontend, "apt_trained_run_compared")
    one, two = latents(server, prompt, "APT, 1 step", "APT, 2 steps")
    (whole,) = (key for key, node in prompt.items() if node["_meta"]["title"] == "All four")
    prompt["pictures"] = {
        "class_type": "SaveImage",
        "inputs": {"images": [whole, 0], "filename_prefix": "compared"},
    }
    files = server.run(prompt)
    pixels = np.concatenate([read_video(file) for file in files.pop("pictures")]).astype(int)
    ((path,),) = files.values()
    assert read_video(path).shape == pixels.shape == (9, 98, 98, 3)
    base, distilled, first, second = (pixels[:, y : y + 48, x : x + 48] for y in (0, 50) for x in (0, 50))
    assert np.array_equal(distilled, first)  # here the distilled model is the APT one too
    vae = load_vae(VAE)
    for seen, of in ((first, one), (second, two)):
        with torch.no_grad():
            frames = vae.decode(of).sample[0].permute(1, 2, 3, 0) / 2 + 0.5
        assert np.abs(seen - 255 * frames.clamp(0, 1).numpy()).max() < 2
    for a, b in ((base, first), (base, second), (first, second)):
        assert np.abs(a - b).mean() > 4
    assert caption_seen(base.astype(np.uint8)) == caption_of_title(prompt, "Prompt")


ON_THE_MINIATURE = {
    "APTLoadCheckpoint": {"checkpoint": MINI},
    "UNETLoader": {"unet_name": MINI},
    "VAELoader": {"vae_name": MINI_VAE},
    "CLIPTextEncode": {"text": "a red circle moving left on a green background"},
    "APTEmptyLatent": {"size": "native", "batch_size": 2},
    "APTSampler": {"seed": 5},
}


@pytest.mark.parametrize("name", [name for name in NAMES if "wan2" in name or name == "apt_text_to_image"])
def test_a_graph_of_a_big_model_makes_clips_with_the_miniature_in_its_place(frontend, server, name):
    prompt = convert(frontend, name)
    for node in prompt.values():
        if node["class_type"] == "CLIPLoader":
            node |= {"class_type": "APTLoadTextEncoder", "inputs": {"text_encoder": MINI_TEXT}}
        node["inputs"] |= ON_THE_MINIATURE.get(node["class_type"], {})
    (files,) = server.run(prompt).values()
    frames = np.concatenate([read_video(file) for file in files])
    assert frames.shape == (18, 48, 48, 3)
    assert caption_seen(frames[:9]) == ON_THE_MINIATURE["CLIPTextEncode"]["text"]


def test_stock_nodes_make_the_same_clip(frontend, server):
    ours, stock = (
        read_video(path).astype(int)
        for _, path in sorted(outputs(server, convert(frontend, "apt_stock_nodes")).items())
    )
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


def test_the_loader_lists_the_models_of_a_linked_run_and_not_its_data(server):
    listed = server.get("/object_info/APTLoadCheckpoint")["APTLoadCheckpoint"]["input"]["required"][
        "checkpoint"
    ]
    names = {name for name in listed[1]["options"] if name.startswith("demo")}
    assert names == {"demo/base.safetensors", "demo/distilled.safetensors", "demo/apt-mini.safetensors"}


def test_the_blueprint_is_offered_and_makes_the_clip_of_its_prompt(frontend, server):
    offered = server.get("/global_subgraphs")
    ours = [key for key, entry in offered.items() if entry["info"]["node_pack"] == "custom_nodes.ComfyUI-APT"]
    assert [offered[key]["name"] for key in ours] == ["APT text to video"]
    graph = json.loads(server.get(f"/global_subgraphs/{ours[0]}")["data"])
    (node,) = graph["nodes"]
    assert frontend.open(graph) == [node["type"]] and frontend.missing() == []
    shown = frontend.page.evaluate("() => window.app.graph.nodes[0].widgets.map(w => w.name)")
    files = ["checkpoint", "text_encoder", "vae_name"]
    assert shown == ["text", "seed", "steps", "size", *files]
    frontend.page.evaluate("""() => {
        const [node] = window.app.graph.nodes, save = window.LiteGraph.createNode("SaveVideo")
        window.app.graph.add(save)
        node.connect(0, save, 0)
    }""")
    prompt = frontend.prompt()
    (path,) = outputs(server, prompt).values()
    assert caption_seen(read_video(path)) == caption_of(prompt)
    assert frontend.errors == []
