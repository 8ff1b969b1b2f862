"""What a graph of example_workflows/ is made of, and the pieces that graphs of the miniature share.

Positions and sizes are pixels of the canvas. ComfyUI opens a graph at 3/4 of the window and leaves text away
below 8 pixels, so at 1366x768 a graph has room for 1,790 x 1,000. Every link goes to a column further right,
and a lane is left free for one that skips a column.
"""

from dataclasses import dataclass, field

MINI, MINI_VAE, MINI_TEXT = "apt_mini.safetensors", "apt_mini_vae.safetensors", "apt_mini_text_encoder"


WIDTH = 1650
"""Of a graph with its groups and its note."""


@dataclass(frozen=True)
class Columns:
    """Left edges and widths, from left to right: two columns of groups, then those of the result."""

    widths: tuple[int, ...]
    lanes: tuple[int, ...] = ()  # to the right of each column, where they are not the usual ones
    GROUPS, RESULT, EDGE = 60, 40, 10  # between groups, within the last one, around all

    def __getitem__(self, column: int) -> int:
        lanes = self.lanes or (self.GROUPS, self.GROUPS, *[self.RESULT] * len(self.widths))
        return self.EDGE + sum(self.widths[:column]) + sum(lanes[:column])


FIVE, SIX = Columns((290, 310, 270, 270, 290)), Columns((250, 260, 245, 205, 220, 210))
GROUPS = {"1 Model": "#3f789e", "2 Prompt": "#b58b2a", "3 Result": "#88aa88"}
# Of columns: a lane for MODEL above the prompt, and one for fps between sampler and VAE.
TEXT, LATENT, VAE, DECODE = 80, 260, 360, 240
SECOND = 150  # the second loader
MUTED = 2  # a mode of LiteGraph
ROOM = 310  # that a decode takes with its preview


@dataclass
class Node:
    """One node of a graph; `node[1]` is its second output, the node itself stands for its first."""

    id: int
    type: str
    column: int
    y: int
    tall: int
    title: str | None
    inputs: dict
    span: int = 1
    off: bool = False

    def __getitem__(self, slot: int) -> tuple["Node", int]:
        return self, slot


@dataclass
class Graph:
    columns: Columns = FIVE
    nodes: list[Node] = field(default_factory=list)
    detours: dict[tuple[int, int], list] = field(default_factory=dict)
    about: str = ""
    about_height: int = 0

    def add(
        self,
        type: str,
        column: int,
        y: int,
        title: str | None = None,
        /,
        *,
        tall: int = 0,
        span: int = 1,
        off: bool = False,
        **inputs,
    ) -> Node:
        """`inputs` are values of widgets, in the order in which a user would set them, or nodes to link from.
        `tall`: pixels, where the node's own height will not do; `span`: over how many columns; `off`: muted,
        to be turned on by who wants it.
        """
        node = Node(len(self.nodes) + 1, type, column, y, tall, title, inputs, span, off)
        self.nodes.append(node)
        return node

    def detour(self, source: Node, target: Node, *points: tuple[int, int]) -> None:
        """The link between the two goes through these points."""
        self.detours[source.id, target.id] = list(points)

    def note(self, title: str, *lines: str) -> None:
        """Above everything, as wide as the graph. All in headings, for these alone are large enough where the
        graph just fits the window.
        """
        self.about = "\n\n".join([f"# {title}", *(f"## {line}" for line in lines)])
        self.about_height = 60 + 34 * len(lines)

    def width(self, node: Node) -> int:
        last = node.column + node.span - 1
        return self.columns[last] + self.columns.widths[last] - self.columns[node.column]

    def description(self) -> dict:
        """Plain JSON for the browser: nodes with the values of their widgets, and links by the names of
        inputs.
        """
        nodes, links = [], []
        for node in self.nodes:
            widgets = []
            for name, value in node.inputs.items():
                source, slot = (
                    (value, 0)
                    if isinstance(value, Node)
                    else value
                    if isinstance(value, tuple)
                    else (None, 0)
                )
                if source:
                    links.append({"from": source.id, "slot": slot, "to": node.id, "input": name})
                else:
                    widgets.append([name, value])
            place = {"at": (self.columns[node.column], node.y), "size": (self.width(node), node.tall)}
            mode = {"mode": MUTED} if node.off else {}
            made = {"id": node.id, "type": node.type, "title": node.title, "widgets": widgets}
            nodes.append(made | place | mode)
        note = {
            "id": len(nodes) + 1,
            "type": "MarkdownNote",
            "title": "About this workflow",
            "widgets": [["text", self.about]],
        }
        nodes.append(note | {"at": (0, 0), "size": (WIDTH, self.about_height)})
        return {"nodes": nodes, "links": links}


def mini_front(g: Graph, prompt: str, size: dict):
    """The miniature's loaders, prompt and latent: (model, conditioning, latent, vae)."""
    model = g.add("APTLoadCheckpoint", 0, 0, checkpoint=MINI)
    clip = g.add("APTLoadTextEncoder", 0, SECOND, text_encoder=MINI_TEXT)
    text = g.add("CLIPTextEncode", 1, TEXT, "Prompt", tall=120, text=prompt, clip=clip)
    latent = g.add("APTEmptyLatent", 1, LATENT, model=model, **size)
    vae = g.add("VAELoader", 2, VAE, vae_name=MINI_VAE)
    return model, text, latent, vae


def video_out(
    g: Graph,
    vae: Node,
    samples: Node,
    fps,
    prefix: str,
    title: str | None = None,
    tall: int = 420,
    span: int = 1,
) -> None:
    video = g.add("APTVAEDecodeToVideo", 3, DECODE, span=span, vae=vae, samples=samples, fps=fps)
    g.add("SaveVideo", 3 + span, 0, title, tall=tall, video=video, filename_prefix=prefix)
