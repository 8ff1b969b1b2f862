"""One change of a model's weights, written as the LoRA file of any program, and its sum in fp64."""

import torch

from apt_core.files import keys


def factors(model, layers=None, outside=False, ranks=(2, 4)):
    """By official layer: down, up, alpha. ranks: of attention and of the feed-forward layers, whose scales
    are 2 and 1/2. fp8 can hold every number.
    """
    g = torch.Generator().manual_seed(5)
    found = {}
    for name, module in model.named_modules():
        official = isinstance(module, torch.nn.Linear) and keys.transformer_to_official(name)
        if (
            official
            and (official.startswith("blocks.") or outside)
            and (layers is None or official.endswith(layers))
        ):
            rank = ranks["ffn" in official]
            down, up = (
                torch.randint(-4, 5, s, generator=g) / 8
                for s in ((rank, module.in_features), (module.out_features, rank))
            )
            found[official] = down, up, rank / 2 if "ffn" in official else rank * 2.0
    return found


def reference(model, change):
    """The merged weights in fp64, by official name."""
    state = {
        keys.transformer_to_official(name): value.detach().double().clone()
        for name, value in model.state_dict().items()
    }
    for layer, (down, up, alpha) in change.items():
        state[f"{layer}.weight"] += up.double() @ down.double() * alpha / len(down)
    return state


def state_of(model):
    return {keys.transformer_to_official(name): value for name, value in model.state_dict().items()}


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=0, atol=1e-13, msg=name)


def baked(down, up, alpha):
    return down, up * alpha / len(down)


def official(prefix, down="lora_A", up="lora_B", alpha=True, name=str, infix=""):
    """A writer of one form: {layer: (down, up, alpha)} to the tensors of its file."""

    def write(change):
        tensors = {}
        for layer, (a, b, scale) in change.items():
            a, b = (a, b) if alpha else baked(a, b, scale)
            layer = prefix + name(layer)
            tensors |= {f"{layer}.{down}{infix}.weight": a, f"{layer}.{up}{infix}.weight": b}
            tensors |= {f"{layer}.alpha": torch.tensor(scale)} if alpha else {}
        return {key: value.contiguous() for key, value in tensors.items()}

    return write


def underscored(layer):
    return layer.replace(".", "_")


KOHYA = official("lora_unet_", "lora_down", "lora_up", name=underscored)
FORMS = {
    "ComfyUI": official("diffusion_model.", alpha=False),
    "ComfyUI, alpha": official("diffusion_model.", "lora_down", "lora_up"),
    "ComfyUI, A and alpha": official("model.diffusion_model."),
    "no prefix": official("", alpha=False, infix=".default"),
    "DiffSynth": official("pipe.dit.", alpha=False, infix=".default"),
    "kohya": KOHYA,
    "VideoX-Fun": official("lora_unet__", "lora_down", "lora_up", name=underscored),
    "LyCORIS": official("lycoris_", "lora_down", "lora_up", name=underscored),
    "PEFT": official("base_model.model.", alpha=False),
    "PEFT, default": official("base_model.model.", alpha=False, infix=".default"),
    "PEFT, over diffusers": official("base_model.model.", alpha=False, name=keys.transformer_to_diffusers),
    "diffusers": official("transformer.", alpha=False, name=keys.transformer_to_diffusers),
    "diffusers, down and up": official(
        "transformer.", "lora.down", "lora.up", name=keys.transformer_to_diffusers
    ),
}
BY_DIFFUSERS = ("ComfyUI", "ComfyUI, alpha", "kohya", "diffusers")
