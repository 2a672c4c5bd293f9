"""Compare base codecs on unseen speakers: speaker similarity, STOI, PESQ, word errors, and the use of the codes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchaudio.functional import edit_distance

from snac_core.codec import SNAC
from snac_core.codec.vq import VectorQuantize
from snac_core.errors import UserError
from snac_core.seeding import generator
from snac_core.speakers.encoder import SpeakerEncoder, load_speaker_encoder
from snac_runner.data.audio import load_audio, resample
from snac_runner.data.corpus import Corpus, Utterance
from snac_runner.data.open_corpus import open_corpus
from snac_runner.evaluate.whisper import SAMPLE_RATE, Whisper
from snac_runner.pretrain.quantizer import CodeUsage

SIGNAL_RATE = 16000
"""Sample rate of STOI and wide-band PESQ in Hz."""

_NOISE_SEED = 0  # of the decoder
_COLUMNS = (
    ("stoi", "STOI", ".3f"),
    ("pesq", "PESQ-WB", ".2f"),
    ("own", "to own", ".3f"),
    ("other", "to others", ".3f"),
    ("range", "range", ".3f"),
    ("wer_cost", "WER cost", ".1f"),
)


@dataclass(frozen=True)
class Item:
    """One utterance to encode and decode.

    Attributes:
        speaker: of the utterance.
        audio: (1, T), at the codec's sample rate.
        references: other audio of the same speaker, (1, T) each, without overlap.
        text: what is said, or None if it is not known.
    """

    speaker: str
    audio: Tensor
    references: tuple[Tensor, ...]
    text: str | None


def compare(
    codecs: Iterable[str],
    data: Iterable[str],
    *,
    splits: Iterable[str] = ("dev", "test"),
    coarse: bool = True,
    whisper: str = "",
    encoder: str = "ge2e",
    max_items: int = 64,
) -> list[dict[str, Any]]:
    """Evaluate codecs on the same speech, and print a Markdown table.

    Args:
        codecs: bundled names, folders or hub ids, of any sample rates.
        data: folders of speech.
        splits: evaluated separately.
        coarse: also decode the first level only, the first two levels, and so on.
        whisper: folder or name of a Whisper that word errors are computed with; empty: no word errors.
        encoder: speaker encoder that measures similarity. It must not have been used to train a codec.
        max_items: utterances per split.

    Returns:
        A row per corpus, split, codec and number of levels: those keys, and the metrics of `evaluate_codec`.

    Raises:
        UserError: for too little speech, or an unknown codec or encoder.
    """
    judge = load_speaker_encoder(encoder)
    recogniser = Whisper(whisper, download=True) if whisper else None
    loaded = {name: SNAC.from_pretrained(name).freeze() for name in codecs}
    rows: list[dict[str, Any]] = []
    for path in data:
        corpus = open_corpus(path, warn=print)
        for split in splits:
            for name, codec in loaded.items():
                items = select_items(corpus, (split,), codec.sampling_rate, max_items=max_items)
                for levels in range(1 if coarse else codec.n_codebooks, codec.n_codebooks + 1):
                    metrics = evaluate_codec(codec, items, judge, levels=levels, recogniser=recogniser)
                    rows.append({"data": f"{corpus.name}/{split}", "codec": name, "levels": levels, **metrics})
    print("\n".join(table(rows)))
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table, without columns that no row has."""
    columns = [column for column in _COLUMNS if any(column[0] in row for row in rows)]
    lines = ["| speech | codec | levels | " + " | ".join(title for _, title, _ in columns) + " | used | perplexity |"]
    lines.append("|---" * (5 + len(columns)) + "|")
    for row in rows:
        cells = [format(row[key], form) if key in row else "" for key, _, form in columns]
        levels = range(sum(key.startswith("used_") for key in row))
        used = ", ".join(f"{100 * row[f'used_{level}']:.0f} %" for level in levels)
        perplexity = ", ".join(f"{row[f'perplexity_{level}']:.0f}" for level in levels)
        lines.append(
            f"| {row['data']} | {row['codec']} | {row['levels']} | {' | '.join(cells)} | {used} | {perplexity} |"
        )
    return lines


