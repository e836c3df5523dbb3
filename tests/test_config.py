"""The configuration is checked when it is built, and says what is wrong and what is allowed."""

import dataclasses
import math

import pytest

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.errors import ConfigError, KVShareError, UnsupportedError

FIELDS = dataclasses.fields(KVShareConfig)
NUMBERS = [spec for spec in FIELDS if spec.metadata["lo"] is not None]


def flag(spec):
    return "--kvshare-" + spec.name.replace("_", "-")


def refusal(spec, value):
    """The error that this value of this field gives."""
    with pytest.raises(ConfigError) as caught:
        KVShareConfig(**{spec.name: value})
    assert isinstance(caught.value, KVShareError)
    assert isinstance(caught.value, ValueError)
    return caught.value


@pytest.mark.parametrize("spec", NUMBERS, ids=lambda spec: spec.name)
def test_bounds_are_inclusive_and_anything_past_them_is_refused(spec):
    lo, hi = spec.metadata["lo"], spec.metadata["hi"]
    step = 1 if isinstance(spec.default, int) else 1e-9
    for good in (lo, hi, spec.default):
        assert getattr(KVShareConfig(**{spec.name: good}), spec.name) == good
    for bad in (lo - step, hi + step, -math.inf, math.inf):
        error = refusal(spec, bad)
        assert (error.name, error.value) == (flag(spec), bad)


@pytest.mark.parametrize("spec", NUMBERS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("value", [True, False, math.nan, None, "1", [1], 1j])
def test_what_is_no_number_is_refused(spec, value):
    refusal(spec, value)


@pytest.mark.parametrize("spec", NUMBERS, ids=lambda spec: spec.name)
def test_a_refusal_names_the_flag_the_value_and_the_range(spec):
    lo, hi, kind = spec.metadata["lo"], spec.metadata["hi"], type(spec.default)
    bad = kind(hi + 1)
    message = f"{flag(spec)} must be {kind.__name__} in [{lo:g}, {hi:g}], got {bad}"
    assert str(refusal(spec, bad)) == message


@pytest.mark.parametrize(
    "spec", [s for s in NUMBERS if isinstance(s.default, int)], ids=lambda s: s.name
)
def test_a_fraction_of_a_token_is_refused(spec):
    refusal(spec, 1.5)


@pytest.mark.parametrize("scope", ["group", "global"])
def test_a_scope_that_is_planned_but_not_served_is_refused_with_what_to_drop(scope):
    with pytest.raises(UnsupportedError, match=f"drop --kvshare-scope {scope}"):
        KVShareConfig(scope=scope)


@pytest.mark.parametrize("scope", ["", "Tenant", "everyone", None, 1])
def test_an_unknown_scope_is_refused(scope):
    with pytest.raises(ConfigError, match="--kvshare-scope must be"):
        KVShareConfig(scope=scope)


@pytest.mark.parametrize("name", ["default", "select", "eviction"])
@pytest.mark.parametrize("value", ["", "Auto", "none", None, 1])
def test_an_unknown_choice_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"--kvshare-{name} must be"):
        KVShareConfig(**{name: value})


@pytest.mark.parametrize("spec", NUMBERS, ids=lambda spec: spec.name)
def test_a_whole_number_serves_as_a_share(spec):
    config = KVShareConfig(**{spec.name: math.ceil(spec.metadata["lo"])})
    assert type(getattr(config, spec.name)) is type(spec.default)


def test_any_chunk_bounds_in_range_are_in_order():
    least, target, most = (
        next(spec.metadata for spec in FIELDS if spec.name == f"chunk_{name}")
        for name in ("min", "target", "max")
    )
    assert 1 <= least["lo"] <= least["hi"] <= target["lo"] <= target["hi"] <= most["lo"]


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        KVShareConfig().budget = 0.5


def test_every_option_says_what_it_does():
    assert all(spec.metadata["help"] for spec in FIELDS)
