"""What a user should know of a run that goes on all the same: on the node, in the log and in the history."""

import logging

from comfy_api.latest import ui
from server import PromptServer

_warned: set[str] = set()
"""Ids of nodes that show a text: it is taken away when there is nothing to say any more."""


def warn(node: str, hidden, sentences: list[str]) -> ui.PreviewText | None:
    """The `ui` of a node's output, None without sentences; `node` is its display name, `hidden` the hidden
    inputs of its class.

    A node shows two lines of about 35 letters before one has to scroll: a sentence begins with what is wrong.
    """
    for sentence in sentences:
        logging.warning(f"{node}: {sentence}")
    return show("\n".join(sentences), hidden)


def show(text: str, hidden) -> ui.PreviewText | None:
    """The `ui` of an output with `text`, which the node shows too; an empty one takes away an earlier run's."""
    unique_id = hidden and hidden.unique_id
    if text or unique_id in _warned:
        # On the node itself; what is in `ui` goes to the history only. ComfyUI's frontend passes over an
        # empty text.
        PromptServer.instance.send_progress_text(text or " ", unique_id)
        (_warned.add if text else _warned.discard)(unique_id)
    return ui.PreviewText(text) if text else None
