"""The graphs of example_workflows/, in code: `build_workflows.py` has ComfyUI's frontend turn them into
files.
"""

from canvas import DECODE, FIVE, LATENT, MINI, SECOND, SIX, TEXT, VAE, Graph, Node, mini_front, video_out
from recipes import (
    draft_and_refine,
    long_clip,
    prompts_from_file,
    scale_up,
    seed_contact_sheet,
    trained_run_compared,
)

HUB = "https://huggingface.co/Comfy-Org"
WAN21 = f"{HUB}/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
WAN22 = f"{HUB}/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
# Public files, by name: (address, folder under models/).
PUBLIC = {
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": (
        f"{WAN21}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        "text_encoders",
    ),
    "wan_2.1_vae.safetensors": (f"{WAN21}/vae/wan_2.1_vae.safetensors", "vae"),
    "wan2.2_vae.safetensors": (f"{WAN22}/vae/wan2.2_vae.safetensors", "vae"),
    "wan2.1_t2v_14B_fp8_scaled.safetensors": (
        f"{WAN21}/diffusion_models/wan2.1_t2v_14B_fp8_scaled.safetensors",
        "diffusion_models",
    ),
    "lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors": (
        (
            "https://huggingface.co/Kijai/WanVideo_comfy/resolve/main/Lightx2v/"
            "lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors"
        ),
        "loras",
    ),
    "wan2.1_t2v_1.3B_fp16.safetensors": (
        f"{WAN21}/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors",
        "diffusion_models",
    ),
}
UMT5 = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
IMAGE_PRESET, VIDEO_PRESET = "image 1024", "video 1280x720, 2 s"


def wan_front(g: Graph, model: Node, vae_name: str, prompt: str, size: dict, second: int = SECOND):
    """The same for a released Wan: the stock loaders of its text encoder and, beside the decode, its VAE."""
    clip = g.add("CLIPLoader", 0, second, clip_name=UMT5, type="wan")
    text = g.add("CLIPTextEncode", 1, TEXT, "Prompt", tall=120, text=prompt, clip=clip)
    latent = g.add("APTEmptyLatent", 1, LATENT, model=model, **size)
    vae = g.add("VAELoader", 2, VAE, vae_name=vae_name)
    return text, latent, vae


def mini_text_to_video() -> Graph:
    g = Graph()
    model, text, latent, vae = mini_front(
        g, "a red circle moving left on a green background", {"size": "native"}
    )
    samples = g.add("APTSampler", 2, 0, model=model, positive=text, latent=latent, seed=5, steps=2)
    video_out(g, vae, samples, latent[1], "video/apt_mini")
    g.note(
        "Press **Run**: nothing has to be downloaded, and a CPU will do",
        "The miniature is a complete Wan in small: it makes clips of 9 frames of 48x48 pixels. "
        "Every seed gives another one.",
        "*steps* 1: one call of the network, what it was trained for. *steps* 2: "
        "fresh noise on that and a second call, for more structure at twice the time.",
        "It knows sentences like: *a **red** **circle** moving **left** on a **green** background*",
        "Colours: red, green, blue, yellow, purple. Shapes: circle, square, triangle. Directions: "
        "left, right, up, down.",
    )
    return g


STREET = (
    "A street musician plays the guitar under a railway bridge at dusk. "
    "Commuters pass by in warm light, a small crowd listens, "
    "the camera slowly moves to the right."
)


def public(name: str) -> str:
    url, folder = PUBLIC[name]
    return f"[{name}]({url}) → models/{folder}"


def trained(name: str, folder: str = "diffusion_models") -> str:
    return (
        f"{name} → models/{folder}: none is public, the trainer of ComfyUI-APT makes it from your clips "
        "(README, *Train*); choose yours in the loader"
    )


def wan21_text_to_video() -> Graph:
    g = Graph()
    model = g.add("APTLoadCheckpoint", 0, 0, checkpoint="wan2.1_1.3B_apt.safetensors")
    text, latent, vae = wan_front(g, model, "wan_2.1_vae.safetensors", STREET, {"size": "native"})
    samples = g.add("APTSampler", 2, 0, model=model, positive=text, latent=latent, seed=1)
    video_out(g, vae, samples, latent[1], "video/apt_wan21")
    g.note(
        "Text to video with an APT checkpoint of **Wan 2.1**, in one step",
        "Needs " + trained("wan2.1_1.3B_apt.safetensors"),
        f"and {public(UMT5)}, {public('wan_2.1_vae.safetensors')}",
        "There is no CFG, no scheduler and no negative prompt to set: they would only make it worse.",
    )
    return g


