"""The voice variants of espeak-ng that serve as speakers.

The 104 variants of espeak-ng 1.52 each said three sentences, and the GE2E cosine between them was measured. Left out
are the two that only whisper (no pitch), every one within 0.95 of a held-out voice (RicishayMax2 is RicishayMax3 at
0.98), and the later of two within 0.97 of each other (steph2 and steph). No two held-out voices are nearer than 0.89.
They are held out whatever is asked for: a model trained on synthetic speech has never heard them.


What the synthetic speakers say: 48 sentences, written for this project, that hold every phoneme of English.

Each takes two and a half to four seconds to say, so that a whole sentence, with its text, fits into one conversion.


A parallel corpus of synthetic speakers with known text, in a folder that is split by voice."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import soundfile
import torch

from snac_core.errors import UserError
from snac_core.files import write_json, write_text
from snac_runner.data.audio import resample
from snac_runner.data.corpus import Utterance, position
from snac_runner.data.espeak import variants, voice
from snac_runner.data.formats import NAME, write_manifest

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
FEWEST, MOST = 8, len(HELD_OUT) + 64
_LEVEL = 0.06  # RMS of every utterance, re full scale: loudness shall not tell voices apart
_PEAK = 0.95
_MARGIN = 0.05  # s of quiet kept around the speech
_RECIPE = 1  # of what is written for equal arguments
_README = """# {speakers} synthetic speakers

Spoken by espeak-ng {rate} Hz, resampled to {target} Hz, 16 bit, RMS {level}. {count} sentences, {who}:
a parallel corpus with known text. Split by voice: {train} train, {dev} dev, {test} test; the voices of dev and test are
never in train, whatever the number of speakers. `{manifest}` names each file's voice, split, text and, where the
voice's definition says it, sex. Made with speakers={speakers}, seed={seed}; equal arguments make equal files.
"""


def choose_voices(speakers: int, seed: int = 0) -> dict[str, list[str]]:
    """Split -> voices: half of the speakers held out, at most 16, a third of those (rounded up) for dev.

    8 speakers are 4 train, 2 dev and 2 test; 24 are 12, 4 and 8; 80 are 64, 6 and 10. The seed decides which voices.
    With more speakers no voice changes its split.

    Raises:
        UserError: if the number is not in 8 .. 80.
    """
    if not FEWEST <= speakers <= MOST:
        raise UserError(f"{speakers} synthetic speakers were asked for; {FEWEST} to {MOST} are possible")
    held = min(len(HELD_OUT), speakers // 2)
    dev = -(-held // 3)
    apart = sorted(HELD_OUT, key=lambda name: position(name, seed))
    train = sorted(TRAIN, key=lambda name: position(name, seed))
    return {"train": train[: speakers - held], "dev": apart[:dev], "test": apart[len(apart) - (held - dev) :]}


def synthesize(
    root: str | Path,
    speakers: int = 24,
    sentences: int | Sequence[str] = 18,
    seed: int = 0,
    *,
    held_out: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Speak a corpus into `root`: `<split>/<voice>/<voice>_<number>.flac`, manifest, README; whole or not at all.

    Args:
        root: a folder that is not there yet, or empty, or that these very arguments made (then nothing is done).
        speakers: how many, 8 to 80; see choose_voices.
        sentences: how many of the 48 built-in sentences (the seed decides which), or the texts themselves.
        seed: of the choice of voices and sentences.
        held_out: how many of the sentences, the last ones, the voices of dev and test say, and nobody else; those of
            train say the others. 0: all say all, and what learns from parallel speech has heard the words of the test.
        progress: called with (voices done, of how many).

    Returns:
        `root`, to be opened with open_corpus.

    Raises:
        UserError: if espeakng-loader is missing, a number is out of range, a text cannot be spoken, or `root` holds
            something else.
    """
    root = Path(root)
    texts = _texts(sentences, seed)
    if not 0 <= held_out < len(texts):
        raise UserError(f"{held_out} of {len(texts)} sentences were to be held out; expected 0 to {len(texts) - 1}")
    apart = texts[-held_out:] if held_out else texts
    said = {"train": texts[: len(texts) - held_out], "dev": apart, "test": apart}
    chosen = choose_voices(speakers, seed)
    made_with: dict[str, object] = {"recipe": _RECIPE, "voices": chosen, "texts": texts, "seed": seed}
    if held_out:
        made_with["held_out"] = held_out
    if _is_made(root, made_with):
        return root
    sexes = variants()
    root.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}."))
    try:
        splits: dict[str, list[Utterance]] = {split: [] for split in chosen}
        done = 0
        for split, names in chosen.items():
            for name in names:
                folder, spoken = working / split / name.replace(" ", "_"), said[split]
                splits[split] += _speak(folder, name, split, spoken, seed, sexes[name])
                done += 1
                if progress:
                    progress(done, speakers)
        write_manifest(working / NAME, {split: sorted(us, key=lambda u: u.id) for split, us in splits.items()})
        counts = {split: len(names) for split, names in chosen.items()}
        about = _README.format(
            speakers=speakers, rate=22050, target=SAMPLE_RATE, level=_LEVEL, count=len(texts), manifest=NAME, seed=seed,
            who="those of dev and test by no voice of train" if held_out else "the same by all voices", **counts,
        )  # fmt: skip
        write_text(working / "README.md", about)
        write_json(working / "synth.json", made_with)
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
            raise UserError(f"{sentences} sentences were asked for; 1 to {len(SENTENCES)} are built in")
        return sorted(SENTENCES, key=lambda text: position(text, seed))[:sentences]
    texts = [text.strip() for text in sentences]
    if not texts or not all(texts):
        raise UserError("no sentences, or an empty one, to speak")
    if len(set(texts)) < len(texts):
        raise UserError("the same sentence is given twice")
    return texts


