"""APT VAE Decode to Video: what is in the file, what stock Save Video makes of it, and what is held in
memory, with the Wan VAE `vae`.
"""

import gc
import json
import os

from comfyui import start

paths, _ = start()

import av
import folder_paths
import torch
from comfy_api.latest import InputImpl, Types
from decoding import Progress, load_nodes, load_vae, random_tiny_autoencoder, stock

APTVAEDecode, APTVAEDecodeToVideo = load_nodes(paths["pack"])


class Held(Progress):
    """The most bytes of tensors that were alive at any report."""

    most = 0

    def __call__(self, *report, **more):
        super().__call__(*report, **more)
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in gc.get_objects()
            if type(t) is torch.Tensor
        }
        self.most = max(self.most, sum(storages.values()))


def held(node, frames: int, *more) -> int:
    latent = torch.randn(1, 16, frames, 4, 4)
    gc.collect()
    before, progress = Held(), Held()
    before(0, 1, None)
    node.execute(vae, {"samples": latent}, *more)
    return progress.most - before.most


torch.manual_seed(0)
with torch.inference_mode():
    vae = load_vae(paths["vae"])
    latent = torch.nn.functional.interpolate(torch.randn(2, 16, 3, 2, 3), size=(3, 8, 12), mode="trilinear")
    exact, progress = stock(vae, latent), Progress()
    video = APTVAEDecodeToVideo.execute(vae, {"samples": latent}, 12.5).args[0]
    read = video.get_components()
    # Brightness: the colours of random weights' clips change from pixel to pixel, finer than the file keeps
    # any.
    bright = lambda images: images @ torch.tensor([0.2126, 0.7152, 0.0722])
    error = (bright(read.images) - bright(exact)).abs()
    # What stock writes at the same quality.
    reference = os.path.join(folder_paths.get_temp_directory(), "stock.mp4")
    InputImpl.VideoFromComponents(Types.VideoComponents(images=exact, frame_rate=read.frame_rate)).save_to(
        reference, crf=17
    )
    stock_error = (bright(InputImpl.VideoFromFile(reference).get_components().images) - bright(exact)).abs()
    os.unlink(reference)

    saved = os.path.join(folder_paths.get_output_directory(), "saved.mp4")
    os.makedirs(folder_paths.get_output_directory(), exist_ok=True)
    video.save_to(saved, metadata={"prompt": {"1": "a graph"}})
    with av.open(saved) as container, av.open(video.get_stream_source()) as source:
        metadata, colours = container.metadata.get("prompt"), container.streams.video[0].color_trc
        copied = [bytes(p) for p in container.demux() if p.size] == [
            bytes(p) for p in source.demux() if p.size
        ]

    odd = random_tiny_autoencoder()
    even = odd.decode
    odd.decode = lambda latent: even(latent)[..., 1:, 1:, :]
    odd_video = APTVAEDecodeToVideo.execute(odd, {"samples": torch.randn(1, 16, 2, 2, 3)}, 24.0).args[0]

    result = {
        "folder": os.path.dirname(video.get_stream_source()) == folder_paths.get_temp_directory(),
        "shape": list(read.images.shape),
        "fps": float(video.get_frame_rate()),
        "duration": video.get_duration(),
        "mean error": error.mean().item(),
        "stock's mean error": stock_error.mean().item(),
        "frame to frame": bright(exact[1:] - exact[:-1]).abs().mean().item(),
        "progress": progress.values,
        "previews": sum(preview is not None for preview in progress.previews),
        "saved": {"metadata": metadata, "colours": colours, "copied": copied},
        "odd": [list(odd_video.get_dimensions()), odd_video.get_frame_count()],
        "files": len(os.listdir(folder_paths.get_temp_directory())),
        "held": {
            "video": [held(APTVAEDecodeToVideo, frames, 24.0) for frames in (5, 33)],
            "images": [held(APTVAEDecode, frames) for frames in (5, 33)],
        },
    }
print(json.dumps(result))
