"""The voice variants of espeak-ng that serve as speakers.

The 104 variants of espeak-ng 1.52 each said three sentences, and the GE2E cosine between them was measured. Left out
are the two that only whisper (no pitch), every one within 0.95 of a held-out voice (RicishayMax2 is RicishayMax3 at
0.98), and the later of two within 0.97 of each other (steph2 and steph). No two held-out voices are nearer than 0.89.
They are held out whatever is asked for: a model trained on synthetic speech has never heard them.
"""

from __future__ import annotations

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
