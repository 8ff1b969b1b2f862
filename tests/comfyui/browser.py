"""ComfyUI's own frontend in a headless Chromium: opens UI-format workflows, makes API prompts of them."""

import os
from pathlib import Path

import pytest

READY = "() => window.app?.graph && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100"
OPEN = (
    "async workflow => { await window.app.loadGraphData(workflow); "
    "return window.app.graph.nodes.map(n => n.type) }"
)
MISSING = """() => [
    ...window.app.graph.nodes.filter(
        n => !window.LiteGraph.registered_node_types[n.type] || n.has_errors
    ).map(n => n.type),
]"""
CONVERT = "async () => (await window.app.graphToPrompt()).output"
# Fits the graph into the free part of the window; returns that part.
FRAME = """() => {
    const {app} = window, margin = 40, left = 70, top = 90
    const nodes = app.graph.nodes, title = window.LiteGraph.NODE_TITLE_HEIGHT
    const x0 = Math.min(...nodes.map(n => n.pos[0])) - margin
    const y0 = Math.min(...nodes.map(n => n.pos[1] - title)) - margin
    const x1 = Math.max(...nodes.map(n => n.pos[0] + n.size[0])) + margin
    const y1 = Math.max(...nodes.map(n => n.pos[1] + n.size[1])) + margin
    const scale = Math.min((window.innerWidth - left) / (x1 - x0), (window.innerHeight - top) / (y1 - y0))
    app.canvas.ds.scale = scale
    app.canvas.ds.offset = [left / scale - x0, top / scale - y0]
    app.canvas.setDirty(true, true)
    return [left, top, (x1 - x0) * scale, (y1 - y0) * scale]
}"""
# No first-visit dialog, no overview map and no frame counter over the canvas.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False}
START_MS = 240_000


def chromium() -> str:
    """Path of the browser. Skips the test with a sentence where there is none."""
    path = os.environ.get("CHROMIUM")
    if not path:
        pytest.skip(
            "set CHROMIUM to a Chromium or chromium-headless-shell executable to test in a real browser"
        )
    if not Path(path).is_file():
        pytest.fail(f"CHROMIUM is {path}, which is not a file")
    pytest.importorskip(
        "playwright",
        reason="pip install playwright to test in a real browser (its own browsers are not needed)",
    )
    return path


class Frontend:
    """One page on a server. `errors` collects what the page's own scripts throw."""

    def __init__(self, url: str, executable: str, width: int = 1600, height: int = 900):
        from playwright.sync_api import sync_playwright

        self.playwright = sync_playwright().start()
        self.browser = self.playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        self.page = self.browser.new_page(viewport={"width": width, "height": height})
        self.errors = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.request.post(f"{url}/api/settings", data=SETTINGS)
        self.page.goto(url, timeout=START_MS)
        self.page.wait_for_function(READY, timeout=START_MS)

    def open(self, workflow: dict) -> list[str]:
        """Load a UI-format graph; returns the types of its nodes as the frontend has them."""
        return self.page.evaluate(OPEN, workflow)

    def missing(self) -> list[str]:
        return self.page.evaluate(MISSING)

    def prompt(self) -> dict:
        """The open graph in API format, as the frontend would queue it."""
        return self.page.evaluate(CONVERT)

    def picture(self, path: Path) -> None:
        """A screenshot of the whole graph, without the panels around it."""
        box = self.page.evaluate(FRAME)
        self.page.wait_for_timeout(1500)
        self.page.screenshot(path=path, clip=dict(zip(("x", "y", "width", "height"), box)))

    def close(self) -> None:
        self.browser.close()
        self.playwright.stop()
