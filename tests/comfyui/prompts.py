"""API-format prompts for the tests. Keys of a prompt are node ids; a link is [node id, output]."""

MINI, MINI_VAE, MINI_TEXT = "apt_mini.safetensors", "apt_mini_vae.safetensors", "apt_mini_text_encoder"
NATIVE = {"size": "native", "batch_size": 1}


def custom(width: int, height: int, frames: int, batch_size: int = 1) -> dict:
    """Inputs of Empty APT Latent for a size of one's own."""
    return {
        "size": "custom",
        "size.width": width,
        "size.height": height,
        "size.frames": frames,
        "batch_size": batch_size,
    }


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def mini_latents(caption: str, seed: int, size: dict = NATIVE, checkpoint: str = MINI, **sampler) -> dict:
    """The miniature up to latents, node "samples"."""
    inputs = {
        "model": ["model", 0],
        "positive": ["text", 0],
        "latent": ["latent", 0],
        "seed": seed,
        "steps": 1,
        **sampler,
    }
    return {
        "model": node("APTLoadCheckpoint", checkpoint=checkpoint, weight_dtype="default"),
        "clip": node("APTLoadTextEncoder", text_encoder=MINI_TEXT),
        "text": node("CLIPTextEncode", text=caption, clip=["clip", 0]),
        "latent": node("APTEmptyLatent", model=["model", 0], **size),
        "samples": node("APTSampler", **inputs),
    }


def mini_video(caption: str, seed: int, size: dict = NATIVE, **sampler) -> dict:
    """The miniature to an mp4 in output/, written by node "save"."""
    return mini_latents(caption, seed, size, **sampler) | {
        "vae": node("VAELoader", vae_name=MINI_VAE),
        "video": node("APTVAEDecodeToVideo", vae=["vae", 0], samples=["samples", 0], fps=["latent", 1]),
        "save": node(
            "SaveVideo", video=["video", 0], filename_prefix="video/test", format="auto", codec="auto"
        ),
    }


def mini_image(caption: str, seed: int, size: dict, **sampler) -> dict:
    """The miniature to PNG files, written by node "save"."""
    return mini_latents(caption, seed, size, **sampler) | {
        "vae": node("VAELoader", vae_name=MINI_VAE),
        "images": node("APTVAEDecode", vae=["vae", 0], samples=["samples", 0]),
        "save": node("SaveImage", images=["images", 0], filename_prefix="test"),
    }


def stock_latents(caption: str, seed: int, checkpoint: str, width: int, height: int, length: int) -> dict:
    """The same latents by KSampler, node "samples"."""
    return {
        "model": node("UNETLoader", unet_name=checkpoint, weight_dtype="default"),
        "clip": node("APTLoadTextEncoder", text_encoder=MINI_TEXT),
        "text": node("CLIPTextEncode", text=caption, clip=["clip", 0]),
        "negative": node("ConditioningZeroOut", conditioning=["text", 0]),
        "latent": node("EmptyHunyuanLatentVideo", width=width, height=height, length=length, batch_size=1),
        "samples": node(
            "KSampler",
            model=["model", 0],
            positive=["text", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=seed,
            steps=1,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
    }


def saving_latents(prompt: dict, name: str) -> dict:
    """`prompt` with its "samples" written to output/latents as safetensors."""
    return prompt | {"save": node("SaveLatent", samples=["samples", 0], filename_prefix=f"latents/{name}")}
