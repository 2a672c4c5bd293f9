"""The conformance kit: rules for plugins, each measured, with advice on what to change.

    from snac_core.testing import check_strategy

    def test_my_strategy_conforms():
        failed = [result for result in check_strategy(MyStrategy) if not result.passed]
        assert not failed, failed

`preflight` checks an arm with its real codec and losses before it is trained.
"""

from snac_core.testing.encoders import check_speaker_encoder
from snac_core.testing.fixtures import Fixtures, small_codec
from snac_core.testing.metrics import check_metric
from snac_core.testing.preflight import preflight
from snac_core.testing.results import RuleResult
from snac_core.testing.strategies import check_strategy, strategy_results

__all__ = [
    "Fixtures",
    "RuleResult",
    "check_metric",
    "check_speaker_encoder",
    "check_strategy",
    "preflight",
    "small_codec",
    "strategy_results",
]