def wan22_text_to_video() -> Graph:
    g = Graph()
    model = g.add("APTLoadCheckpoint", 0, 0, checkpoint="wan2.2_5B_apt.safetensors")
    text, latent, vae = wan_front(g, model, "wan2.2_vae.safetensors", STREET, {"size": VIDEO_PRESET})
    samples = g.add("APTSampler", 2, 0, model=model, positive=text, latent=latent, seed=1)
    video_out(g, vae, samples, latent[1], "video/apt_wan22_5b")
    g.note(
        "Text to video with an APT checkpoint of **Wan 2.2 5B**: 1280x704, 24 fps, 2 seconds, one step",
        "Needs " + trained("wan2.2_5B_apt.safetensors"),
        f"and {public(UMT5)}, {public('wan2.2_vae.safetensors')}",
        "*APT VAE Decode to Video* writes the file while it decodes: "
        "the clip is never held in memory, and a cancel acts at once.",
    )
    return g


def text_to_image() -> Graph:
    g = Graph()
    model = g.add("APTLoadCheckpoint", 0, 0, checkpoint="wan2.1_1.3B_apt.safetensors")
    prompt = (
        "A portrait of an old fisherman in a yellow raincoat, grey beard, soft morning light, "
        "the harbour behind him out of focus."
    )
    text, latent, vae = wan_front(
        g, model, "wan_2.1_vae.safetensors", prompt, {"size": IMAGE_PRESET, "batch_size": 4}
    )
    samples = g.add("APTSampler", 2, 0, model=model, positive=text, latent=latent, seed=1)
    images = g.add("APTVAEDecode", 3, DECODE, vae=vae, samples=samples)
    g.add("SaveImage", 4, 0, tall=420, images=images, filename_prefix="apt_image")
    g.note(
        "Four pictures of **1024x1024** at once, in one step: each is a clip of one frame",
        "Needs " + trained("wan2.1_1.3B_apt.safetensors") + ", best one of the image phase",
        f"and {public(UMT5)}, {public('wan_2.1_vae.safetensors')}",
        "Picture i of the batch has the seed + i: to see one of them again, set that seed and a batch of 1.",
    )
    return g


def lora_on_base(base_name: str, lora_name: str, prefix: str, **sampler) -> tuple[Graph, Node]:
    """Text to video by a LoRA on a released base; returns the graph and the LoRA's node."""
    g = Graph()
    base = g.add("UNETLoader", 0, 0, unet_name=base_name)
    model = g.add("LoraLoaderModelOnly", 0, 170, model=base, lora_name=lora_name, strength_model=1.0)
    left, right = FIVE[0], FIVE[0] + FIVE.widths[0]
    g.detour(base, model, (right - 10, 112), (left + 10, 112))
    text, latent, vae = wan_front(g, model, "wan_2.1_vae.safetensors", STREET, {"size": "native"}, second=330)
    samples = g.add("APTSampler", 2, 0, model=model, positive=text, latent=latent, seed=1, **sampler)
    g.detour(model, samples, (right + 45, 14))
    video_out(g, vae, samples, latent[1], prefix)
    return g, model


def few_step_lora() -> Graph:
    base = "wan2.1_t2v_14B_fp8_scaled.safetensors"
    lora = "lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors"
    g, _ = lora_on_base(base, lora, "video/apt_few_step", times="4 steps, shift 5")
    g.note(
        "Wan 2.1 14B in **four steps**, with public weights: LightX2V's step-distilled LoRA",
        f"Needs {public(base)}, {public(UMT5)}, {public('wan_2.1_vae.safetensors')}",
        f"and {public(lora)}",
        "*times* of the sampler sets steps and shift; some graphs take shift 8 with this LoRA. "
        "There is no CFG and no negative prompt.",
        "This is not APT, which needs one step. What other public models need: "
        "docs/comfyui.md, *Few-step models of others*.",
    )
    return g


def lora_text_to_video() -> Graph:
    base, lora = "wan2.1_t2v_1.3B_fp16.safetensors", "wan2.1_1.3B_apt_lora.safetensors"
    g, model = lora_on_base(base, lora, "video/apt_lora")
    right = FIVE[0] + FIVE.widths[0]
    prefix = "diffusion_models/apt_wan21"
    save = g.add("APTSaveCheckpoint", 2, 470, off=True, model=model, filename_prefix=prefix)
    g.detour(model, save, (right + 30, 484))
    g.note(
        "The base model as released, and APT as a **LoRA** on top: the stock loaders do",
        "Needs " + trained("wan2.1_1.3B_apt_lora.safetensors", "loras"),
        f"and {public('wan2.1_t2v_1.3B_fp16.safetensors')}, {public(UMT5)}, "
        f"{public('wan_2.1_vae.safetensors')}",
        "Keep its strength at 1: the scale is inside the file. "
        "LoRAs of a style go before it, for the last LoRA tells sizes and times.",
        "*Save APT Checkpoint* is muted: select it and press **Ctrl+M** to keep model and LoRA as one file.",
    )
    return g


