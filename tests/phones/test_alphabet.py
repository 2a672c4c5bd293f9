"""From texts to phones: espeak-ng's phonemes in ARPAbet, and when each of them is spoken."""

from __future__ import annotations

from itertools import groupby, pairwise

import pytest

from snac_core.errors import UserError
from snac_runner.data.espeak import voice
from snac_runner.data.synth import SENTENCES
from snac_runner.evaluate.phone_recogniser import PHONES, from_espeak, phones_of, spans


@pytest.mark.parametrize(
    ("text", "phones"),
    [
        ("The judge", "DH AH JH AH JH"),
        ("ship", "SH IH P"),
        ("thirty years", "TH ER D IY Y IY R Z"),
        ("measure", "M EH ZH ER"),
        ("some money", "S AH M AH N IY"),  # one long M, not two
    ],
)
def test_words_have_the_phones_of_a_pronouncing_dictionary(text: str, phones: str) -> None:
    assert phones_of(text) == tuple(phones.split())


def test_the_built_in_sentences_hold_every_phone_and_no_other() -> None:
    assert {phone for text in SENTENCES for phone in phones_of(text)} == set(PHONES)


def test_punctuation_and_case_change_no_phone() -> None:
    assert phones_of("Seven boats, you know!") == phones_of("seven boats you know")


def test_what_cannot_be_said_is_refused() -> None:
    with pytest.raises(UserError, match="has no phones"):
        phones_of("...")


def test_a_foreign_phoneme_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="'Y~' is not in American English"):
        from_espeak(["s", "Y~"])


@pytest.mark.parametrize("name", ["m1", "shelby", "klatt3"])
def test_a_voice_says_the_phones_of_the_text_in_order_one_after_the_other(name: str) -> None:
    text = SENTENCES[4]
    with voice(name) as speaker:
        samples = speaker.say(text)
        said = spans(speaker.phoneme_starts)
    assert tuple(phone for phone, _ in groupby(phone for phone, _, _ in said)) == phones_of(text)
    assert all(start <= end for _, start, end in said)
    assert all(before[2] <= after[1] for before, after in pairwise(said))
    assert 0 <= said[0][1] < said[-1][2] <= len(samples)


def test_a_faster_voice_says_the_same_in_less_time() -> None:
    lengths = []
    with voice("m1") as speaker:
        for rate in (120, 240):
            speaker.adjust(rate=rate)
            lengths.append(len(speaker.say(SENTENCES[0])))
            assert tuple(p for p, _ in groupby(p for p, _, _ in spans(speaker.phoneme_starts))) == phones_of(
                SENTENCES[0]
            )
    assert lengths[1] < 0.65 * lengths[0]
