"""APT One-Step Sampler: `z - v(z, c, 1000)`, and a few steps by re-noising, on ComfyUI's own way of
sampling.
"""

from functools import partial

import comfy.sample
import comfy.utils
import latent_preview
import torch
from comfy import model_management
from comfy.ldm.wan.model import WanModel as Network
from comfy.model_sampling import CONST
from comfy.samplers import KSAMPLER, CFGGuider
from comfy_api.latest import io
from torch import Tensor
from tqdm.auto import trange

from ..apt_core.errors import AptError
from ..apt_core.method.flow import interpolate
from ..apt_core.method.noise import APT, COMFYUI
from ..apt_core.method.steps import step_times
from .noise import SeedNoise, WalkNoise
from .wan_model import WanModel, left_out, read_model
from .warn import warn

NAME = "APT One-Step Sampler"
OF_FILE = "file"
PRESETS = {"4 steps, shift 5": (4, 5.0), "4 steps, shift 8": (4, 8.0)}
"""Steps and shift of public few-step models. Their times are 1000, 750, 500, 250 under the shift, as in
KSampler's simple scheduler.
"""


class APTSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="APTSampler",
            display_name=NAME,
            category="APT",
            description=(
                "Samples an APT model: one call of the network turns noise into the clip. "
                "No CFG, scheduler, shift or negative prompt: they are not part of the method. "
                "The same as KSampler with 1 step, cfg 1, euler, simple, denoise 1."
            ),
            search_aliases=["ksampler", "sample", "one step", "1 step", "few step", "apt"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "A Wan model after APT, from Load APT Checkpoint or from a "
                        "stock loader with an APT LoRA."
                    ),
                ),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt, from CLIP Text Encode with the model's own text encoder."
                ),
                io.Latent.Input(
                    "latent",
                    tooltip=(
                        "The size and number of clips, from Empty APT Latent. "
                        "What is in it is overwritten with noise."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip=(
                        "Default 0. Item i of a batch has the seed + i: "
                        "any of them comes out again alone, with batch size 1 and its own seed. "
                        "With seed_noise apt, it is sample i of this seed instead."
                    ),
                ),
                io.Int.Input(
                    "steps",
                    default=1,
                    min=1,
                    max=8,
                    tooltip=(
                        "Calls of the network. Default 1, what the model was trained for; "
                        "2 is often better, with fresh noise in between up to the second time that the "
                        "model's file names, else 0.7; more bring artifacts."
                    ),
                ),
                io.Noise.Input(
                    "noise",
                    optional=True,
                    tooltip=(
                        "Noise to start from in place of the seed's, from APT Noise Walk or a "
                        "stock node. Default none."
                    ),
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip=(
                        "The times of the calls in place of steps and times: the first is 1, they decrease, "
                        "a last 0 is allowed. Default none."
                    ),
                ),
                # Last and optional, so that older graphs and prompts still work.
                io.Combo.Input(
                    "seed_noise",
                    options=[COMFYUI, APT],
                    default=COMFYUI,
                    optional=True,
                    tooltip=(
                        "What a seed becomes. Default comfyui: the noise of stock nodes, "
                        "so that KSampler with the same seed makes the same clip. apt: "
                        "that of apt_core's pipeline and of `generate`, so that they do."
                    ),
                ),
                io.Combo.Input(
                    "times",
                    options=[OF_FILE, *PRESETS],
                    default=OF_FILE,
                    optional=True,
                    tooltip=(
                        "The times of the steps. Default file: by the model's file. 4 steps, shift 5 or 8: "
                        "in place of steps, for public few-step models such as LightX2V's, 1000, 750, "
                        "500 and 250 under that shift."
                    ),
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The samples, for APT VAE Decode or any other.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        latent: dict,
        seed: int,
        steps: int,
        noise=None,
        sigmas: Tensor | None = None,
        seed_noise: str = COMFYUI,
        times: str = OF_FILE,
    ) -> io.NodeOutput:
        wan = read_model(NAME, model)
        _check_flow(model)
        if sigmas is not None:
            moments = _times(sigmas)
        elif times in PRESETS:
            steps, shift = PRESETS[times]
            moments = step_times(steps, shift / (1 + shift))
        else:
            moments = step_times(steps, wan.second_time)
        latent = _read_latent(wan, model, latent)
        _check_text(wan, positive)
        warnings = [*_too_long(wan, positive), *_ignored(model.model.diffusion_model, wan, positive, latent)]
        warnings += _half_applied(model)

        of_seed = SeedNoise(seed, seed_noise)
        first = noise or of_seed
        # The noise of other packs has only one step.
        later = first if isinstance(first, WalkNoise) else of_seed
        guider = CFGGuider(model)
        guider.inner_set_conds({"positive": positive})
        samples = guider.sample(
            first.generate_noise(latent),
            latent["samples"],
            KSAMPLER(few_step, {"fresh_noise": partial(later.generate_noise, latent)}),
            torch.tensor([*moments, 0.0]),
            denoise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, len(moments)),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        _check_finite(samples)
        latent = {**latent, "samples": samples.to(model_management.intermediate_device())}
        return io.NodeOutput(latent, ui=warn(NAME, cls.hidden, warnings))


def few_step(
    model, x: Tensor, sigmas: Tensor, extra_args: dict, callback, disable: bool, fresh_noise
) -> Tensor:
    """apt_core.method.generator.few_step as a sampler function of ComfyUI: `model(x, sigma)` is the clean
    sample, and sigmas are times that end with 0.
    """
    batch, clean = x.new_ones(len(x)), x
    for i in trange(len(sigmas) - 1, disable=disable):
        if i:
            x = interpolate(clean, fresh_noise(i).to(x), sigmas[i])
        clean = model(x, sigmas[i] * batch, **extra_args)
        callback({"i": i, "x": x, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": clean})
    return clean


def _check_flow(model) -> None:
    """Check that the model is sampled as a flow. Other nodes can change how a MODEL's output is read. A shift
    does nothing at time 1, but any other change turns the picture into noise.
    """
    sampling = model.get_model_object("model_sampling")
    timestep = float(sampling.timestep(torch.tensor(1.0)))
    if not isinstance(sampling, CONST) or timestep != 1000:
        kind = (
            f"flow at timestep {timestep:g}" if isinstance(sampling, CONST) else "something other than a flow"
        )
        raise AptError(
            f"{NAME}: a node made the model's sampling {kind}, but APT is a flow at timestep 1000: "
            "take that Model Sampling node out."
        )


def _check_finite(samples: Tensor) -> None:
    broken = int((~samples.isfinite()).sum())
    if broken:
        raise AptError(
            f"{NAME}: {broken} of {samples.numel()} values of the sample are NaN or infinite: "
            "load the model with weight_dtype default or bf16, and if that is no help, "
            "its file or a LoRA on it is broken."
        )


def _times(sigmas: Tensor) -> list[float]:
    times = sigmas.tolist()
    if times and times[-1] == 0:
        times.pop()
    if not times or times[0] != 1 or not times[-1] > 0 or any(not a > b for a, b in zip(times, times[1:])):
        shown = ", ".join(f"{t:g}" for t in sigmas.tolist()) or "empty"
        raise AptError(
            f"{NAME}: the sigmas are {shown}, but they must start at 1 and decrease, "
            "staying above 0 until a last 0: for two steps 1, 0.7."
        )
    return times


def _read_latent(wan: WanModel, model, latent: dict) -> dict:
    latent, samples = latent.copy(), latent["samples"]
    spatial, temporal = (
        latent.pop("downscale_ratio_spacial", None),
        latent.pop("downscale_ratio_temporal", None),
    )
    if spatial:
        # Empty latents that carry their ratio: ComfyUI fits them to the model.
        samples = comfy.sample.fix_empty_latent_channels(model, samples, spatial, temporal)
    if samples.is_nested or samples.ndim != 5 or samples.shape[1] != wan.channels:
        shape = "nested" if samples.is_nested else list(samples.shape)
        raise AptError(
            f"{NAME}: the latent is {shape}, but this model takes [batch, "
            f"{wan.channels}, frames, height, width]: "
            "make it with Empty APT Latent from this model."
        )
    height, width = samples.shape[-2:]
    if height % wan.patch or width % wan.patch:
        low, high = (_pixels(wan, width, height, up) for up in (0, 1))
        raise AptError(
            f"{NAME}: the latent is for {width * wan.spatial}x{height * wan.spatial} pixels, "
            f"but this model takes sides in steps of {wan.multiple}: "
            f"{low} or {high} is nearest, make it with Empty APT Latent."
        )
    return {**latent, "samples": samples}


def _pixels(wan: WanModel, width: int, height: int, up: bool) -> str:
    sides = [max(side // wan.patch + (up and side % wan.patch > 0), 1) for side in (width, height)]
    return "x".join(str(side * wan.multiple) for side in sides)


def _check_text(wan: WanModel, positive: list) -> None:
    for text, _ in positive:
        if text.shape[-1] != wan.text_dim:
            raise AptError(
                f"{NAME}: the prompt has embeddings of {text.shape[-1]} channels, "
                f"but this model reads {wan.text_dim}: use its own text encoder, "
                "UMT5-XXL for Wan, apt_mini_text_encoder for the miniature."
            )


def _too_long(wan: WanModel, positive: list) -> list[str]:
    rows = max((text.shape[1] for text, _ in positive), default=0)
    if wan.text_length is None or rows <= wan.text_length:
        return []
    return [
        f"The prompt is too long: {rows} tokens, {wan.text_length} at most in this model's training. "
        "The result can be noise, so shorten the "
        "prompt (a word has one to three tokens)."
    ]


def _half_applied(model) -> list[str]:
    tables = left_out(model)
    if not tables:
        return []
    return [
        f"{len(tables)} tables (modulation) of a LoRA or merge are left out: ComfyUI cannot apply them. "
        "`python -m trainer export LORA --base BASE --out FILE` puts a LoRA into its base whole; "
        "load that file instead."
    ]


def _ignored(network, wan: WanModel, positive: list, latent: dict) -> list[str]:
    """A sentence for each thing that the user connected but this model has no input for."""
    sentences = []
    if type(network) is Network:  # its subclasses have other inputs
        given = {key for _, values in positive for key, value in values.items() if value is not None}
        images = (
            ("start image", "concat_latent_image", network.patch_embedding.in_channels != wan.channels),
            ("CLIP vision image", "clip_vision_output", network.img_emb is not None),
            ("reference image", "reference_latents", network.ref_conv is not None),
        )
        for name, key, taken in images:
            if key in given and not taken:
                sentences.append(f"The {name} is ignored: this model has no input for one.")
    if "noise_mask" not in latent and latent["samples"].count_nonzero():
        sentences.append(
            "The picture in the latent is ignored: this method starts from noise alone. "
            "Take Empty APT Latent."
        )
    return sentences
