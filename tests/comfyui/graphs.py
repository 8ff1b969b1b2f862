"""The graphs of workflows/, in code: `build_workflows.py` has ComfyUI's frontend turn them into files.

Positions and sizes are pixels of the canvas; columns go from left (notes, loaders) to right (what is saved).
"""

from dataclasses import dataclass, field

HUB = "https://huggingface.co/Comfy-Org"
WAN21 = f"{HUB}/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
WAN22 = f"{HUB}/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
# Public files, by name: (address, folder under models/).
PUBLIC = {
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": (f"{WAN21}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", "text_encoders"),
    "wan_2.1_vae.safetensors": (f"{WAN21}/vae/wan_2.1_vae.safetensors", "vae"),
    "wan2.2_vae.safetensors": (f"{WAN22}/vae/wan2.2_vae.safetensors", "vae"),
    "wan2.1_t2v_1.3B_fp16.safetensors": (f"{WAN21}/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors", "diffusion_models"),
}
UMT5 = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
MINI, MINI_VAE, MINI_TEXT = "apt_mini.safetensors", "apt_mini_vae.safetensors", "apt_mini_text_encoder"

IMAGE_PRESET, VIDEO_PRESET = "image 1024", "video 1280x720, 2 s"

NOTES, LOAD, PROMPT, SAMPLE, SAVE = -460, 0, 400, 860, 1260
DECODE = 280


@dataclass
class Node:
    """One node of a graph; `node[1]` is its second output, the node itself stands for its first."""

    id: int
    type: str
    at: tuple[int, int]
    size: tuple[int, int]
    title: str | None
    inputs: dict

    def __getitem__(self, slot: int) -> tuple["Node", int]:
        return self, slot


@dataclass
class Graph:
    nodes: list[Node] = field(default_factory=list)

    def add(self, type: str, at: tuple[int, int], size: tuple[int, int] = (0, 0), title: str | None = None, /, **inputs) -> Node:
        """`inputs` are values of widgets, in the order in which a user would set them, or nodes to link from."""
        node = Node(len(self.nodes) + 1, type, at, size, title, inputs)
        self.nodes.append(node)
        return node

    def note(self, text: str, size: tuple[int, int] = (420, 300)) -> None:
        self.add("MarkdownNote", (NOTES, 0), size, "About this workflow", text=text)

    def description(self) -> dict:
        """Plain JSON for the browser: nodes with the values of their widgets, and links by the names of inputs."""
        nodes, links = [], []
        for node in self.nodes:
            widgets = []
            for name, value in node.inputs.items():
                source, slot = (value, 0) if isinstance(value, Node) else value if isinstance(value, tuple) else (None, 0)
                if source:
                    links.append({"from": source.id, "slot": slot, "to": node.id, "input": name})
                else:
                    widgets.append([name, value])
            nodes.append({"id": node.id, "type": node.type, "at": node.at, "size": node.size, "title": node.title, "widgets": widgets})
        return {"nodes": nodes, "links": links}


def mini_front(g: Graph, prompt: str, size: dict):
    """The miniature's loaders, prompt and latent: (model, conditioning, latent, vae)."""
    model = g.add("APTLoadCheckpoint", (LOAD, 0), (340, 0), checkpoint=MINI)
    clip = g.add("APTLoadTextEncoder", (LOAD, 140), (340, 0), text_encoder=MINI_TEXT)
    vae = g.add("VAELoader", (LOAD, 250), (340, 0), vae_name=MINI_VAE)
    text = g.add("CLIPTextEncode", (PROMPT, 0), (400, 150), "Prompt", text=prompt, clip=clip)
    latent = g.add("APTEmptyLatent", (PROMPT, 220), (400, 0), model=model, **size)
    return model, text, latent, vae


