"""Writes example_workflows/ (graphs and pictures), subgraphs/ and the tests' snapshots of /object_info,
interface and words: builds each graph of graphs.py in ComfyUI's own frontend and keeps what that saves; the
picture is the graph's own output where the miniature is enough, else it says what is needed.

COMFYUI_DIR=... COMFYUI_PYTHON=... CHROMIUM=... python tests/comfyui/build_workflows.py [--screenshots FOLDER]
[NAME ...]
"""

import argparse
import json
import os
import tempfile
import tomllib
import uuid
from pathlib import Path

from browser import Frontend
from canvas import GROUPS, ROOM, WIDTH, Graph
from cards import card_of_outputs, card_of_words
from graphs import CARDS, PUBLIC, RUNNABLE, WORKFLOWS
from interface import write_snapshot, write_words
from server import ROOT, Server
from stand_ins import make_stand_ins

FOLDER = ROOT / "example_workflows"
BUILD = """async ({nodes, links}) => {
    const empty = {nodes: [], links: [], groups: [], version: 0.4, last_node_id: 0, last_link_id: 0}
    await window.app.loadGraphData(empty)
    const graph = window.app.graph, made = {}
    for (const item of nodes) {
        const node = made[item.id] = window.LiteGraph.createNode(item.type)
        if (!node) throw new Error(`ComfyUI has no node ${item.type}`)
        graph.add(node)
        if (item.title) node.title = item.title
        if (item.mode) node.mode = item.mode
        for (const [name, value] of item.widgets) {
            const widget = node.widgets.find(w => w.name === name)
            const names = node.widgets.map(w => w.name)
            if (!widget) throw new Error(`${item.type} has no widget ${name}, but ${names}`)
            widget.value = value
            widget.callback?.(value)
        }
        node.pos = item.at
    }
    for (const link of links) {
        const to = made[link.to], slot = to.inputs.findIndex(i => i.name === link.input)
        const names = to.inputs.map(i => i.name)
        if (slot < 0) throw new Error(`${to.type} has no input ${link.input}, but ${names}`)
        const linked = made[link.from].connect(link.slot, to, slot)
        if (!linked) throw new Error(`${to.type}.${link.input} refused the link`)
    }
    for (const item of nodes) {
        const node = made[item.id], least = node.computeSize()
        node.setSize([item.size[0] || least[0], Math.max(item.size[1], least[1])])
    }
    return JSON.stringify(graph.serialize())
}"""


BLUEPRINT = "APT text to video"
SHOWN = [
    ("CLIPTextEncode", "text"),
    ("APTSampler", "seed"),
    ("APTSampler", "control_after_generate"),
    ("APTSampler", "steps"),
    ("APTEmptyLatent", "size"),
    ("APTLoadCheckpoint", "checkpoint"),
    ("APTLoadTextEncoder", "text_encoder"),
    ("VAELoader", "vae_name"),
]
"""Widgets that the blueprint's node has outside."""
AS_SUBGRAPH = """([name, shown]) => {
    const graph = window.app.graph
    const {subgraph, node} = graph.convertToSubgraph(new Set(graph.nodes.filter(n => n.type !== "SaveVideo")))
    subgraph.name = node.title = name
    const of = type => String(subgraph.nodes.find(n => n.type === type).id)
    node.properties.proxyWidgets = shown.map(([type, widget]) => [of(type), widget])
    node.pos = [0, 0]
    node.setSize([320, node.computeSize()[1] + 60])
    return JSON.stringify(graph.serialize())
}"""


def add_groups(graph: dict, made: Graph) -> None:
    """Three groups of one height around the nodes by column, and the note above them."""
    *nodes, note = graph["nodes"]
    top = min(node["pos"][1] for node in nodes) - 30 - 10 - 40  # titles of nodes, edge, title of the group
    # What is decoded and saved makes its node taller than ComfyUI stores it.
    bottom = (
        max(
            node["pos"][1] + max(node["size"][1], mine.tall, ROOM * mine.type.startswith("APTVAE"))
            for node, mine in zip(nodes, made.nodes)
        )
        + 10
    )
    graph["groups"] = []
    for i, (title, color) in enumerate(GROUPS.items()):
        left, right = made.columns[i] - 10, made.columns[i] + made.columns.widths[i] + 10
        if i == 2:
            assert made.columns[len(made.columns.widths) - 1] + made.columns.widths[-1] + 10 <= WIDTH
            right = WIDTH
        bounding = [left, top, right - left, bottom - top]
        graph["groups"].append(
            {"id": i + 1, "title": title, "bounding": bounding, "color": color, "font_size": 24, "flags": {}}
        )
    note["pos"] = [0, top - 15 - note["size"][1]]


