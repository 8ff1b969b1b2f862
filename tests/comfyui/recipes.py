"""Graphs of what people do with a one-step model: our nodes with stock ones, on the miniature. `graphs.py`
has the others.
"""

from canvas import (
    DECODE,
    FIVE,
    LATENT,
    MINI,
    MINI_TEXT,
    MINI_VAE,
    SECOND,
    SIX,
    TEXT,
    VAE,
    Columns,
    Graph,
    mini_front,
    video_out,
)

FIXED = {"control_after_generate": "fixed"}
FPS = 8.0  # the miniature's
LOWER = 370  # a second row of results
NARROW = Columns((230, 240, 240, 240, 220, 210))
SEVEN = Columns((210, 210, 210, 210, 140, 210, 210), (50, 50, 40, 36, 22, 22))
RUN = "demo"  # its folder, under models/apt


def beside(columns: Columns, column: int, away: int = 30) -> int:
    """x of a lane to the right of a column."""
    return columns[column] + columns.widths[column] + away


def draft_and_refine() -> Graph:
    g = Graph(NARROW)
    model = g.add("APTLoadCheckpoint", 0, 0, checkpoint=MINI)
    clip = g.add("APTLoadTextEncoder", 0, SECOND, text_encoder=MINI_TEXT)
    caption = "a blue circle moving up on a yellow background"
    text = g.add("CLIPTextEncode", 1, TEXT, "Prompt", tall=120, text=caption, clip=clip)
    latent = g.add("APTEmptyLatent", 1, 260, model=model, size="native")
    draft = g.add("APTSampler", 2, 160, "Draft", model=model, positive=text, latent=latent, seed=5, **FIXED)
    g.detour(model, draft, (beside(NARROW, 1), 14))
    sampler = g.add("KSamplerSelect", 2, 500, sampler_name="euler")
    sigmas = g.add("ManualSigmas", 2, 610, "Back to time 0.7, then 0", sigmas="0.7, 0")
    refined = g.add(
        "SamplerCustom",
        3,
        0,
        "Refine",
        model=model,
        positive=text,
        negative=text,
        sampler=sampler,
        sigmas=sigmas,
        latent_image=draft,
        noise_seed=1,
        **FIXED,
        cfg=1.0,
    )
    vae = g.add("VAELoader", 3, LOWER, vae_name=MINI_VAE)
    first = g.add("APTVAEDecodeToVideo", 4, LOWER, vae=vae, samples=draft, fps=FPS)
    second = g.add("APTVAEDecodeToVideo", 4, 0, vae=vae, samples=refined, fps=FPS)
    g.detour(draft, first, (beside(NARROW, 2), 305), (beside(NARROW, 3, 5), 305))
    g.add(
        "SaveVideo", 5, LOWER, "Save Video (draft)", tall=330, video=first, filename_prefix="video/apt_draft"
    )
    g.add(
        "SaveVideo", 5, 0, "Save Video (refined)", tall=330, video=second, filename_prefix="video/apt_refined"
    )
    g.note(
        "Press **Run**: a **draft** in one step, and the same clip **refined** by a second one",
        "*Refine* puts fresh noise on the draft, back to time 0.7, and takes it away again. "
        "Nearer to 1 changes more, nearer to 0 less.",
        "Try seeds of *Draft* until you like what you see (below), then seeds of *Refine* "
        "for other details (above).",
        "Another model of the same VAE may refine too: connect it to *Refine*. "
        "A base model wants more times, such as 0.7, 0.5, 0.3, 0, and its own cfg.",
    )
    return g


def seed_contact_sheet() -> Graph:
    g = Graph(NARROW)
    caption = "a yellow triangle moving right on a blue background"
    model, text, latent, vae = mini_front(g, caption, {"size": "native", "batch_size": 16})
    samples = g.add("APTSampler", 2, 0, model=model, positive=text, latent=latent, seed=100, **FIXED)
    frame = g.add("LatentCut", 3, 0, "First frame of each", samples=samples, dim="t", index=0, amount=1)
    one = g.add("LatentFromBatch", 3, LOWER, "Your choice", samples=samples, batch_index=0, length=1)
    sheet = g.add("APTVAEDecode", 4, 0, vae=vae, samples=frame)
    video = g.add("APTVAEDecodeToVideo", 4, LOWER, vae=vae, samples=one, fps=FPS)
    lane = beside(NARROW, 2), 290
    for decode in (sheet, video):
        g.detour(vae, decode, lane, (beside(NARROW, 3, 5), 290))
    g.add("PreviewImage", 5, 0, "Contact sheet", tall=330, images=sheet)
    g.add("SaveVideo", 5, LOWER, tall=330, video=video, filename_prefix="video/apt_chosen")
    g.note(
        "Press **Run**: a **contact sheet** of 16 seeds, one call of the network each",
        "It shows the first frame of each clip: only these are decoded, "
        "for after one step the decode is a large part of the time.",
        "Pick one: its place, from 0, is *batch_index* of **Your choice**. Press Run again: "
        "only that clip is decoded, nothing is sampled anew.",
        "Place i has the seed + i. Another *seed* in the sampler gives the next sheet.",
    )
    return g


