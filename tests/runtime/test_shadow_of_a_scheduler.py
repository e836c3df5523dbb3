"""What a scheduler's shadow does beside its twins: who switches reuse off, and what opens it."""

import dataclasses
from types import SimpleNamespace

import pytest

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.shadow import LEAST, Twin
from kvshare_sglang.runtime.report import Report
from kvshare_sglang.runtime.shadow import Shadow, _may_run


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


# Of SGLang's updater, what says nothing of the weights; the last is there with ``offload_tags``.
_NO_STATE = ("scheduler", "metrics_collector", "tp_cpu_group", "stashed_model_static_state")


def test_no_twin_runs_in_a_state_in_which_the_weights_are_not_whole() -> None:
    """Whatever else SGLang's updater remembers between two calls says that they are not."""
    from sglang.srt.managers.scheduler_components.weight_updater import (
        SchedulerWeightUpdaterManager,
    )

    states = {
        field.name
        for field in dataclasses.fields(SchedulerWeightUpdaterManager)
        if field.default is not dataclasses.MISSING
        or field.default_factory is not dataclasses.MISSING
    }.difference(_NO_STATE)
    assert states >= {"offload_tags"}

    def may_run(*, idle: bool = True, **state: object) -> bool:
        updater = SimpleNamespace(**{**dict.fromkeys(states), **state})
        return _may_run(SimpleNamespace(weight_updater=updater, is_fully_idle=lambda: idle))

    assert may_run()
    assert not may_run(idle=False)
    assert not any(may_run(**{name: {"weights"}}) for name in states)