def detours(graph: dict, made: Graph) -> dict:
    """Reroute points of links, as the frontend stores them. Links that leave an output by the same points are
    one wire up to where they part.
    """
    links = {(link[1], link[3]): link for link in graph["links"]}
    reroutes, extensions = {}, []
    for ends, points in made.detours.items():
        link, source, slot, *_ = links[ends]
        before = {}
        for i in range(len(points)):
            way = source, slot, *points[: i + 1]
            new = {"id": len(reroutes) + 1, **before, "pos": list(points[i]), "linkIds": []}
            reroutes.setdefault(way, new)["linkIds"].append(link)
            before = {"parentId": reroutes[way]["id"]}
        extensions.append({"id": link, **before})
    return {"reroutes": list(reroutes.values()), "linkExtensions": extensions} if reroutes else {}


def finish(name: str, graph: dict, made: Graph, core_version: str) -> dict:
    """Node ids in the order of their definition, where each node and each public model file comes from, and
    no view of the canvas.
    """
    graph["nodes"].sort(key=lambda node: node["id"])
    for node in graph["nodes"]:
        if node["type"] == "MarkdownNote":
            node["properties"] = {}
            node["color"], node["bgcolor"] = "#432", "#653"
            continue
        node["properties"] = origin(node, core_version)
        files = [value for value in node.get("widgets_values", []) if value in PUBLIC]
        if files:
            node["properties"]["models"] = [
                {"name": file, "url": PUBLIC[file][0], "directory": PUBLIC[file][1]} for file in files
            ]
    add_groups(graph, made)
    graph["extra"] = detours(graph, made)
    graph["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-apt/workflows/{name}"))
    return graph


def blueprint(frontend: Frontend, core_version: str) -> dict:
    """subgraphs/: the miniature's text to video as one node, which ComfyUI lists among its blueprints.

    The node that saves is there only while it is made, for a subgraph has the outputs that lead out of it.
    """
    made = WORKFLOWS["apt_mini_text_to_video"]()
    described = made.description()
    described["nodes"].pop()  # the note
    frontend.page.evaluate(BUILD, described)
    graph = json.loads(frontend.page.evaluate(AS_SUBGRAPH, [BLUEPRINT, SHOWN]))
    (node,) = graph["nodes"] = [node for node in graph["nodes"] if node["type"] != "SaveVideo"]
    graph["links"] = []
    for output in node["outputs"]:
        output["links"] = []
    (inside,) = graph["definitions"]["subgraphs"]
    for one in inside["nodes"]:
        one["properties"] = origin(one, core_version)
    text, ids = json.dumps(graph), [graph["id"], inside["id"]]
    ids += [slot["id"] for slot in inside["inputs"] + inside["outputs"]]
    for i, made_up in enumerate(ids):  # the frontend draws them anew each time
        text = text.replace(made_up, str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-apt/subgraphs/{i}")))
    return json.loads(text)


def origin(node: dict, core_version: str) -> dict:
    """Properties that say which pack a node is from."""
    pack = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ours = node["type"].startswith("APT")
    name, version = (pack["name"], pack["version"]) if ours else ("comfy-core", core_version)
    return {"cnr_id": name, "ver": version, "Node name for S&R": node["type"]}


def write(path: Path, graph: dict) -> None:
    path.write_text(json.dumps(graph, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--screenshots", type=Path, help="put a picture of each graph here")
    parser.add_argument("names", nargs="*", default=list(WORKFLOWS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        make_stand_ins(Path(scratch) / "models")
        screenshots = arguments.screenshots or Path(scratch)
        with Server(Path(os.environ["COMFYUI_DIR"]).resolve(), Path(scratch)) as server:
            frontend = Frontend(server.url, os.environ["CHROMIUM"], 2200, 1200)
            version = server.get("/system_stats")["system"]["comfyui_version"]
            write_words(server.get("/object_info"))
            write_snapshot(
                server.get("/object_info"),
                {node.type for make in WORKFLOWS.values() for node in make().nodes},
            )
            write(ROOT / "subgraphs" / f"{BLUEPRINT}.json", blueprint(frontend, version))
            for name in arguments.names:
                made = WORKFLOWS[name]()
                graph = finish(
                    name, json.loads(frontend.page.evaluate(BUILD, made.description())), made, version
                )
                write(FOLDER / f"{name}.json", graph)
                frontend.open(graph)
                frontend.picture(screenshots / f"{name}.png")
                frontend.page.set_viewport_size({"width": 1366, "height": 768})
                frontend.open(graph)
                frontend.page.wait_for_timeout(1500)
                frontend.page.screenshot(path=screenshots / f"{name}-opened.png")
                frontend.page.set_viewport_size({"width": 2200, "height": 1200})
                if name in RUNNABLE:
                    files = [file for made in server.run(frontend.prompt()).values() for file in made]
                    card_of_outputs(files, FOLDER / f"{name}.jpg")
                else:
                    card_of_words(CARDS[name], FOLDER / f"{name}.jpg")
                print(f"{name}: {len(graph['nodes'])} nodes", flush=True)
            frontend.close()


if __name__ == "__main__":
    main()
