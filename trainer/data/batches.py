"""Real samples for training: each process reads its part of every update from the shards, ahead of time.

trainer.data.sampling fixes the order.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from apt_core.errors import AptError
from trainer.data.sampling import BucketSampler, split
from trainer.data.shards import ShardDataset
from trainer.machines.distributed import World


class Embedder:
    """Turns prompts into padded text embeddings. text_encoder: a TextEncoder, or Prompts."""

    def __init__(self, text_encoder) -> None:
        self.text_encoder = text_encoder

    def embed(self, prompts: list[str]) -> Tensor:
        """Text embeddings `[n, L, d]`; L is the encoder's text_length, and rows after a prompt's last token
        are zero. Raises AptError for a prompt that is too long.
        """
        return self.text_encoder.pad(self.text_encoder.encode(prompts), self.text_encoder.text_length)


@dataclass(frozen=True)
class Micro:
    """One microbatch: the samples that one process trains on at once.

    numbers: each sample's number in the whole run; its noise is derived from it.
    places: each sample's place in the whole batch, in rising order.
    x: latents `[b, C, F, h, w]`; text: embeddings `[b, L, d]`; names: the samples' ids in the index.
    share: this microbatch's fraction of the process's part of the batch; over an update they add up to 1.
    """

    numbers: list[int]
    places: list[int]
    x: Tensor
    text: Tensor
    names: list[str]
    share: float


class Microbatches:
    """The microbatches of one update on this process. Iterating reads the next one while one is trained on.

    reader: the thread that reads. `then` is called just before the last microbatch is handed out, when the
    reader is free for the next update.
    """

    def __init__(
        self,
        data: ShardDataset,
        positions: list[int],
        first_number: int,
        parts: list[range],
        dp: int,
        reader: ThreadPoolExecutor,
    ) -> None:
        self._data, self._positions, self._first, self._parts, self._dp = (
            data,
            positions,
            first_number,
            parts,
            dp,
        )
        self._reader = reader
        self.then: Callable[[], None] = lambda: None
        self._begun: Future | None = None

    def __len__(self) -> int:
        return len(self._parts)

    def begin(self) -> None:
        """Start reading the first microbatch."""
        self._begun = self._reader.submit(self._read, self._parts[0])

    def __iter__(self) -> Iterator[Micro]:
        if self._begun is None:
            self.begin()
        ahead, self._begun = self._begun, None
        for following in self._parts[1:]:
            micro = ahead.result()
            ahead = self._reader.submit(self._read, following)
            yield micro
        micro = ahead.result()
        self.then()
        yield micro

    def _read(self, places: range) -> Micro:
        indices = [self._positions[place] for place in places]
        x, text, _ = self._data.batch(indices)
        names = [self._data.samples[i].id for i in indices]
        share = len(places) * self._dp / len(self._positions)
        return Micro([self._first + place for place in places], list(places), x, text, names, share)


class Batches(Embedder):
    """The images and videos of a folder of shards, in training order. Raises AptError for an empty folder.

    held_out: how many samples of each kind to keep out of training, at most a tenth of those with the most
    common shape. They are the same for every seed; `held` gives their positions by kind.
    """

    def __init__(self, folder, text_encoder, seed: int, held_out: int = 0) -> None:
        super().__init__(text_encoder)
        self.datasets = {kind: ShardDataset(folder, kind) for kind in ("image", "video")}
        self.datasets = {kind: data for kind, data in self.datasets.items() if len(data)}
        self.seed, self.held_out = seed, held_out
        self.held = {kind: held_positions(data, held_out) for kind, data in self.datasets.items()}
        self._samplers: dict[tuple, BucketSampler] = {}
        self._reader = ThreadPoolExecutor(1, "reader")
        self._ahead: dict[
            str, tuple[tuple, Microbatches]
        ] = {}  # by stream: the next update's microbatches, and the arguments they were made for
        if not self.datasets:
            raise AptError(
                f"{folder} holds no samples; run precompute on a folder of captioned clips or images."
            )

    @property
    def fingerprint(self) -> str:
        """Changes with the shards' settings, with any source file or caption, and with `held_out`."""
        data = next(iter(self.datasets.values())).fingerprint
        return f"{data}-{self.held_out}" if self.held_out else data

    def available(self, kind: str) -> str:
        """`kind`, or the other kind if the data has no samples of this one."""
        return kind if kind in self.datasets else next(iter(self.datasets))

    def take(
        self,
        kind: str,
        stream: str,
        update: int,
        size: int,
        world: World,
        microbatch: int | None = None,
        following: tuple[str, int] | None = None,
    ) -> Microbatches:
        """This process's part of one update of a stream.

        stream: "distill", "image/d", "image/g", ...; each stream is shuffled independently.
        size: samples in the whole batch, over all processes.
        microbatch: samples per microbatch; None takes this process's whole part at once. An update has the
        same samples with the same numbers whatever the microbatch and the number of processes.
        following: (kind, size) of the stream's next update, if they differ from this one's. Its first
        microbatch is read while the last one of this update is trained on.
        Raises AptError when the batch cannot be divided evenly.
        """
        asked = kind, update, size, world.dp, world.dp_rank, microbatch
        was, batch = self._ahead.pop(stream, (None, None))
        if was != asked:
            batch = self._microbatches(stream, *asked)

        def read_ahead() -> None:
            then = following or (kind, size)
            asked = then[0], update + 1, then[1], world.dp, world.dp_rank, microbatch
            ahead = self._microbatches(stream, *asked)
            ahead.begin()
            self._ahead[stream] = asked, ahead

        batch.then = read_ahead
        return batch

    def _microbatches(
        self, stream: str, kind: str, update: int, size: int, dp: int, dp_rank: int, microbatch: int | None
    ) -> Microbatches:
        data, key = self.datasets[kind], (kind, stream, size)
        if key not in self._samplers:
            held = set(self.held[kind])
            buckets = {
                shape: [i for i in positions if i not in held] for shape, positions in data.buckets.items()
            }
            self._samplers[key] = BucketSampler(buckets, size, self.seed, f"{stream}/{kind}")
        parts = split(size, dp, dp_rank, microbatch)
        return Microbatches(data, self._samplers[key].batch(update), update * size, parts, dp, self._reader)


def held_positions(data: ShardDataset, count: int) -> list[int]:
    """Positions of the samples that are never trained on: at most `count`, all of the most common shape.

    They are chosen by a hash of their names, so that adding samples to the data changes few of them.
    """
    positions = max(data.buckets.values(), key=len)
    by_hash = sorted(
        positions,
        key=lambda i: hashlib.blake2b(
            data.samples[i].id.encode(errors="surrogatepass"), digest_size=8
        ).digest(),
    )
    return sorted(by_hash[: min(count, len(positions) // 10)])