def select_items(
    corpus: Corpus,
    splits: Iterable[str],
    sample_rate: int,
    *,
    seconds: float = 5.0,
    max_items: int = 64,
    seed: int = 0,
) -> list[Item]:
    """The first seconds of random utterances, the same number for each speaker.

    References are other utterances of the speaker or, if there is only one utterance, its audio after the item.

    Args:
        corpus: of speech.
        splits: all their speakers are used.
        sample_rate: of the codec, in Hz.
        seconds: length of an item, in s.
        max_items: largest number of items, if it is at least the number of speakers.
        seed: of the choice of utterances.

    Raises:
        UserError: if fewer than two speakers have speech left for references.
    """
    of_speaker: dict[str, list[Utterance]] = {}
    for split in splits:
        for utterance in corpus.split(split):
            if utterance.seconds >= 2.0:
                of_speaker.setdefault(utterance.speaker, []).append(utterance)
    per_speaker = max(1, max_items // max(1, len(of_speaker)))
    items = []
    for speaker, utterances in sorted(of_speaker.items()):
        order = torch.randperm(len(utterances), generator=generator(seed, speaker, "figures")).tolist()
        for index in order[:per_speaker]:
            utterance = utterances[index]
            rest = [utterances[i] for i in order if i != index][:6]
            if rest:
                references = [load_audio(u, sample_rate, seconds=10.0) for u in rest]
            elif utterance.seconds >= seconds + 2.0:
                references = [load_audio(utterance, sample_rate, start=seconds, seconds=10.0)]
            else:
                continue
            audio = load_audio(utterance, sample_rate, seconds=seconds)
            text = utterance.text if utterance.seconds <= seconds else None  # the text is that of the whole utterance
            items.append(Item(speaker, audio, tuple(references), text))
    if len({item.speaker for item in items}) < 2:
        raise UserError(f"{corpus.name}: expected two speakers with more than {seconds:g} s of speech each")
    return items


@torch.inference_mode()
def evaluate_codec(
    codec: SNAC,
    items: Sequence[Item],
    encoder: SpeakerEncoder,
    *,
    levels: int | None = None,
    recogniser: Whisper | None = None,
) -> dict[str, float]:
    """Metrics of a codec, means over `items`.

    Args:
        codec: frozen.
        items: from select_items.
        encoder: measures speaker similarity.
        levels: number of coarse levels to decode; None: all.
        recogniser: of words; None: no `wer_cost`.

    Returns:
        `own`, `other`: cosine similarity of the output to references of its own speaker and of all others, and
        `range`, their difference. `stoi`, `pesq` (wide band), if their packages are installed. `used_i`,
        `perplexity_i` of each level, if all levels are decoded. `wer_cost`: word errors that the codec adds, in
        percentage points.
    """
    rate = codec.sampling_rate
    usage = CodeUsage(codec.n_codebooks, codec.codebook_size)
    outputs = []
    for item in items:
        codes = codec.encode(item.audio.unsqueeze(0))
        usage.add(codes)
        outputs.append(decode_levels(codec, codes, levels, item.audio.shape[-1])[0])
    metrics = _speaker_similarity(items, outputs, encoder, rate) | _signal_metrics(items, outputs, rate)
    if levels in (None, codec.n_codebooks):
        metrics |= usage.statistics()
    if recogniser is not None:
        metrics["wer_cost"] = wer_cost(items, outputs, rate, recogniser)
    return metrics


def decode_levels(codec: SNAC, codes: Sequence[Tensor], levels: int | None, length: int) -> Tensor:
    """Audio (B, 1, T) from the first `levels` levels of the codes, with fixed decoder noise; None: all levels.

    Args:
        codec: frozen.
        codes: one (B, F / stride) per level.
        levels: number of levels to decode.
        length: T in samples.
    """
    with codec.fixed_noise(_NOISE_SEED):
        if levels is None or levels == codec.n_codebooks:
            return codec.decode(codes, length=length)
        z_q: Tensor | None = None
        for level, chosen in list(zip(codec.quantizer.quantizers, codes, strict=True))[:levels]:
            assert isinstance(level, VectorQuantize)
            part = level.expand(level.codebook(chosen).transpose(1, 2))
            z_q = part if z_q is None else z_q + part
        assert z_q is not None
        return codec.advance(z_q, "quantized", "audio")[..., :length]


def wer_cost(items: Sequence[Item], outputs: Sequence[Tensor], sample_rate: int, recogniser: Whisper) -> float:
    """Word errors that a codec adds, in percentage points.

    With known texts this is the WER of the outputs minus that of the originals. Without, it is the WER of the outputs
    against the transcripts of the originals.

    Args:
        items: with the originals.
        outputs: of the codec, (1, T) for each item.
        sample_rate: of both, in Hz.
        recogniser: of words.
    """

    def read(waves: Iterable[Tensor]) -> list[list[str]]:
        resampled = [resample(wave[0], sample_rate, SAMPLE_RATE) for wave in waves]
        return [recogniser.words(text) for text in recogniser.read(resampled)]

    errors = words = 0
    originals = read(item.audio for item in items)
    for item, original, output in zip(items, originals, read(outputs), strict=True):
        truth = original if item.text is None else recogniser.words(item.text)
        errors += edit_distance(truth, output) - edit_distance(truth, original)
        words += len(truth)
    return 100 * errors / max(1, words)


def _speaker_similarity(
    items: Sequence[Item], outputs: Sequence[Tensor], encoder: SpeakerEncoder, rate: int
) -> dict[str, float]:
    def embed(waves: Iterable[Tensor]) -> Tensor:
        return torch.nn.functional.normalize(torch.cat([encoder(w.unsqueeze(0), rate) for w in waves]).mean(0), dim=0)

    speakers = sorted({item.speaker for item in items})
    of_item = [embed(item.references) for item in items]
    of_speaker = {s: embed([w for i in items if i.speaker == s for w in i.references][:8]) for s in speakers}
    own, other = [], []
    for item, output, reference in zip(items, outputs, of_item, strict=True):
        embedding = embed([output])
        own.append(float(embedding @ reference))
        other.append(sum(float(embedding @ of_speaker[s]) for s in speakers if s != item.speaker) / (len(speakers) - 1))
    mean_own, mean_other = sum(own) / len(own), sum(other) / len(other)
    return {"own": mean_own, "other": mean_other, "range": mean_own - mean_other}


def _signal_metrics(items: Sequence[Item], outputs: Sequence[Tensor], rate: int) -> dict[str, float]:
    pairs = [
        tuple(resample(wave, rate, SIGNAL_RATE)[0].numpy() for wave in (item.audio, output))
        for item, output in zip(items, outputs, strict=True)
    ]
    metrics = {}
    try:
        from pystoi import stoi

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # an item with too little speech scores 1e-5
            metrics["stoi"] = sum(float(stoi(a, b, SIGNAL_RATE)) for a, b in pairs) / len(pairs)
    except ImportError:
        pass
    try:
        from pesq import pesq

        # with on_error=1 PESQ returns -1 if it fails, e.g. without speech; such an item gets the lowest score
        scores = [max(1.0, float(pesq(SIGNAL_RATE, a, b, "wb", on_error=1))) for a, b in pairs]
        metrics["pesq"] = sum(scores) / len(scores)
    except ImportError:
        pass
    return metrics
