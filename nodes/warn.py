"""What a user should know of a run that goes on all the same: on the node, in the log and in the history."""

import logging

from comfy_api.latest import ui
from server import PromptServer


def warn(node: str, unique_id: str, sentences: list[str]) -> ui.PreviewText | None:
    """The `ui` of a node's output, None without sentences; `node` is its display name."""
    if not sentences:
        return None
    for sentence in sentences:
        logging.warning(f"{node}: {sentence}")
    text = "\n".join(sentences)
    # On the node itself; what is in `ui` goes to the history only.
    PromptServer.instance.send_progress_text(text, unique_id)
    return ui.PreviewText(text)