def noise_walk() -> Graph:
    g = Graph(SIX)
    model, text, latent, vae = mini_front(
        g,
        "a blue circle on a yellow background",
        {"size": "custom", "size.width": 48, "size.height": 48, "size.frames": 1, "batch_size": 48},
    )
    noise = g.add("APTNoiseWalk", 1, 500, seeds="1, 2, 3", closed=True)
    seed = {"seed": 0, "control_after_generate": "fixed"}
    samples = g.add("APTSampler", 2, 0, model=model, positive=text, latent=latent, noise=noise, **seed)
    images = g.add("APTVAEDecode", 3, DECODE, vae=vae, samples=samples)
    video = g.add("CreateVideo", 4, DECODE, images=images, fps=24.0)
    g.add("SaveVideo", 5, 0, tall=420, video=video, filename_prefix="video/apt_noise_walk")
    g.note(
        "Press **Run**: the noise walks from seed to seed, and one picture becomes another",
        "48 pictures of one prompt, one network call for each, played as a video. "
        "The batch size of the latent is the number of pictures.",
        "A one-step generator maps noise to pictures, so a smooth way through the noise is a smooth way "
        "through the pictures.",
        "With a checkpoint of Wan the same works for images and for clips.",
    )
    return g


def stock_nodes() -> Graph:
    g = Graph(SIX)
    model, text, latent, vae = mini_front(
        g, "a purple square moving down on a yellow background", {"size": "native"}
    )
    seed = {"seed": 5, "control_after_generate": "fixed"}
    samples = g.add("APTSampler", 2, 0, model=model, positive=text, latent=latent, **seed)
    video_out(g, vae, samples, latent[1], "video/apt_ours", "Save Video (APT nodes)", tall=330, span=2)
    down = 470
    stock = g.add("UNETLoader", 0, down, unet_name=MINI)
    empty = g.add("EmptyHunyuanLatentVideo", 1, down + 60, width=48, height=48, length=9, batch_size=1)
    stock_samples = g.add(
        "KSampler",
        2,
        down,
        model=stock,
        positive=text,
        negative=text,
        latent_image=empty,
        **seed,
        steps=1,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    images = g.add("VAEDecode", 3, down + 130, samples=stock_samples, vae=vae)
    video = g.add("CreateVideo", 4, down + 130, images=images, fps=8.0)
    g.add(
        "SaveVideo",
        5,
        down - 70,
        "Save Video (stock nodes)",
        tall=320,
        video=video,
        filename_prefix="video/apt_stock",
    )
    g.note(
        "Press **Run**: above the APT nodes, below **stock nodes only**, "
        "and the same clip from the same seed",
        "*KSampler* needs steps **1**, cfg **1**, denoise **1**, **euler**, **simple**. "
        "Negative must be connected but is not used. "
        "Wrong: `uni_pc`, `ddim_uniform`, `kl_optimal`.",
        "The APT nodes take these choices away, check the sizes, decode in slices and "
        "stop at once when you cancel.",
    )
    return g


# By name, as the template browser shows them: first what needs nothing but the miniature.
WORKFLOWS = {
    "apt_draft_and_refine": draft_and_refine,
    "apt_long_clip": long_clip,
    "apt_mini_scale_up": scale_up,
    "apt_mini_text_to_video": mini_text_to_video,
    "apt_noise_walk": noise_walk,
    "apt_prompts_from_file": prompts_from_file,
    "apt_seed_contact_sheet": seed_contact_sheet,
    "apt_stock_nodes": stock_nodes,
    "apt_text_to_image": text_to_image,
    "apt_trained_run_compared": trained_run_compared,
    "apt_wan21_few_step_lora": few_step_lora,
    "apt_wan21_lora_text_to_video": lora_text_to_video,
    "apt_wan21_text_to_video": wan21_text_to_video,
    "apt_wan22_5b_text_to_video": wan22_text_to_video,
}
# These need nothing but the miniature.
RUNNABLE = {
    "apt_draft_and_refine",
    "apt_long_clip",
    "apt_mini_scale_up",
    "apt_mini_text_to_video",
    "apt_noise_walk",
    "apt_prompts_from_file",
    "apt_seed_contact_sheet",
    "apt_stock_nodes",
}
# What the pictures of the others say: as long as nobody has such weights, there is no output to show.
CARDS = {
    "apt_text_to_image": (
        "Wan 2.1: text to image",
        "four pictures of 1024 x 1024",
        "Needs your own APT checkpoint of Wan 2.1",
    ),
    "apt_trained_run_compared": (
        "Your run, side by side",
        "base, distilled, APT in 1 and 2 steps",
        "Needs the folder of a run, such as the demo's",
    ),
    "apt_wan21_few_step_lora": (
        "Wan 2.1 14B in four steps",
        "LightX2V's public LoRA, stock loaders",
        "Needs base and LoRA, both public",
        "not APT, but the same sampler and decode",
    ),
    "apt_wan21_lora_text_to_video": (
        "Wan 2.1: APT as a LoRA",
        "the released model and stock loaders",
        "Needs your own APT LoRA of Wan 2.1",
    ),
    "apt_wan21_text_to_video": (
        "Wan 2.1: text to video",
        "832 x 480, one step",
        "Needs your own APT checkpoint of Wan 2.1",
    ),
    "apt_wan22_5b_text_to_video": (
        "Wan 2.2 5B: text to video",
        "1280 x 704, 24 fps, one step",
        "Needs your own APT checkpoint of Wan 2.2 5B",
    ),
}