def wan_front(g: Graph, model: Node, vae_name: str, prompt: str, size: dict, top: int = 140):
    """The same for a released Wan: the stock loaders of its text encoder and, below, its VAE."""
    clip = g.add("CLIPLoader", (LOAD, top), (340, 0), clip_name=UMT5, type="wan")
    vae = g.add("VAELoader", (LOAD, top + 160), (340, 0), vae_name=vae_name)
    text = g.add("CLIPTextEncode", (PROMPT, 0), (400, 170), "Prompt", text=prompt, clip=clip)
    latent = g.add("APTEmptyLatent", (PROMPT, 240), (400, 0), model=model, **size)
    return text, latent, vae


def video_out(g: Graph, vae: Node, samples: Node, fps, prefix: str, title: str | None = None) -> None:
    video = g.add("APTVAEDecodeToVideo", (SAMPLE, DECODE), (340, 0), vae=vae, samples=samples, fps=fps)
    g.add("SaveVideo", (SAVE, 0), (420, 420), title, video=video, filename_prefix=prefix)


def mini_text_to_video() -> Graph:
    g = Graph()
    model, text, latent, vae = mini_front(g, "a red circle moving left on a green background", {"size": "native"})
    samples = g.add("APTSampler", (SAMPLE, 0), (340, 0), model=model, positive=text, latent=latent, seed=5)
    video_out(g, vae, samples, latent[1], "video/apt_mini")
    g.note(
        "The miniature comes with the pack: **press Run**, nothing has to be downloaded, and a CPU will do.\n\n"
        "It is a complete Wan in small. One call of the network makes the clip: 9 frames of 48x48 pixels.\n\n"
        "It knows sentences of this form:\n\n> a **red** **circle** moving **left** on a **green** background\n\n"
        "- colours: red, green, blue, yellow, purple\n- shapes: circle, square, triangle\n- directions: left, right, up, down\n\n"
        "Every seed gives another clip. Two steps instead of one are slower and a little steadier.",
        size=(420, 400),
    )
    return g


STREET = (
    "A street musician plays the guitar under a railway bridge at dusk. Commuters pass by in warm light, a small crowd listens, "
    "the camera slowly moves to the right."
)


def wan21_text_to_video() -> Graph:
    g = Graph()
    model = g.add("APTLoadCheckpoint", (LOAD, 0), (340, 0), checkpoint="wan2.1_1.3B_apt.safetensors")
    text, latent, vae = wan_front(g, model, "wan_2.1_vae.safetensors", STREET, {"size": "native"})
    samples = g.add("APTSampler", (SAMPLE, 0), (340, 0), model=model, positive=text, latent=latent, seed=1)
    video_out(g, vae, samples, latent[1], "video/apt_wan21")
    g.note(
        "Text to video with an APT checkpoint of **Wan 2.1**, in one step.\n\n"
        "Put the files here:\n\n```\nmodels/\n  diffusion_models/wan2.1_1.3B_apt.safetensors\n"
        f"  text_encoders/{UMT5}\n  vae/wan_2.1_vae.safetensors\n```\n\n"
        f"- [text encoder]({PUBLIC[UMT5][0]})\n- [VAE]({PUBLIC['wan_2.1_vae.safetensors'][0]})\n"
        "- the checkpoint is what the trainer of ComfyUI-APT writes; choose yours in *Load APT Checkpoint*\n\n"
        "There is no CFG, no scheduler and no negative prompt to set: they would only make it worse.",
        size=(420, 400),
    )
    return g