def scale_up() -> Graph:
    g = Graph(SIX)
    model, text, latent, vae = mini_front(
        g, "a green square moving left on a purple background", {"size": "native"}
    )
    samples = g.add("APTSampler", 2, 0, model=model, positive=text, latent=latent, seed=5, steps=2, **FIXED)
    images = g.add("APTVAEDecode", 3, DECODE, vae=vae, samples=samples)
    large = g.add("ImageScaleBy", 4, 60, image=images, upscale_method="lanczos", scale_by=8.0)
    video = g.add("CreateVideo", 4, 300, images=large, fps=FPS)
    left, right = SIX[4], beside(SIX, 4, 0)
    g.detour(large, video, (right - 10, 225), (left + 10, 225))
    g.add("SaveVideo", 5, 0, tall=420, video=video, filename_prefix="video/apt_scaled_up")
    g.note(
        "Press **Run**: the clip of 48x48 pixels as a video of **384x384**, enlarged after the decode",
        "*Upscale Image By* runs on every frame alone: *lanczos* is soft, "
        "*nearest-exact* shows the pixels as they are.",
        "For real detail put *Load Upscale Model* and *Upscale Image (using Model)* in its place: "
        "any such model works, as it sees plain pictures.",
        "Scaling the latent does not work with one step: the sampler starts from noise alone, "
        "whatever is in it.",
    )
    return g


def long_clip() -> Graph:
    g = Graph()
    loaded = g.add("APTLoadCheckpoint", 0, 0, checkpoint=MINI)
    model = g.add(
        "WanContextWindowsManual",
        0,
        170,
        model=loaded,
        context_length=9,
        context_overlap=4,
        context_schedule="standard_static",
        freenoise=True,
    )
    left, right = FIVE[0], beside(FIVE, 0, 0)
    g.detour(loaded, model, (right - 10, 112), (left + 10, 112))
    clip = g.add("APTLoadTextEncoder", 0, 540, text_encoder=MINI_TEXT)
    caption = "a red circle moving right on a blue background"
    text = g.add("CLIPTextEncode", 1, TEXT, "Prompt", tall=120, text=caption, clip=clip)
    size = {"size": "custom", "size.width": 48, "size.height": 48, "size.frames": 33}
    latent = g.add("APTEmptyLatent", 1, 260, model=model, **size)
    samples = g.add("APTSampler", 2, 0, model=model, positive=text, latent=latent, seed=5, steps=2, **FIXED)
    g.detour(model, samples, (right + 45, 14))
    vae = g.add("VAELoader", 2, 360, vae_name=MINI_VAE)
    video_out(g, vae, samples, latent[1], "video/apt_long_clip")
    g.note(
        "Press **Run**: a clip of **33 frames** from a model that was trained on 9, by *Wan Context Windows*",
        "The model sees windows of 9 frames, each overlapping the next by 4, "
        "and their samples are blended where they overlap.",
        "The scenery lasts, movement begins anew with each window: "
        "good for a view or a motion that repeats, not for a story.",
        "With Wan: *context_length* is the number of frames that your checkpoint was trained for, "
        "and *frames* in Empty APT Latent the length you want.",
    )
    return g


def prompts_from_file() -> Graph:
    g = Graph()
    model = g.add("APTLoadCheckpoint", 0, 0, checkpoint=MINI)
    clip = g.add("APTLoadTextEncoder", 0, SECOND, text_encoder=MINI_TEXT)
    prompts = g.add("APTLoadPrompts", 0, 276, file="apt_mini_prompts", start=0, count=0)
    text = g.add("CLIPTextEncode", 1, TEXT, "Each prompt", tall=120, text=prompts, clip=clip)
    latent = g.add("APTEmptyLatent", 1, LATENT, model=model, size="native")
    samples = g.add("APTSampler", 2, 0, model=model, positive=text, latent=latent, seed=12, steps=2, **FIXED)
    vae = g.add("VAELoader", 2, VAE, vae_name=MINI_VAE)
    video_out(g, vae, samples, latent[1], "video/apt_prompts")
    g.note(
        "Press **Run**: a clip of **each prompt in a file**, eight in this one",
        "Your own: a text file with one prompt a line in ComfyUI's *input* folder. "
        "Press **R**, then choose it in *Load APT Prompts*.",
        "The videos are numbered in the order of the lines. All have the same seed: "
        "what differs between them comes from the words.",
        "A long file in parts: *count* says how many prompts to take, "
        "*start* how many to leave out before them.",
    )
    return g


