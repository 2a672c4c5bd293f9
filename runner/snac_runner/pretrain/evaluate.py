"""Word errors of an offline recogniser, for what a codec costs in intelligibility.

How good a base codec is: intelligibility, quality, and above all whether its output keeps who speaks.

Bases side by side: the same speech of unseen speakers through each of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snac_core.codec import SNAC
from snac_core.codec.vq import VectorQuantize
from snac_core.errors import UserError
from snac_core.seeding import generator
from snac_core.speakers.encoder import SpeakerEncoder
from snac_runner.data.audio import load_audio, resample
from snac_runner.data.corpus import Corpus, Utterance
from snac_runner.evaluate.content import Recogniser, distance, plain_words
from snac_runner.pretrain.quantizer import Usage


def wer_cost(items: Sequence[Item], made: Sequence[Tensor], rate: int, read: Callable[[Tensor, int], str]) -> float:
    """Word errors in points that the codec adds.

    Where an item's text is known: WER of the codec's output minus WER of the original, both against the text. Where it
    is not: WER of the output against what the recogniser reads in the original, whose own cost is then 0.
    """
    errors = words = 0
    for item, audio in zip(items, made, strict=True):
        original, coded = read(item.audio, rate), read(audio, rate)
        truth = plain_words(original if item.text is None else item.text)
        errors += distance(truth, plain_words(coded)) - distance(truth, plain_words(original))
        words += len(truth)
    return 100 * errors / max(1, words)


JUDGED_AT = 16000  # Hz; PESQ's wide band and STOI's bands lie below 8 kHz
_NOISE = 0  # seed of the decoder's noise


@dataclass(frozen=True)
class Item:
    """One utterance to be coded.

    Attributes:
        speaker: who.
        audio: (1, T), at the codec's rate.
        others: stretches of the same speaker (1, T) that do not overlap with it.
        text: what is said, where that is known.
    """

    speaker: str
    audio: Tensor
    others: tuple[Tensor, ...]
    text: str | None


def choose_items(
    corpus: Corpus, splits: Iterable[str], sample_rate: int, *, seconds: float = 5.0, most: int = 64, seed: int = 0
) -> list[Item]:
    """The first seconds of utterances of unseen speakers, as many of each speaker.

    A speaker's other utterances are its reference; where there is one utterance only, what follows after the item.

    Args:
        corpus: of speech.
        splits: whose speakers are used.
        sample_rate: of the codec, in Hz.
        seconds: length of an item.
        most: items.
        seed: decides which utterances.

    Raises:
        UserError: if fewer than two speakers have speech left for a reference.
    """
    of: dict[str, list[Utterance]] = {}
    for split in splits:
        for utterance in corpus.split(split):
            if utterance.seconds >= 2.0:
                of.setdefault(utterance.speaker, []).append(utterance)
    each = max(1, most // max(1, len(of)))
    items = []
    for speaker, spoken in sorted(of.items()):
        order = torch.randperm(len(spoken), generator=generator(seed, speaker, "figures")).tolist()
        for index in order[:each]:
            rest = [spoken[i] for i in order if i != index][:6]
            if rest:
                others = [load_audio(u, sample_rate, seconds=10.0) for u in rest]
            elif spoken[index].seconds >= seconds + 2.0:
                others = [load_audio(spoken[index], sample_rate, start=seconds, seconds=10.0)]
            else:
                continue
            audio = load_audio(spoken[index], sample_rate, seconds=seconds)
            whole = spoken[index].seconds <= seconds  # a text is that of the whole utterance
            items.append(Item(speaker, audio, tuple(others), spoken[index].text if whole else None))
    if len({item.speaker for item in items}) < 2:
        raise UserError(f"{corpus.name}: figures need two speakers with more than {seconds:g} s of speech each")
    return items


@torch.inference_mode()
def figures(
    codec: SNAC,
    items: Sequence[Item],
    encoder: SpeakerEncoder,
    *,
    levels: int | None = None,
    read: Callable[[Tensor, int], str] | None = None,
) -> dict[str, float]:
    """Figures of a codec, means over `items`.

    Args:
        codec: frozen.
        items: from choose_items.
        encoder: judges who speaks.
        levels: coarse levels that are decoded; None: all.
        read: a recogniser, from audio (1, T) and its rate to words; None: no `wer_cost`.

    Returns:
        `own`, `other`: cosine of the output to the own and to all other speakers' references, and `range`, their
        difference; `stoi`, `pesq` (wide band) where the packages are installed; `used_i`, `perplexity_i` per level;
        `wer_cost`: points of word error more than for the original.
    """
    rate = codec.sampling_rate
    usage = Usage(codec.n_codebooks, codec.codebook_size)
    made = []
    for item in items:
        codes = codec.encode(item.audio.unsqueeze(0))
        usage.add(codes)
        made.append(decode_coarse(codec, codes, levels, item.audio.shape[-1])[0])
    found = _speakers(items, made, encoder, rate)
    found |= _signal([item.audio for item in items], made, rate)
    if levels in (None, codec.n_codebooks):
        found |= usage.figures()
    if read is not None:
        found["wer_cost"] = wer_cost(items, made, rate, read)
    return found


def decode_coarse(codec: SNAC, codes: Sequence[Tensor], levels: int | None, length: int) -> Tensor:
    """Audio (B, 1, T) from the first `levels` levels of codes."""
    with codec.fixed_noise(_NOISE):
        if levels is None or levels == codec.n_codebooks:
            return codec.decode(codes, length=length)
        z_q: Tensor | None = None
        for level, chosen in list(zip(codec.quantizer.quantizers, codes, strict=True))[:levels]:
            assert isinstance(level, VectorQuantize)
            part = level.expand(level.codebook(chosen).transpose(1, 2))
            z_q = part if z_q is None else z_q + part
        assert z_q is not None
        return codec.advance(z_q, "quantized", "audio")[..., :length]


def _speakers(items: Sequence[Item], made: Sequence[Tensor], encoder: SpeakerEncoder, rate: int) -> dict[str, float]:
    def mean(waves: Iterable[Tensor]) -> Tensor:
        return torch.nn.functional.normalize(torch.cat([encoder(w.unsqueeze(0), rate) for w in waves]).mean(0), dim=0)

    speakers = sorted({item.speaker for item in items})
    of_item = [mean(item.others) for item in items]
    of_speaker = {s: mean([w for i in items if i.speaker == s for w in i.others][:8]) for s in speakers}
    own, other = [], []
    for item, audio, reference in zip(items, made, of_item, strict=True):
        embedding = mean([audio])
        own.append(float(embedding @ reference))
        other.append(sum(float(embedding @ of_speaker[s]) for s in speakers if s != item.speaker) / (len(speakers) - 1))
    to_own, to_other = sum(own) / len(own), sum(other) / len(other)
    return {"own": to_own, "other": to_other, "range": to_own - to_other}


def _signal(original: Sequence[Tensor], made: Sequence[Tensor], rate: int) -> dict[str, float]:

    pairs = [
        tuple(resample(wave, rate, JUDGED_AT)[0].numpy() for wave in pair) for pair in zip(original, made, strict=True)
    ]
    found = {}
    try:
        from pystoi import stoi

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # too little speech in an item: it scores 1e-5
            found["stoi"] = sum(float(stoi(a, b, JUDGED_AT)) for a, b in pairs) / len(pairs)
    except ImportError:
        pass
    try:
        from pesq import pesq

        # -1: PESQ itself failed, e.g. found no speech; that is the worst there is
        scores = [max(1.0, float(pesq(JUDGED_AT, a, b, "wb", on_error=1))) for a, b in pairs]
        found["pesq"] = sum(scores) / len(scores)
    except ImportError:
        pass
    return found


_COLUMNS = (
    ("stoi", "STOI", ".3f"),
    ("pesq", "PESQ-WB", ".2f"),
    ("own", "to own", ".3f"),
    ("other", "to others", ".3f"),
    ("range", "range", ".3f"),
    ("wer_cost", "WER cost", ".1f"),
)


def compare(
    codecs: Iterable[str],
    data: Iterable[str],
    *,
    splits: Iterable[str] = ("dev", "test"),
    coarse: bool = True,
    recogniser: bool = False,
    encoder: str = "ge2e",
    most: int = 64,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """A row per codec, corpus, split and number of levels; printed as Markdown tables.

    Args:
        codecs: bundled names, folders or hub ids; those of different rates are judged on the same speech.
        data: folders of speech.
        splits: whose speakers are heard; each by itself.
        coarse: whether the first level, the first two and so on are decoded as well.
        recogniser: whether the offline recogniser reads it too; the slowest of the figures.
        encoder: judge of who speaks.
        most: utterances of each split.
        say: called with lines.

    Raises:
        UserError: if there is too little speech, or a codec or encoder is not known.
    """
    from snac_core.codec import SNAC
    from snac_core.speakers.encoder import load_speaker_encoder
    from snac_runner.data.open_corpus import open_corpus

    judge = load_speaker_encoder(encoder)
    read = Recogniser() if recogniser else None
    bases = {name: SNAC.from_pretrained(name).freeze() for name in codecs}
    rows: list[dict[str, Any]] = []
    for path in data:
        corpus = open_corpus(path, warn=say)
        for split in splits:
            for name, codec in bases.items():
                items = choose_items(corpus, (split,), codec.sampling_rate, most=most)
                for levels in range(1 if coarse else codec.n_codebooks, codec.n_codebooks + 1):
                    found = figures(codec, items, judge, levels=levels, read=read)
                    rows.append({"data": f"{corpus.name}/{split}", "codec": name, "levels": levels, **found})
                    say(" ".join(f"{k} {v:.4f}" if isinstance(v, float) else str(v) for k, v in rows[-1].items()))
    for line in table(rows):
        say(line)
    return rows


def table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table; columns that nobody measured are left out."""
    rows = list(rows)
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
