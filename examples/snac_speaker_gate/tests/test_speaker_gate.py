"""The tests of the plugin: the conformance kit of snac_core."""

from snac_speaker_gate import SpeakerGate

from snac_core.testing import check_strategy


def test_the_gate_conforms_to_every_rule():
    failed = [str(result) for result in check_strategy(SpeakerGate, compiled=True) if not result.passed]
    assert not failed, "\n".join(failed)
