"""ComfyUI nodes over apt_core. Until they land, stock nodes run our checkpoints: see the README."""


async def comfy_entrypoint():
    """What ComfyUI calls when it loads the pack: the list of our nodes."""
    from comfy_api.latest import ComfyExtension

    class AptExtension(ComfyExtension):
        async def get_node_list(self):
            return []

    return AptExtension()