def _is_made(root: Path, made_with: dict[str, object]) -> bool:
    """Whether `root` is what these arguments make.

    Raises:
        UserError: if it is something else.
    """
    if not root.exists():
        return False
    if not root.is_dir():
        raise UserError(f"{root} is a file; expected a new folder for the synthetic speakers")
    try:
        if json.loads((root / "synth.json").read_text()) == made_with and (root / NAME).is_file():
            return True
    except (OSError, ValueError):
        pass
    if any(root.iterdir()):
        raise UserError(f"{root} holds other files, or speakers made with other arguments; give a new or empty folder")
    return False


def _speak(folder: Path, name: str, split: str, texts: list[str], seed: int, sex: str | None) -> list[Utterance]:
    """All texts in one voice, as files in `folder`."""
    folder.mkdir(parents=True)
    spoken = []
    with voice(name, seed) as speaker:
        for number, text in enumerate(texts):
            samples = _finished(speaker.say(text), speaker.sample_rate, f"voice {name!r}, {text!r}")
            path = folder / f"{folder.name}_{number:02d}.flac"
            soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16")
            spoken.append(
                Utterance(
                    id=f"{split}/{folder.name}/{path.stem}",
                    path=path,
                    speaker=folder.name,
                    seconds=len(samples) / SAMPLE_RATE,
                    sample_rate=SAMPLE_RATE,
                    text=text,
                    sex=sex,
                    digest=sha256(path.read_bytes()).hexdigest(),
                )
            )
    return spoken


def _finished(samples: np.ndarray, rate: int, what: str) -> np.ndarray:
    """Samples (T,) at `rate` Hz to (T',) at SAMPLE_RATE: without the quiet at both ends, at the common level."""
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max(initial=1e-6))
    if not len(loud) or loud[-1] - loud[0] < 0.5 * rate:
        raise UserError(f"espeak-ng made no speech of {what}")
    margin = round(_MARGIN * rate)
    samples = samples[max(0, loud[0] - margin) : loud[-1] + margin]
    audio = resample(torch.from_numpy(samples.copy()), rate, SAMPLE_RATE).numpy()
    gain = min(_LEVEL / float(np.sqrt(np.mean(np.square(audio)))), _PEAK / float(np.abs(audio).max()))
    return audio * np.float32(gain)
