"""Synthesize a parallel corpus with espeak-ng: synthetic speakers, known text, split by voice.

The speakers are voice variants of espeak-ng 1.52. Three sentences were synthesized with each of its 104 variants, to
measure the GE2E cosine similarity between them. Excluded are the two variants that only whisper (no pitch), all with a
similarity of 0.95 or more to a held-out voice (RicishayMax2 to RicishayMax3: 0.98), and the later of two with 0.97 or
more to each other (steph2 and steph). The similarity of two held-out voices is at most 0.89. `HELD_OUT` voices are only
in dev and test, so that no model is trained on them.

The sentences were written for this project and contain all phonemes of English. Each lasts two and a half to four
seconds, so that a whole sentence with its text fits into one conversion.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import soundfile
import torch

from snac_core.errors import UserError
from snac_core.files import parse_json, write_json, write_text
from snac_runner.data.audio import resample
from snac_runner.data.corpus import Utterance, hash_fraction
from snac_runner.data.espeak import variants, voice
from snac_runner.data.formats import MANIFEST_NAME, write_manifest

HELD_OUT = (
    "Alicia", "Diogo", "Gene", "Hugo", "Nguyen", "RicishayMax3", "adam", "announcer",
    "ed", "f5", "iven2", "klatt3", "m2", "marcelo", "rob", "shelby",
)  # fmt: skip

TRAIN = (
    "Alex", "Andrea", "Andy", "Annie", "AnxiousAndy", "Demonic", "Denis", "Jacky", "Lee", "Marco", "Mario",
    "Michael", "Mike", "Mr serious", "Reed", "RicishayMax", "Storm", "Tweaky", "UniRobot", "anika", "anikaRobot",
    "antonio", "aunty", "belinda", "boris", "caleb", "croak", "david", "edward", "f1", "f3", "f4", "grandma",
    "gustave", "ian", "iven4", "john", "kaukovalta", "klatt", "klatt4", "linda", "m1", "m3", "m4", "m5", "m6",
    "m7", "m8", "max", "mike2", "norbert", "pablo", "paul", "pedro", "quincy", "robosoft", "robosoft2",
    "robosoft4", "robosoft5", "robosoft6", "robosoft7", "robosoft8", "sandro", "steph", "steph3", "travis",
    "victor", "zac",
)  # fmt: skip


SENTENCES = (
    "Seven tired painters shared one narrow yellow boat.",
    "Please measure the azure cloth before you cut it.",
    "My uncle joined a noisy choir in Boston last May.",
    "The youth threw both of those things over the hedge.",
    "A huge crowd watched the judge arrange his garage.",
    "Why would anyone hide good sugar under the stairs?",
    "Fresh oysters and boiled eggs make a strange lunch.",
    "She usually reads the evening paper near the fire.",
    "Our cousin bought four pairs of purple shoes today.",
    "Thirty brave soldiers slept behind the quiet church.",
    "Give the young nurse a warm cup of ginger tea.",
    "The pilot enjoys long voyages across the northern sea.",
    "Nobody thought the river could rise so high so fast.",
    "Put the wooden toys back on the lower shelf.",
    "Cheap engines often cough loudly on a cold morning.",
    "They gathered thick wool from a few hungry sheep.",
    "George has a vision of peace, pleasure and leisure.",
    "Her brother fixed the broken clock without any tools.",
    "We chose blue chairs, but they sent us brown ones.",
    "Look how the full moon pulls the water up the shore.",
    "A clever fox jumped quickly over the garden wall.",
    "The thin boy with the cap is singing in the bath.",
    "Doctor Wong advised us to breathe slowly and rest.",
    "Eight geese were chasing a mouse around the barn.",
    "Could you carry this heavy parcel to the village?",
    "The coin rolled down the hill into a deep pool.",
    "Sharp winds blew dust into every room of the house.",
    "I heard a faint noise coming from the empty hall.",
    "Both teachers agreed that the exam had been unfair.",
    "Catch the early bus if you want to arrive by noon.",
    "The farmer's daughter owns twelve white horses now.",
    "Zebras and giraffes graze beside the muddy lake.",
    "Jane wore a bright orange jacket to the theatre.",
    "Few people know where the old treasure was buried.",
    "Hot soup and soft bread are all I need this winter.",
    "The musician tuned her violin, then began to play.",
    "Don't push that button unless the green light is on.",
    "Five curious children looked through the dusty window.",
    "It takes courage to change your mind in public.",
    "Their ship was destroyed by thunder and heavy rain.",
    "Charles picked a bunch of fresh herbs for the stew.",
    "A loud bang woke the whole neighbourhood at dawn.",
    "The shy girl whispered something about a royal visit.",
    "Most of the young birds had flown south by Thursday.",
    "He keeps his savings in a jar above the kitchen sink.",
    "Would the lady in the third row ask her question?",
    "Rough stones and smooth pebbles cover the whole beach.",
    "You ought to thank your mother for this lovely cake.",
)


SAMPLE_RATE = 16000  # Hz
MIN_VOICES, MAX_VOICES = 8, len(HELD_OUT) + 64
_LEVEL = 0.06  # RMS of each utterance, re full scale: equal, so that loudness does not identify a voice
_PEAK = 0.95  # maximum amplitude, re full scale
_MARGIN = 0.05  # s of silence kept before and after the speech
_VERSION = 1  # of the files that given arguments produce
_README = """# {speakers} synthetic speakers

