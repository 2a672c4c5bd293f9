"""Latents of whole utterances and of their imitated voices, computed once by the frozen codec and read from disk by
every step, seed and study.

A crop takes its frames from the latent of the utterance. The encoder has seen the speech around the crop, as it does
when a whole utterance is converted, where the latent of the crop alone has the zero padding of the convolutions at its
two ends. The frames in between are equal up to rounding. Crops start at whole frames.

Files are shards of at most `SHARD_SECONDS` of one speaker, named by a digest of everything that they depend on, and
never changed: they appear complete, by a rename. Processes that build the same cache share the work, and at worst
compute a shard twice, with equal bits.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from snac_core.augment import imitate
from snac_core.codec import SNAC
from snac_core.codec.streaming import CHUNK_SECONDS, Windows, encoder_context
from snac_core.conditioned import ConditionedCodec
from snac_core.errors import UserError
from snac_core.files import write_bytes
from snac_core.seeding import generator
from snac_core.speakers.encoder import SpeakerEncoder
from snac_runner.data.audio import load_audio, one_thread
from snac_runner.data.cache import cache_folder
from snac_runner.data.corpus import Utterance, digest_of
from snac_runner.data.utterances import Utterances

SHARD_SECONDS = 300.0
"""Speech in a file, at most, unless one utterance is longer: about 45 MB of snac_24khz."""
_VERSION = 1  # of the computation below; shards of other versions are not read
_REFERENCE_SECONDS = 10.0  # of the speech that is imitated
_NEAR, _LEAST_SPEECH = 8, 32  # frames: beside a crop, and of an utterance outside of a crop
_ESTIMATED, _ESTIMATE_OF = 4, 64  # utterances that an estimate computes: of typical length, of those drawn


class LatentCache:
    """The latents of a frozen codec on the utterances of a split.

    Each utterance is encoded alone and on one thread, so that the bits do not depend on other utterances, on the number
    of threads or on what was cached before. Silence of one unit (`SNAC.padding_multiple`) follows each utterance, and
    more if it is shorter than a crop.

    Args:
        utterances: of the split; those of one speaker follow each other.
        codec: frozen.
        crop_samples: length of a crop, at the codec's rate.

    Attributes:
        folder: of the shards.
        crop_frames: number of latent frames of a crop.
        size: bytes on disk of the whole cache, estimated from the lengths of the utterances.
    """

    def __init__(self, utterances: Sequence[Utterance], codec: SNAC, crop_samples: int) -> None:
        self._codec: SNAC | None = codec
        self.unit, self.hop_length, self.sampling_rate = codec.padding_multiple, codec.hop_length, codec.sampling_rate
        self.crop_samples = crop_samples
        self.crop_frames = -(-crop_samples // self.unit) * (self.unit // self.hop_length)
        self._device = next(codec.parameters()).device
        self.folder = cache_folder() / "latents" / f"{codec.digest[:16]}-{self._device.type}"
        self._context = encoder_context(ConditionedCodec(codec))
        self._shards: dict[Path, list[Utterance]] = {}
        self._shard_of: dict[str, Path] = {}
        for _, of_speaker in groupby(utterances, key=lambda utterance: utterance.speaker):
            shard: list[Utterance] = []
            for utterance in of_speaker:
                if shard and sum(u.seconds for u in shard) + utterance.seconds > SHARD_SECONDS:
                    self._add(shard)
                    shard = []
                shard.append(utterance)
            self._add(shard)
        self.size = sum(map(self._bytes, self._shards))

    def __getstate__(self) -> dict[str, Any]:
        """What a process that only reads needs: neither the codec nor the contents of shards."""
        return {**vars(self), "_codec": None, "_context": None, "_shards": {}}

    @property
    def codec(self) -> SNAC:
        """The codec.

        Raises:
            UserError: in a process that only reads.
        """
        if self._codec is None:
            raise UserError(
                f"a file of the latent cache in {self.folder} was deleted or damaged during training; run the same "
                "command again to compute it and continue"
            )
        return self._codec

    def build(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compute the shards that are not on disk; an interrupted build continues where it stopped.

        Args:
            progress: called with (shards done, shards in all).

        Raises:
            UserError: if the disk has not enough space.
        """
        missing, needed = self._missing(), self.missing_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"the latent cache needs {needed / 1e9:.1f} GB more, and {self.folder} has {free / 1e9:.1f} GB free; "
                "set the environment variable SNAC_CACHE to a larger disk, or latent_cache=false"
            )
        # processes that start together begin at different shards, and skip what the others have done
        first = os.getpid() % len(missing) if missing else 0
        with one_thread() as threads:
            pool = ThreadPoolExecutor(max_workers=threads if self._device.type == "cpu" else 1)
            try:
                running = [pool.submit(self._write, path) for path in missing[first:] + missing[:first]]
                for done, future in enumerate(as_completed(running), 1):
                    future.result()
                    if progress:
                        progress(done, len(missing))
            finally:
                pool.shutdown(cancel_futures=True)

    def _missing(self) -> list[Path]:
        return [path for path in self._shards if not path.is_file()]

    @property
    def missing_bytes(self) -> int:
        """Size of what is not on disk, estimated."""
        return sum(map(self._bytes, self._missing()))

    def missing_utterances(self) -> list[Utterance]:
        """The utterances of which the latents are not on disk."""
        return [utterance for path in self._missing() for utterance in self._shards[path]]

    def at(self, utterance: Utterance, start: int) -> Tensor:
        """The latent (C, F) of the crop of an utterance that starts at sample `start`, a whole number of frames.

        F is the number of frames of the crop's audio, padded as by `SNAC.preprocess`.
        """
        first = start // self.hop_length
        latent: Tensor = self._shard(utterance).get_slice(self._key(utterance))[first : first + self.crop_frames]
        return latent.T.contiguous()

    def speech(self, utterance: Utterance, frames: int, start: float = 0.0) -> Tensor:
        """The latent (C, frames) of an utterance from `start` s on; from its beginning again where it ends."""
        first = min(round(start * self.sampling_rate / self.hop_length), self._frames(utterance) - 1)
        return _looped(self._whole(utterance).roll(-first, 0), frames)

    def speech_outside(self, utterance: Utterance, start: int, frames: int, draw: torch.Generator) -> Tensor:
        """The latent (C, frames) of other parts of an utterance than the crop that starts at sample `start`.

        What follows the crop and what precedes it is one loop, which is entered at a frame that is drawn. Frames near
        the crop are left out, because the encoder has seen the crop there. An utterance hardly longer than a crop is
        taken whole.
        """
        whole, first = self._whole(utterance), start // self.hop_length
        rest = torch.cat([whole[first + self.crop_frames + _NEAR :], whole[: max(0, first - _NEAR)]])
        if len(rest) < _LEAST_SPEECH:
            rest = whole
        return _looped(rest.roll(-int(torch.randint(len(rest), (), generator=draw)), 0), frames)

    def _frames(self, utterance: Utterance) -> int:
        """Latent frames of an utterance, without the silence after it."""
        return max(1, int(utterance.seconds * self.sampling_rate) // self.hop_length)

    def _whole(self, utterance: Utterance) -> Tensor:
        """The latent (F, C) of an utterance, without the silence after it."""
        latent: Tensor = self._shard(utterance).get_tensor(self._key(utterance))
        return latent[: self._frames(utterance)]

    def _shard(self, utterance: Utterance) -> Any:
        path = self._shard_of[utterance.id]
        try:
            return _opened(path)
        except (OSError, SafetensorError):  # deleted since, or damaged
            with one_thread():
                write_bytes(path, self._computed(path))
            return _opened(path)

    def _add(self, shard: list[Utterance]) -> None:
        name = digest_of([_VERSION, self.codec.digest, CHUNK_SECONDS, [self._key(utterance) for utterance in shard]])
        path = self.folder / f"{name[:32]}.safetensors"
        self._shards[path] = shard
        self._shard_of |= dict.fromkeys((utterance.id for utterance in shard), path)

    def _key(self, utterance: Utterance) -> str:
        """Identifies the audio that is encoded: the file's bytes, the position in it, and the least length."""
        short = utterance.seconds * self.sampling_rate < self.crop_samples
        place = [utterance.digest, utterance.start, utterance.seconds, self.crop_samples if short else 0]
        return hashlib.sha256(digest_of(place).encode()).hexdigest()[:32]

    def _bytes(self, path: Path) -> int:
        """Size of a shard, estimated."""
        samples = (max(utterance.seconds * self.sampling_rate, self.crop_samples) for utterance in self._shards[path])
        frames = sum((int(n / self.unit) + 2) * (self.unit // self.hop_length) for n in samples)
        return frames * self.codec.latent_dim * 4

    def _write(self, path: Path) -> None:
        if not path.is_file():  # another process may have written it by now
            write_bytes(path, self._computed(path))

    def _computed(self, path: Path) -> bytes:
        _ = self.codec  # an error where there is none
        return save({name: one for utterance in self._shards[path] for name, one in self.tensors(utterance).items()})

    def tensors(self, utterance: Utterance) -> dict[str, Tensor]:
        """What the cache stores of an utterance, computed: the latent (F, C)."""
        return {self._key(utterance): self._encoded(load_audio(utterance, self.sampling_rate))}

    @torch.no_grad()
    def _encoded(self, audio: Tensor) -> Tensor:
        """The latent (F, C) of audio (1, T) and the silence after it; long audio is encoded in windows."""
        silence = max(0, self.crop_samples - audio.shape[-1]) + self.unit
        padded = self.codec.preprocess(F.pad(audio, (0, silence)).unsqueeze(0).to(self._device))
        chunk = max(1, round(CHUNK_SECONDS * self.sampling_rate / self.unit))
        windows = Windows(lambda window, _: [self.codec.advance(window, None, "latent")], self._context, chunk)
        parts = [*windows.push(padded), *windows.flush()]
        return torch.cat([part for (part,) in parts], dim=-1)[0].T.contiguous().cpu()


class ImitationCache(LatentCache):
    """The same for the utterances of a split in the voices of other speakers, with an embedding of each result.

    Each utterance gets the pitch, formant range and long-term spectrum of an utterance of another speaker
    (`snac_core.augment.imitate`), as a whole. The other speaker is drawn uniformly, by the digest of the utterance and
    the number of the voice.

    Args:
        utterances: of the split, of at least two speakers.
        codec, crop_samples: as for `LatentCache`.
        encoder: of the embeddings.
        voice: number of the voice; each number has another draw of the speaker.

    Raises:
        UserError: if there is only one speaker.
    """

    def __init__(
        self, utterances: Utterances, codec: SNAC, crop_samples: int, *, encoder: SpeakerEncoder, voice: int
    ) -> None:
        if len(utterances.speakers) < 2:
            raise UserError("imitations need speech of at least 2 training speakers; this data has 1")
        self._encoder: SpeakerEncoder | None = encoder
        self._encoder_digest = encoder.digest
        self.utterances, self.voice = utterances, voice
        super().__init__(utterances, codec, crop_samples)

    def __getstate__(self) -> dict[str, Any]:
        """What a process that only reads needs."""
        return {**super().__getstate__(), "_encoder": None}

    def embedding_of(self, utterance: Utterance) -> Tensor:
        """The embedding (S,) of the whole utterance in the other voice."""
        embedding: Tensor = self._shard(utterance).get_tensor(_embedding_key(self._key(utterance)))
        return embedding

    def reference(self, utterance: Utterance) -> Utterance:
        """The utterance of another speaker that this one imitates."""
        draw = generator(self.voice, "imitation", utterance.digest, utterance.start)
        speakers = self.utterances.speakers
        chosen = int(torch.randint(len(speakers) - 1, (), generator=draw))
        chosen += speakers[chosen] >= utterance.speaker  # names are sorted; the own one is left out
        theirs = self.utterances.rows_of(speakers[chosen])
        return self.utterances[int(theirs[int(torch.randint(len(theirs), (), generator=draw))])]

    def _key(self, utterance: Utterance) -> str:
        """Identifies the utterance, the speech that is imitated, and the encoder."""
        reference = self.reference(utterance)
        parts = [super()._key(utterance), reference.digest, reference.start, reference.seconds, self._encoder_digest]
        return hashlib.sha256(digest_of(parts).encode()).hexdigest()[:32]

    @torch.no_grad()
    def tensors(self, utterance: Utterance) -> dict[str, Tensor]:
        """The latent (F, C) of the utterance in the other voice, and the embedding (S,) of the result."""
        assert self._encoder is not None
        key, audio = self._key(utterance), self.imitation(utterance)
        embedding = self._encoder(audio.unsqueeze(0).to(self._device), self.sampling_rate)[0].cpu()
        return {key: self._encoded(audio), _embedding_key(key): embedding}

    def imitation(self, utterance: Utterance) -> Tensor:
        """The utterance (1, T) in the voice of its reference, at the codec's rate."""
        rate = self.sampling_rate
        audio = load_audio(utterance, rate)
        reference = load_audio(self.reference(utterance), rate, seconds=_REFERENCE_SECONDS)
        return imitate(audio.unsqueeze(0), rate, reference.unsqueeze(0))[0]


class CacheEstimate(ImitationCache):
    """Stands in for a cache in a dry run: it computes a few utterances, and gives their values for all others.

    Args:
        cache: what it stands in for; utterances are missing there.
        progress: called with (utterances done, utterances that are computed).

    Attributes:
        seconds: time to build the rest of the cache with the threads that torch has here, estimated.
    """

    def __init__(self, cache: LatentCache, progress: Callable[[int, int], None]) -> None:
        vars(self).update(vars(cache))
        missing = cache.missing_utterances()
        drawn = sorted(missing[:: -(-len(missing) // _ESTIMATE_OF)], key=lambda utterance: utterance.seconds)
        middle = max(0, (len(drawn) - _ESTIMATED) // 2)  # of typical length
        chosen = drawn[middle : middle + _ESTIMATED]
        self._values, times = list[tuple[Tensor, ...]](), []
        with one_thread() as threads:
            for done, utterance in enumerate([chosen[0], *chosen]):  # the first one warms up
                started = time.perf_counter()
                tensors = cache.tensors(utterance)
                times.append(time.perf_counter() - started)
                self._values.append(tuple(tensors.values()))
                progress(done, len(chosen))
        speed = sum(times[1:]) / sum(utterance.seconds for utterance in chosen)
        workers = threads if self._device.type == "cpu" else 1
        self.seconds = speed * sum(utterance.seconds for utterance in missing) / workers

    def at(self, utterance: Utterance, start: int) -> Tensor:
        """The first crop (C, F) of one of the utterances."""
        return self._of(utterance)[0][: self.crop_frames].T.contiguous()

    def embedding_of(self, utterance: Utterance) -> Tensor:
        """The embedding (S,) of one of the utterances."""
        return self._of(utterance)[1]

    def _whole(self, utterance: Utterance) -> Tensor:
        return self._of(utterance)[0]

    def _of(self, utterance: Utterance) -> tuple[Tensor, ...]:
        return self._values[int(utterance.digest[:8], 16) % len(self._values)]


def _looped(latent: Tensor, frames: int) -> Tensor:
    """(F, C) repeated to (C, frames)."""
    return latent.repeat(-(-frames // len(latent)), 1)[:frames].T.contiguous()


def _embedding_key(key: str) -> str:
    return f"{key}.embedding"


@lru_cache(maxsize=128)
def _opened(path: Path) -> Any:
    """A shard, memory-mapped."""
    return safe_open(path, "pt")
