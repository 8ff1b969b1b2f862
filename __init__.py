"""ComfyUI-APT: one-step video and image generation. ComfyUI loads this file; everything else lives in the
packages beside it.
"""

# Help pages of the nodes: nodes/web/docs/<node id>.md
WEB_DIRECTORY = "./nodes/web"

# pytest and pip come here without a package around this file; only ComfyUI imports it as one.
if __package__:
    from .nodes import comfy_entrypoint  # noqa: F401 - ComfyUI looks for it here
