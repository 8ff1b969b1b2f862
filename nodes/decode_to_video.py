"""APT VAE Decode to Video: latents straight into a video file."""

import os
import tempfile
from collections.abc import Iterable
from fractions import Fraction

import av
import folder_paths
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from comfy import model_management
from comfy_api.latest import InputImpl, io

from ..apt_core.errors import AptError
from . import streaming

NAME = "APT VAE Decode to Video"
FPS = 1.0, 120.0  # as stock Create Video
# Save Video copies the stream as it is, so this is the last encoding: no loss that an eye could see.
CRF = "17"


class APTVAEDecodeToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="APTVAEDecodeToVideo",
            display_name=NAME,
            category="APT",
            description=(
                "Decodes video latents straight into an H.264 file in ComfyUI's temp folder, "
                "a few frames at a time: the clip is never held in memory, however long. "
                "Save Video keeps the file, with the workflow inside."
            ),
            search_aliases=["decode", "vae decode", "wan vae", "latent to video", "streamed decode"],
            inputs=[
                io.Vae.Input(
                    "vae",
                    tooltip=(
                        "The VAE that belongs to the model. Wan's are streamed, "
                        "any other one is decoded whole, as VAE Decode does."
                    ),
                ),
                io.Latent.Input(
                    "samples", tooltip="The latents to decode. Clips of a batch come one after another."
                ),
                io.Float.Input(
                    "fps",
                    default=24.0,
                    min=FPS[0],
                    max=FPS[1],
                    step=1.0,
                    tooltip="Frames per second of the video. Default 24, the rate of APT's video models.",
                ),
            ],
            outputs=[io.Video.Output(tooltip="The video, a file in ComfyUI's temp folder.")],
        )

    @classmethod
    def execute(cls, vae, samples, fps: float) -> io.NodeOutput:
        if not FPS[0] <= fps <= FPS[1]:
            raise AptError(
                f"{NAME}: fps is {fps:g}, but a video needs {FPS[0]:g} to {FPS[1]:g} frames per second: "
                "24 is the rate of APT's video models."
            )
        latent = streaming.read_latent(NAME, vae, samples)
        rate = Fraction(round(fps * 1000), 1000)
        return io.NodeOutput(
            InputImpl.VideoFromFile(streaming.decode(vae, latent, lambda pieces, total: _write(pieces, rate)))
        )


def _write(pieces: Iterable[torch.Tensor], rate: Fraction) -> str:
    """The path of a new file with all frames. No file is left if an error or a cancel stops it."""
    folder = folder_paths.get_temp_directory()
    path = None
    try:
        os.makedirs(folder, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix="apt_", suffix=".mp4", dir=folder)
        os.close(handle)
        _encode(path, pieces, rate)
    except BaseException as error:  # a cancel is not an Exception
        if path:
            os.unlink(path)
        if isinstance(error, OSError):
            raise AptError(
                f"{NAME}: the video cannot be written to {folder} ({error.strerror}): "
                "free room there, or start ComfyUI with another --temp-directory."
            ) from None
        raise
    return path


def _encode(path: str, pieces: Iterable[torch.Tensor], rate: Fraction) -> None:
    """Encode H.264 in the colours of stock Create Video. Only one piece and the codec's look-ahead are in
    memory.
    """
    with av.open(path, "w") as output:
        stream = None
        for frames in pieces:
            stream = stream or _add_stream(output, rate, *frames.shape[1:3])
            for pixels in frames:
                model_management.throw_exception_if_processing_interrupted()
                array = (pixels[..., :3] * 255).round().to("cpu", torch.uint8).numpy()
                frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(
                    format=stream.pix_fmt, dst_colorspace=Colorspace.ITU709
                )
                _tag(frame)
                output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def _add_stream(
    output: av.container.OutputContainer, rate: Fraction, height: int, width: int
) -> av.VideoStream:
    stream = output.add_stream("h264", rate=rate, options={"crf": CRF})
    stream.height, stream.width = height, width
    # Half the colour resolution, which every player takes, needs even sides.
    stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
    _tag(stream.codec_context)
    return stream


def _tag(target: av.VideoFrame | av.VideoCodecContext) -> None:
    target.color_primaries = ColorPrimaries.BT709
    target.color_trc = ColorTrc.IEC61966_2_1
    target.colorspace = Colorspace.ITU709
    target.color_range = ColorRange.MPEG
