"""What the checks of the nodes share: the pack as ComfyUI loads it, and what its nodes say. `start()` must
have run.
"""

import asyncio
from types import SimpleNamespace

import folder_paths
import server

import nodes


def load_nodes(pack: str) -> SimpleNamespace:
    """The pack's node classes by name, all registered in ComfyUI."""
    assert asyncio.run(nodes.load_custom_node(pack))
    return SimpleNamespace(
        **{name: node for name, node in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("APT")}
    )


def show_on_nodes(apt: SimpleNamespace) -> list:
    """Stands in for the server, which shows such text on the node: it goes to the list, as [text, node's
    name].
    """
    shown = []
    server.PromptServer.instance = SimpleNamespace(
        send_progress_text=lambda text, node_id: shown.append([text, node_id])
    )
    for name, node in vars(apt).items():
        node.hidden = SimpleNamespace(unique_id=name, prompt=None, extra_pnginfo=None)
    return shown


def offer(folder: str, *kinds: str) -> None:
    """List the files of a folder in the stock loaders."""
    for kind in kinds:
        folder_paths.add_model_folder_path(kind, folder)


def sentence(call, *inputs, **more) -> str:
    """What a node says to bad inputs."""
    try:
        call(*inputs, **more)
    except ValueError as error:
        return f"{type(error).__name__} {error}"
    return "nothing was raised"