Synthesized by espeak-ng at {rate} Hz, resampled to {target} Hz, 16 bit, RMS {level}. {count} sentences, {who}:
a parallel corpus with known text. Split by voice: {split}; the voices of dev and test are
never in train, for any number of speakers. `{manifest}` gives the voice, split and text of each file, and the sex if
the voice's definition states it. Made with speakers={speakers}, seed={seed}; equal arguments produce equal files.
"""


def choose_voices(speakers: int, seed: int = 0, *, dev: bool = True) -> dict[str, list[str]]:
    """Split -> voices: half of the speakers are held out (at most 16), and a third of those (rounded up) are dev.

    8 speakers are 4 train, 2 dev and 2 test; 24 are 12, 4 and 8; 80 are 64, 6 and 10. Without `dev`, all that are held
    out are test. The seed decides which voices. A larger number of speakers does not move a voice to another split.

    Raises:
        UserError: if the number of speakers is not from 8 to 80.
    """
    if not MIN_VOICES <= speakers <= MAX_VOICES:
        raise UserError(f"got {speakers} synthetic speakers; expected {MIN_VOICES} to {MAX_VOICES}")
    held_out = min(len(HELD_OUT), speakers // 2)
    validated = -(-held_out // 3) if dev else 0
    evaluation = sorted(HELD_OUT, key=lambda name: hash_fraction(name, seed))
    train = sorted(TRAIN, key=lambda name: hash_fraction(name, seed))
    test = evaluation[-(held_out - validated) :]
    return {"train": train[: speakers - held_out], **({"dev": evaluation[:validated]} if dev else {}), "test": test}


def synthesize(
    root: str | Path,
    speakers: int = 24,
    sentences: int | Sequence[str] = 18,
    seed: int = 0,
    *,
    held_out: int = 0,
    dev: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Synthesize a corpus in `root`: `<split>/<voice>/<voice>_<number>.flac`, a manifest and a README.

    The folder appears when the corpus is complete.

    Args:
        root: a folder that does not exist or is empty. If equal arguments made it already, nothing is done.
        speakers: number of voices, 8 to 80; see choose_voices.
        sentences: how many of the 48 built-in sentences (the seed decides which), or the texts themselves.
        seed: of the choice of voices and sentences.
        held_out: number of sentences (the last ones) for dev and test only; train has the others. With 0, all voices
            say all sentences, and objectives that learn from parallel speech are trained on the texts of the test.
        dev: whether there are dev voices; False: all voices that are held out are test voices.
        progress: called with (voices done, voices in all).

    Returns:
        `root`, for open_corpus.

    Raises:
        UserError: if espeakng-loader is missing, a number is out of range, a text cannot be synthesized, or `root`
            contains other files.
    """
    root = Path(root)
    texts = _texts(sentences, seed)
    if not 0 <= held_out < len(texts):
        raise UserError(f"held_out is {held_out} of {len(texts)} sentences; expected 0 to {len(texts) - 1}")
    evaluation_texts = texts[-held_out:] if held_out else texts
    texts_of = {"train": texts[: len(texts) - held_out], "dev": evaluation_texts, "test": evaluation_texts}
    voices = choose_voices(speakers, seed, dev=dev)
    settings: dict[str, object] = {"recipe": _VERSION, "voices": voices, "texts": texts, "seed": seed}
    if held_out:
        settings["held_out"] = held_out
    if _is_complete(root, settings):
        return root
    sexes = variants()
    root.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}."))
    try:
        splits: dict[str, list[Utterance]] = {split: [] for split in voices}
        done = 0
        for split, names in voices.items():
            for name in names:
                splits[split] += _synthesize_voice(working / split, name, texts_of[split], seed, sexes[name])
                done += 1
                if progress:
                    progress(done, speakers)
        write_manifest(working / MANIFEST_NAME, {s: sorted(us, key=lambda u: u.id) for s, us in splits.items()})
        readme = _README.format(
            speakers=speakers, rate=22050, target=SAMPLE_RATE, level=_LEVEL, count=len(texts), manifest=MANIFEST_NAME,
            seed=seed, who="different ones in train than in dev and test" if held_out else "the same for all voices",
            split=", ".join(f"{len(names)} {split}" for split, names in voices.items()),
        )  # fmt: skip
        write_text(working / "README.md", readme)
        write_json(working / "synth.json", settings)
        working.chmod(0o755)
        if root.is_dir():
            root.rmdir()  # it is empty
        working.replace(root)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise
    return root


