"""Which samples an update sees: shards of latents and text, in an order that is a function of (seed, use, update)."""

from torch import Tensor

from apt_core.errors import AptError
from trainer.shards import EpochSampler, ShardDataset


class Embedder:
    """Prompts to padded embeddings, by a text encoder with a text_length."""

    def __init__(self, text_encoder) -> None:
        self.text_encoder = text_encoder

    def embed(self, prompts: list[str]) -> Tensor:
        """`[n, L, d]`, L the text_length, zero beyond each prompt's own tokens. Raises AptError for a prompt that is too long."""
        return self.text_encoder.pad(self.text_encoder.encode(prompts), self.text_encoder.text_length)


class Batches(Embedder):
    """Real samples of both kinds, in the order of training."""

    def __init__(self, folder, text_encoder, seed: int) -> None:
        super().__init__(text_encoder)
        self.datasets = {kind: ShardDataset(folder, kind) for kind in ("image", "video")}
        self.datasets = {kind: data for kind, data in self.datasets.items() if len(data)}
        self.seed = seed
        self._samplers: dict[tuple, EpochSampler] = {}
        if not self.datasets:
            raise AptError(f"{folder} holds no samples; run precompute on a folder of captioned clips or images.")

    def available(self, kind: str) -> str:
        """`kind`, or the other one where the data has none of it."""
        return kind if kind in self.datasets else next(iter(self.datasets))

    def take(self, kind: str, stream: str, update: int, size: int) -> tuple[list[int], Tensor, Tensor]:
        """Update number `update` of a stream: global sample numbers, latents `[size, C, F, h, w]`, text `[size, L, d]`.

        Streams ("distill", "image/d", "image/g", ...) shuffle apart from one another.
        """
        data, key = self.datasets[kind], (kind, stream, size)
        if key not in self._samplers:
            self._samplers[key] = EpochSampler(len(data), size, self.seed, stream=f"{stream}/{kind}")
        sampler = self._samplers[key]
        latents, text, _ = data.batch(sampler.batch(update))
        return list(sampler.numbers(update)), latents, text