def wan22_text_to_video() -> Graph:
    g = Graph()
    model = g.add("APTLoadCheckpoint", (LOAD, 0), (340, 0), checkpoint="wan2.2_5B_apt.safetensors")
    text, latent, vae = wan_front(g, model, "wan2.2_vae.safetensors", STREET, {"size": VIDEO_PRESET})
    samples = g.add("APTSampler", (SAMPLE, 0), (340, 0), model=model, positive=text, latent=latent, seed=1)
    video_out(g, vae, samples, latent[1], "video/apt_wan22_5b")
    g.note(
        "Text to video with an APT checkpoint of **Wan 2.2 5B**: 1280x704, 24 frames a second, 2 seconds, one step.\n\n"
        "Put the files here:\n\n```\nmodels/\n  diffusion_models/wan2.2_5B_apt.safetensors\n"
        f"  text_encoders/{UMT5}\n  vae/wan2.2_vae.safetensors\n```\n\n"
        f"- [text encoder]({PUBLIC[UMT5][0]})\n- [VAE]({PUBLIC['wan2.2_vae.safetensors'][0]})\n"
        "- the checkpoint is what the trainer of ComfyUI-APT writes; choose yours in *Load APT Checkpoint*\n\n"
        "*APT VAE Decode to Video* writes the file while it decodes: the clip is never held in memory, and a cancel acts at once.",
        size=(420, 440),
    )
    return g


def text_to_image() -> Graph:
    g = Graph()
    model = g.add("APTLoadCheckpoint", (LOAD, 0), (340, 0), checkpoint="wan2.1_1.3B_apt.safetensors")
    prompt = "A portrait of an old fisherman in a yellow raincoat, grey beard, soft morning light, the harbour behind him out of focus."
    text, latent, vae = wan_front(g, model, "wan_2.1_vae.safetensors", prompt, {"size": IMAGE_PRESET, "batch_size": 4})
    samples = g.add("APTSampler", (SAMPLE, 0), (340, 0), model=model, positive=text, latent=latent, seed=1)
    images = g.add("APTVAEDecode", (SAMPLE, DECODE), (340, 0), vae=vae, samples=samples)
    g.add("SaveImage", (SAVE, 0), (420, 460), images=images, filename_prefix="apt_image")
    g.note(
        "Text to image at **1024x1024**: a clip of one frame, four different ones at once.\n\n"
        "Best with a checkpoint of the image phase. Put the files here:\n\n```\nmodels/\n  diffusion_models/wan2.1_1.3B_apt.safetensors\n"
        f"  text_encoders/{UMT5}\n  vae/wan_2.1_vae.safetensors\n```\n\n"
        f"- [text encoder]({PUBLIC[UMT5][0]})\n- [VAE]({PUBLIC['wan_2.1_vae.safetensors'][0]})\n\n"
        "Picture i of the batch has the seed + i: to see one of them again, set that seed and a batch of 1.",
        size=(420, 440),
    )
    return g


def lora_text_to_video() -> Graph:
    g = Graph()
    base = g.add("UNETLoader", (LOAD, 0), (340, 0), unet_name="wan2.1_t2v_1.3B_fp16.safetensors")
    lora = "wan2.1_1.3B_apt_lora.safetensors"
    model = g.add("LoraLoaderModelOnly", (LOAD, 140), (340, 0), model=base, lora_name=lora, strength_model=1.0)
    text, latent, vae = wan_front(g, model, "wan_2.1_vae.safetensors", STREET, {"size": "native"}, top=300)
    samples = g.add("APTSampler", (SAMPLE, 0), (340, 0), model=model, positive=text, latent=latent, seed=1)
    video_out(g, vae, samples, latent[1], "video/apt_lora")
    g.note(
        "The base model as released, and APT as a **LoRA** on top: the stock loaders do.\n\n"
        "Put the files here:\n\n```\nmodels/\n  diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors\n  loras/wan2.1_1.3B_apt_lora.safetensors\n"
        f"  text_encoders/{UMT5}\n  vae/wan_2.1_vae.safetensors\n```\n\n"
        f"- [base model]({PUBLIC['wan2.1_t2v_1.3B_fp16.safetensors'][0]})\n- [text encoder]({PUBLIC[UMT5][0]})\n"
        f"- [VAE]({PUBLIC['wan_2.1_vae.safetensors'][0]})\n- the LoRA is what the trainer of ComfyUI-APT writes\n\n"
        "Keep its strength at 1: the scale is inside the file. LoRAs of a style go before it: ComfyUI remembers what the last LoRA says of sizes and times.",
        size=(420, 440),
    )
    return g