def _texts(sentences: int | Sequence[str], seed: int) -> list[str]:
    if isinstance(sentences, int):
        if not 1 <= sentences <= len(SENTENCES):
            raise UserError(f"got {sentences} sentences; expected 1 to {len(SENTENCES)}")
        return sorted(SENTENCES, key=lambda text: hash_fraction(text, seed))[:sentences]
    texts = [text.strip() for text in sentences]
    if not texts or not all(texts):
        raise UserError("sentences is empty or contains an empty text; expected one text or more")
    if len(set(texts)) < len(texts):
        raise UserError("sentences contains a text twice; expected different texts")
    return texts


def _is_complete(root: Path, settings: dict[str, object]) -> bool:
    """Whether `root` contains the corpus with these settings already.

    Raises:
        UserError: if it contains something else.
    """
    if not root.exists():
        return False
    if not root.is_dir():
        raise UserError(f"{root} is a file; expected a new folder for the synthetic speakers")
    try:
        if parse_json((root / "synth.json").read_text()) == settings and (root / MANIFEST_NAME).is_file():
            return True
    except (OSError, ValueError):
        pass
    if any(root.iterdir()):
        raise UserError(f"{root} holds other files, or speakers made with other arguments; give a new or empty folder")
    return False


def _synthesize_voice(parent: Path, name: str, texts: list[str], seed: int, sex: str | None) -> list[Utterance]:
    """Synthesize texts with one voice, as files of a folder in `parent`, the folder of the split."""
    folder = parent / name.replace(" ", "_")
    folder.mkdir(parents=True)
    utterances = []
    with voice(name, seed) as speaker:
        for number, text in enumerate(texts):
            samples = _trim_and_normalize(speaker.say(text), speaker.sample_rate, f"{text!r} with voice {name!r}")
            path = folder / f"{folder.name}_{number:02d}.flac"
            soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16")
            utterances.append(
                Utterance(
                    id=f"{parent.name}/{folder.name}/{path.stem}",
                    path=path,
                    speaker=folder.name,
                    seconds=len(samples) / SAMPLE_RATE,
                    sample_rate=SAMPLE_RATE,
                    text=text,
                    sex=sex,
                    digest=sha256(path.read_bytes()).hexdigest(),
                )
            )
    return utterances


def _trim_and_normalize(samples: np.ndarray, rate: int, what: str) -> np.ndarray:
    """Samples (T,) at `rate` Hz to (T',) at SAMPLE_RATE: silence at both ends trimmed, RMS normalized to `_LEVEL`."""
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max(initial=1e-6))
    if not len(loud) or loud[-1] - loud[0] < 0.5 * rate:
        raise UserError(f"espeak-ng synthesized no speech for {what}")
    margin = round(_MARGIN * rate)
    samples = samples[max(0, loud[0] - margin) : loud[-1] + margin]
    audio = resample(torch.from_numpy(samples.copy()), rate, SAMPLE_RATE).numpy()
    gain = min(_LEVEL / float(np.sqrt(np.mean(np.square(audio)))), _PEAK / float(np.abs(audio).max()))
    return audio * np.float32(gain)
