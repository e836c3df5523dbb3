"""What a scheduler's shadow does beside its twins: who switches reuse off, and what opens it."""

import pytest

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.shadow import LEAST, Twin
from kvshare_sglang.runtime.report import Report
from kvshare_sglang.runtime.shadow import Shadow


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("last", ["twins", "hand"])
def test_new_weights_switch_on_what_twins_switched_off_and_nothing_else(
    share: float, last: str
) -> None:
    shadow = Shadow(KVShareConfig(shadow=share), Report())
    assert shadow.default == "auto"
    if last == "twins":
        for i in range(LEAST):
            shadow._judge(Twin(False, 9.0, i))
    else:
        shadow.switch(on=False)
    assert shadow.default == "exact"
    shadow.new_weights()
    assert shadow.default == ("auto" if last == "twins" else "exact")
    shadow.switch(on=True)
    shadow.new_weights()
    assert shadow.default == "auto"
