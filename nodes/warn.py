"""Warnings about a run that continues: on the node, in the log and in the history."""

import logging

from comfy_api.latest import ui
from server import PromptServer

_warned: set[str] = set()
"""Ids of nodes that show a text, which is removed when there is no longer anything to say."""


def warn(node: str, hidden, sentences: list[str]) -> ui.PreviewText | None:
    """The `ui` of a node's output, or None without sentences. `node` is its display name, `hidden` the hidden
    inputs of its class.

    A node shows two lines of about 35 letters before one has to scroll, so begin with what is wrong.
    """
    for sentence in sentences:
        logging.warning(f"{node}: {sentence}")
    return show("\n".join(sentences), hidden)


def show(text: str, hidden) -> ui.PreviewText | None:
    """The `ui` of an output with `text`, which also appears on the node; an empty text removes an earlier
    one.
    """
    unique_id = hidden and hidden.unique_id
    if text or unique_id in _warned:
        # This puts it on the node; `ui` alone only reaches the history. ComfyUI's frontend ignores an empty
        # text.
        PromptServer.instance.send_progress_text(text or " ", unique_id)
        (_warned.add if text else _warned.discard)(unique_id)
    return ui.PreviewText(text) if text else None
