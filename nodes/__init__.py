"""ComfyUI nodes over apt_core. They use stock types, so MODEL, CLIP, LATENT, NOISE, IMAGE and VIDEO connect
to and from any other node.
"""

NEEDED = "0.33.0"
"""The oldest ComfyUI that the nodes are tested with; pyproject.toml gives the same to the registry."""


async def comfy_entrypoint():
    """ComfyUI calls this when it loads the pack, and gets the list of our nodes. ComfyUI is imported only
    here.

    Raises AptError, which ComfyUI writes to its log, if ComfyUI is too old.
    """
    _check_version()
    from comfy_api.latest import ComfyExtension

    from ..apt_core.errors import AptError
    from . import folders
    from .decode import APTVAEDecode
    from .decode_to_video import APTVAEDecodeToVideo
    from .empty_latent import APTEmptyLatent
    from .load_checkpoint import APTLoadCheckpoint
    from .load_prompts import APTLoadPrompts
    from .load_text_encoder import APTLoadTextEncoder
    from .noise_walk import APTNoiseWalk
    from .sampler import APTSampler
    from .save_checkpoint import APTSaveCheckpoint

    # ComfyUI shows the full name of an exception's type, and a pack's modules are named after the path of its
    # folder.
    AptError.__module__ = "apt"

    class AptExtension(ComfyExtension):
        async def on_load(self):
            folders.register()

        async def get_node_list(self):
            return [
                APTLoadCheckpoint,
                APTLoadTextEncoder,
                APTLoadPrompts,
                APTEmptyLatent,
                APTSampler,
                APTNoiseWalk,
                APTVAEDecode,
                APTVAEDecodeToVideo,
                APTSaveCheckpoint,
            ]

    return AptExtension()


def _check_version() -> None:
    """Old versions load the pack and fail later with an unclear message, because they never call
    `on_load`.
    """
    from ..apt_core.errors import AptError

    try:
        from comfyui_version import __version__ as version
    except ImportError:  # a ComfyUI that is older than this file
        version = "an older one"
    numbers = [int(number) for number in version.split(".") if number.isdecimal()]
    if numbers < [int(number) for number in NEEDED.split(".")]:
        raise AptError(f"ComfyUI-APT needs ComfyUI {NEEDED} or newer and this is {version}: update ComfyUI.")