def noise_walk() -> Graph:
    g = Graph()
    model, text, latent, vae = mini_front(
        g, "a blue circle on a yellow background", {"size": "custom", "size.width": 48, "size.height": 48, "size.frames": 1, "batch_size": 48}
    )
    noise = g.add("APTNoiseWalk", (PROMPT, 470), (400, 0), seeds="1, 2, 3", closed=True)
    seed = {"seed": 0, "control_after_generate": "fixed"}
    samples = g.add("APTSampler", (SAMPLE, 0), (340, 0), model=model, positive=text, latent=latent, noise=noise, **seed)
    images = g.add("APTVAEDecode", (SAMPLE, DECODE), (340, 0), vae=vae, samples=samples)
    video = g.add("CreateVideo", (SAMPLE, DECODE + 110), (340, 0), images=images, fps=24.0)
    g.add("SaveVideo", (SAVE, 0), (420, 420), video=video, filename_prefix="video/apt_noise_walk")
    g.note(
        "One prompt, and the noise **walks** from seed to seed: 48 pictures, one network call for each, played as a video.\n\n"
        "A one-step generator maps noise to pictures, so a smooth way through the noise is a smooth way through the pictures.\n\n"
        "The batch size of the latent is the number of pictures on the way. With a checkpoint of Wan the same works for images and for clips.",
        size=(420, 260),
    )
    return g


def stock_nodes() -> Graph:
    g = Graph()
    model, text, latent, vae = mini_front(g, "a purple square moving down on a yellow background", {"size": "native"})
    seed = {"seed": 5, "control_after_generate": "fixed"}
    samples = g.add("APTSampler", (SAMPLE, 0), (340, 0), model=model, positive=text, latent=latent, **seed)
    video_out(g, vae, samples, latent[1], "video/apt_ours","Save Video (APT nodes)")
    down = 560
    stock = g.add("UNETLoader", (LOAD, down), (340, 0), unet_name=MINI)
    empty = g.add("EmptyHunyuanLatentVideo", (PROMPT, down + 120), (400, 0), width=48, height=48, length=9, batch_size=1)
    negative = g.add("ConditioningZeroOut", (PROMPT, down), (400, 0), conditioning=text)
    stock_samples = g.add(
        "KSampler", (SAMPLE, down), (340, 0), model=stock, positive=text, negative=negative, latent_image=empty,
        **seed, steps=1, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    images = g.add("VAEDecode", (SAMPLE, down + 330), (340, 0), samples=stock_samples, vae=vae)
    video = g.add("CreateVideo", (SAMPLE, down + 440), (340, 0), images=images, fps=8.0)
    g.add("SaveVideo", (SAVE, down), (420, 420), "Save Video (stock nodes)", video=video, filename_prefix="video/apt_stock")
    g.note(
        "Above: the APT nodes. Below: **stock nodes only**, the same clip from the same seed.\n\n"
        "An APT checkpoint needs no node of ours to be right, only these settings of *KSampler*:\n\n"
        "- steps **1**, cfg **1**, denoise **1**\n- sampler **euler**, scheduler **simple**\n\n"
        "The negative input must be connected but is not used. Wrong are: any other cfg, `uni_pc`, `ddim_uniform`, `kl_optimal`, "
        "a denoise below 1.\n\n"
        "The APT nodes take these choices away, check the sizes, decode in slices and stop at once when you cancel.",
        size=(420, 400),
    )
    return g


WORKFLOWS = {
    "apt_mini_text_to_video": mini_text_to_video,
    "apt_wan21_text_to_video": wan21_text_to_video,
    "apt_wan22_5b_text_to_video": wan22_text_to_video,
    "apt_text_to_image": text_to_image,
    "apt_lora_text_to_video": lora_text_to_video,
    "apt_noise_walk": noise_walk,
    "apt_stock_nodes": stock_nodes,
}
# These need nothing but the miniature.
RUNNABLE = {"apt_mini_text_to_video", "apt_noise_walk", "apt_stock_nodes"}
