"""The frontend in another language shows our words for nodes, inputs and what a dynamic combo opens."""

import json

import pytest
from interface import WORDS

FOLDER = WORDS.parents[2] / "locales"
SHOWN = """() => Object.fromEntries(["APTSampler", "APTEmptyLatent", "APTSaveCheckpoint"].map(type => {
    const node = window.LiteGraph.createNode(type)
    window.app.graph.add(node)
    const size = node.widgets.find(w => w.name === "size")
    if (size) { size.value = "custom"; size.callback?.("custom") }
    const labels = Object.fromEntries(node.widgets.map(w => [w.name.replace(".", "_"), w.label]))
    const inputs = Object.fromEntries(node.inputs.map(i => [i.name.replace(".", "_"), i.localized_name]))
    return [type, {title: node.title, labels: {...inputs, ...labels}}]
}))"""


@pytest.fixture
def in_language(frontend):
    def switch(locale: str) -> None:
        origin = frontend.page.evaluate("() => location.origin")
        frontend.page.request.post(f"{origin}/api/settings", data={"Comfy.Locale": locale})
        frontend.page.reload()
        frontend.page.wait_for_function(
            "() => window.app?.graph && 'APTSampler' in (window.LiteGraph?.registered_node_types ?? {})"
        )

    yield switch
    switch("en")


@pytest.mark.parametrize("locale", ["zh", "ja"])
def test_nodes_are_shown_in_the_language_of_the_frontend(frontend, in_language, locale):
    in_language(locale)
    nodes = json.loads((FOLDER / locale / "nodeDefs.json").read_text(encoding="utf-8"))
    for name, shown in frontend.page.evaluate(SHOWN).items():
        assert shown["title"] == nodes[name]["display_name"]
        expected = {key: given["name"] for key, given in nodes[name]["inputs"].items()}
        assert {key: shown["labels"].get(key) for key in expected} == expected
