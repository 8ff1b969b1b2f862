"""APT Noise Walk: noise that goes from seed to seed along a batch."""

from comfy_api.latest import io

from ..apt_core.errors import AptError
from .noise import WalkNoise

NAME = "APT Noise Walk"
MAX_SEED = 0xFFFFFFFFFFFFFFFF


class APTNoiseWalk(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="APTNoiseWalk",
            display_name=NAME,
            category="APT",
            description=(
                "Noise that goes from seed to seed in equal steps along the batch: "
                "a one-step model then morphs from picture to picture, or from clip to clip. "
                "For APT One-Step Sampler, or stock Sampler Custom (Advanced)."
            ),
            search_aliases=[
                "noise interpolation",
                "slerp",
                "latent walk",
                "latent traversal",
                "morph",
                "seed travel",
                "apt",
            ],
            inputs=[
                io.String.Input(
                    "seeds",
                    default="1, 2",
                    tooltip=(
                        "The seeds to walk through, two or more whole numbers with commas in between. "
                        "Default 1, 2. How many items lie on the way is the batch size of the latent; "
                        "at a seed itself the noise is that of the seed alone."
                    ),
                ),
                io.Boolean.Input(
                    "closed",
                    default=False,
                    tooltip=(
                        "Default off: from the first seed to the last one. On: "
                        "from the last one back to the first, for a loop without a seam."
                    ),
                ),
            ],
            outputs=[
                io.Noise.Output(
                    tooltip="The noise, spread over the batch of whatever latent it is used with."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, seeds: str | None) -> bool | str:
        # None: the input is linked, and unknown before the graph runs. With `closed` as a second argument
        # ComfyUI would report every error twice.
        try:
            if seeds is not None:
                _read(seeds, closed=False)
        except AptError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, seeds: str, closed: bool) -> io.NodeOutput:
        return io.NodeOutput(WalkNoise(_read(seeds, closed), closed))


def _read(text: str, closed: bool) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if len(words) < 2 or not all(word.isdecimal() and int(word) <= MAX_SEED for word in words):
        raise AptError(
            f'{NAME}: seeds is "{text}", but it must be two or more whole numbers from 0 with commas in '
            "between, such as 1, 2, 3."
        )
    seeds = [int(word) for word in words]
    pairs = list(zip(seeds, seeds[1:])) + ([(seeds[-1], seeds[0])] if closed else [])
    for a, b in pairs:
        if a == b:
            raise AptError(
                f'{NAME}: seeds is "{text}", which goes from {a} to {b}, but a seed cannot lead to itself: '
                "leave one of them out"
                f"{', a closed walk returns to its first seed anyway' if closed else ''}."
            )
    return seeds
