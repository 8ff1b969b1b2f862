"""Check that the data, the VAE, the text encoder and the model belong together."""

from pathlib import Path

from apt_core.errors import AptError
from apt_core.models.text import TextEncoder
from trainer.checkpoints.starting_models import open_text_encoder, open_vae
from trainer.config import Preset
from trainer.data.batches import Batches
from trainer.data.precompute import fingerprint
from trainer.machines.distributed import World


def check_parts(preset: Preset, vae, text: TextEncoder) -> None:
    """Raise AptError when the VAE or the text encoder does not fit the preset's model."""
    model = preset.model
    if vae.config.z_dim != model.channels:
        raise AptError(
            f"vae {preset.files.vae} has {vae.config.z_dim} channels, but {preset.name} needs "
            f"{model.channels} (Wan {model.vae}'s VAE)."
        )
    if text.dim != model.text_dim:
        raise AptError(
            f"text_encoder {preset.files.text_encoder} has width {text.dim}, "
            f"but {preset.name} needs {model.text_dim}: give the one of this model."
        )


def check_shards(batches: Batches, preset: Preset, folder: Path, world: World) -> None:
    """Raise AptError when the shards were made for another model, or with another VAE or text encoder."""
    model, data = preset.model, next(iter(batches.datasets.values()))
    facts = {
        "latent channels": (data.vae["channels"], model.channels),
        "VAE stride": (tuple(data.vae["stride"]), model.stride),
        "text width": (data.text_dim, model.text_dim),
        "text length": (data.text_length, model.text_length),
    }
    for what, (found, wanted) in facts.items():
        if found != wanted:
            raise AptError(
                f"{folder} has {what} {found}, but {preset.name} needs {wanted}: "
                "precompute the shards for this model."
            )
    for kind, dataset in batches.datasets.items():
        if odd := [bucket for bucket in dataset.buckets if bucket[2] % 2 or bucket[3] % 2]:
            raise AptError(
                f"{folder} has {kind}s with latents of {odd[0][3]}x{odd[0][2]}, "
                "which patches of 2x2 do not fill: precompute them again."
            )
    made = {
        "vae": lambda: open_vae(preset.files),
        "text_encoder": lambda: open_text_encoder(preset.files, model.text_length),
    }
    other = ""
    if world.main:  # one process only: eight text encoders would not fit into a machine's memory
        wrong = (
            part
            for part in made
            if getattr(preset.files, part)
            and fingerprint(made[part]()) != data.settings[part.replace("_", " ")]
        )
        other = next(wrong, "")
    if other := world.gather(other)[0]:
        raise AptError(
            f"{folder} was made with another {other} than {getattr(preset.files, other)}: "
            f"precompute again, or give the {other} that it was made with."
        )