def trained_run_compared() -> Graph:
    """One picture of two by two clips, in the places that their samplers have in the graph."""
    g, c = Graph(SEVEN), SEVEN
    upper, lower = 70, 475  # rows of samplers
    # The first two say on themselves what they are not, and grow by that.
    base, distilled, apt = (
        g.add("APTLoadCheckpoint", 0, y, title, checkpoint=f"{RUN}/{file}.safetensors")
        for y, title, file in [
            (0, "Base", "base"),
            (185, "Distilled", "distilled"),
            (lower, "APT", "apt-mini"),
        ]
    )
    clip = g.add("APTLoadTextEncoder", 0, 367, text_encoder=MINI_TEXT)
    vae = g.add("VAELoader", 0, 600, vae_name=MINI_VAE)
    caption = "a red circle moving left on a green background"
    text = g.add("CLIPTextEncode", 1, 90, "Prompt", tall=100, text=caption, clip=clip)
    none = g.add("CLIPTextEncode", 1, 230, "Negative, of the base", tall=88, text="", clip=clip)
    latent = g.add("APTEmptyLatent", 1, 358, model=apt, size="native")
    given = {"latent": latent, "seed": 5, **FIXED}
    many = g.add(
        "KSampler",
        2,
        upper,
        "Base, 25 steps",
        model=base,
        positive=text,
        negative=none,
        latent_image=latent,
        seed=5,
        **FIXED,
        steps=25,
        cfg=2.0,
        sampler_name="euler",
        scheduler="simple",
    )
    first = g.add("APTSampler", 3, upper, "Distilled, 1 step", model=distilled, positive=text, **given)
    one = g.add("APTSampler", 2, lower, "APT, 1 step", tall=250, model=apt, positive=text, **given)
    two = g.add("APTSampler", 3, lower, "APT, 2 steps", tall=250, model=apt, positive=text, **given, steps=2)

    # Lanes to the right of the columns; between the rows a corridor, which begins at y 332 and ends at 445.
    a, b, d, e = (lambda away, i=i: beside(c, i, away) for i in range(4))
    g.detour(base, many, (b(20), 14))
    g.detour(distilled, first, (a(26), 100), (a(26), 0), (d(14), 0))
    g.detour(apt, one, (b(16), 489))
    g.detour(apt, two, (b(16), 489), (b(34), 352), (d(30), 352))
    down, up = [(b(25), 230), (b(25), 368)], (d(20), 368)
    g.detour(text, one, *down)
    g.detour(text, two, *down, up)
    g.detour(text, first, *down, up, (d(20), 236))
    g.detour(latent, two, (b(14), 386), (d(12), 386))
    g.detour(latent, first, (b(14), 386), (d(12), 386), (d(12), 250))
    clips = [
        g.add("VAEDecode", 4, y, "Decode", samples=samples, vae=vae)
        for y, samples in [(20, many), (120, first), (410, one), (510, two)]
    ]
    g.detour(many, clips[0], (d(8), 22), (e(10), 22))
    g.detour(one, clips[2], (d(8), 410), (e(10), 410))
    # A wire straight up swings to both sides, the more the longer its pieces are.
    ways = [(a(16), 730), *((e(24), y) for y in (730, 640, 556, 456, 356, 256, 166, 66))]
    for decode, pieces in zip(clips, (9, 8, 5, 4)):
        g.detour(vae, decode, *ways[:pieces])
    pair = {"direction": "right", "spacing_width": 2}
    above = g.add("ImageStitch", 5, 0, "Above", image1=clips[0], image2=clips[1], **pair)
    whole = g.add("ImageStitch", 5, 210, "All four", image1=above, direction="down", spacing_width=2)
    below = g.add("ImageStitch", 5, 420, "Below", image1=clips[2], image2=clips[3], **pair)
    whole.inputs["image2"] = below
    left, right = c[5] + 5, beside(c, 5, 8)
    g.detour(above, whole, (right, 165), (left, 165))
    g.detour(below, whole, (right, 375), (left - 13, 375))
    video = g.add("CreateVideo", 6, 0, images=whole, fps=FPS)
    save = g.add("SaveVideo", 6, 162, tall=370, video=video, filename_prefix="video/apt_run")
    left, right = c[6] + 5, beside(c, 6, 10)
    g.detour(video, save, (right, 117), (left, 117))
    g.note(
        "What training did: **base**, **distilled**, **APT in 1 and 2 steps**, "
        "from one run's folder and one seed",
        'Needs a run: `python -m trainer demo` (ten minutes), then `ln -s "$PWD/runs/demo" '
        "~/ComfyUI/models/apt/demo`, with the path of your ComfyUI, and **R** here.",
        "The video shows them as the samplers stand: above base and distilled, below APT. With Wan: "
        "its own base, VAE and text encoder, and cfg 5 or so for the base.",
    )
    return g
