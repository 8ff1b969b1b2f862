"""The samples of an update on one process: read from shards ahead of time, in the order that
trainer.data.sampling fixes.
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
    """Prompts to padded embeddings, by a text encoder with a text_length."""

    def __init__(self, text_encoder) -> None:
        self.text_encoder = text_encoder

    def embed(self, prompts: list[str]) -> Tensor:
        """`[n, L, d]`, L the text_length, zero beyond each prompt's own tokens. Raises AptError for a prompt
        that is too long.
        """
        return self.text_encoder.pad(self.text_encoder.encode(prompts), self.text_encoder.text_length)


@dataclass(frozen=True)
class Micro:
    """What one process takes at once. numbers: global sample numbers of the run, what noise derives from;
    places: in the whole batch, rising; x: latents `[b, C, F, h, w]`; text `[b, L, d]`; names: of the samples;
    share: of this process's part of the batch.
    """

    numbers: list[int]
    places: list[int]
    x: Tensor
    text: Tensor
    names: list[str]
    share: float


class Microbatches:
    """The microbatches of one update on this process: a length, and an iterator that reads one ahead.

    reader: the thread for that; `then` is called when the last one is handed out, and the reader has nothing
    more to do for this update.
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
        """Start to read the first microbatch."""
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
    """Real samples of both kinds, in the order of training. Raises AptError for a folder without samples.

    held_out: of each kind, so many samples of its commonest shape are kept from training (a tenth of them at
    most), the same ones for every seed: `held`, positions by kind.
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
        ] = {}  # of each stream the next update, and what it was asked with
        if not self.datasets:
            raise AptError(
                f"{folder} holds no samples; run precompute on a folder of captioned clips or images."
            )

    @property
    def fingerprint(self) -> str:
        """Of all sources and settings of the shards."""
        data = next(iter(self.datasets.values())).fingerprint
        return f"{data}-{self.held_out}" if self.held_out else data

    def available(self, kind: str) -> str:
        """`kind`, or the other one where the data has none of it."""
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
        """This process's part of update number `update` of a stream, whose batch has `size` samples in all.

        microbatch: samples at once, None for the whole part. Neither it nor the world changes which samples
        an update sees, or their numbers.
        following: kind and size of the stream's next update, by default the same: its first microbatch is
        read while this one's last is trained on.
        Streams ("distill", "image/d", "image/g", ...) shuffle apart from one another. Raises AptError when
        the batch does not divide.
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
    """Positions of the samples that no update sees. A hash of the name chooses, so that they stay the same
    when others are added.
    """
    positions = max(data.buckets.values(), key=len)
    by_hash = sorted(
        positions,
        key=lambda i: hashlib.blake2b(
            data.samples[i].id.encode(errors="surrogatepass"), digest_size=8
        ).digest(),
    )
    return sorted(by_hash[: min(count, len(positions) // 10)])
