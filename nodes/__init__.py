"""ComfyUI nodes over apt_core, on stock types: MODEL, CLIP, LATENT, NOISE, IMAGE and VIDEO go to and come from any other node."""


async def comfy_entrypoint():
    """What ComfyUI calls when it loads the pack: the list of our nodes. Only here is anything of ComfyUI imported."""
    from comfy_api.latest import ComfyExtension

    from . import folders
    from .decode import APTVAEDecode
    from .decode_to_video import APTVAEDecodeToVideo
    from .empty_latent import APTEmptyLatent
    from .load_checkpoint import APTLoadCheckpoint
    from .load_text_encoder import APTLoadTextEncoder
    from .noise_walk import APTNoiseWalk
    from .sampler import APTSampler

    class AptExtension(ComfyExtension):
        async def on_load(self):
            folders.register()

        async def get_node_list(self):
            return [
                APTLoadCheckpoint,
                APTLoadTextEncoder,
                APTEmptyLatent,
                APTSampler,
                APTNoiseWalk,
                APTVAEDecode,
                APTVAEDecodeToVideo,
            ]

    return AptExtension()
