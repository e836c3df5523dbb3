"""Every touch on SGLang is in the table, and the live check names each that is gone."""

import builtins
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvshare_sglang.runtime import hooks, versions

RUNTIME = Path(hooks.__file__).parent


@pytest.fixture
def without_wrappers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions count as wrapped: here it is about all other touches."""
    monkeypatch.setattr(hooks, "applied", lambda point: True)


def test_nothing_else_is_missing_in_the_sglang_that_is_installed(without_wrappers: None) -> None:
    assert hooks.missing() == []


def test_a_method_that_is_gone_is_named(
    without_wrappers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.mem_cache.radix_cache import RadixCache

    monkeypatch.delattr(RadixCache, "_split_node")
    (gone,) = hooks.missing()
    assert gone.endswith("RadixCache._split_node")


def test_a_name_that_sglang_took_is_named(
    without_wrappers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.managers.schedule_batch import Req

    monkeypatch.setattr(Req, "kvshare", None, raising=False)
    (gone,) = hooks.missing()
    assert "Req.kvshare (SGLang has one of its own)" in gone


def test_what_else_we_use_is_named_when_it_is_gone(
    without_wrappers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    monkeypatch.delattr(RotaryEmbedding, "_compute_cos_sin_cache")
    (gone,) = hooks.missing()
    assert gone.endswith("RotaryEmbedding._compute_cos_sin_cache")


def test_a_field_that_is_gone_is_named(
    without_wrappers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "FIELDS", ("input_ids", "no_such_field"))
    (gone,) = hooks.missing()
    assert gone.endswith("ForwardBatch.no_such_field")


def test_a_method_of_another_version_is_not_asked_for(
    without_wrappers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "sglang_version", lambda: (0, 5, 21))
    gone = hooks.missing()  # of the installed one, read as if it were older
    older = ("cache_unfinished_req", "insert_req", "prefix_indices")
    assert {name.rsplit(".", 1)[1] for name in gone} == set(older)


def methods_of(cls: type) -> set[str]:
    return {name for name, value in vars(cls).items() if callable(value)}


def test_every_method_that_our_cache_defines_over_sglangs_is_in_the_table() -> None:
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
    from sglang.srt.mem_cache.radix_cache import RadixCache

    from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache

    theirs = {name for cls in (RadixCache, BasePrefixCache) for name in vars(cls)}
    mine = {name for name in methods_of(FuzzyRadixCache) & theirs if not name.startswith("__")}
    listed = {one.name for one in hooks.OVERRIDDEN if one.owner.endswith("RadixCache")}
    assert mine <= listed


def test_every_method_that_our_attention_defines_is_in_the_table() -> None:
    from kvshare_sglang.runtime.attention import partial_class

    class Backend:
        pass

    listed = {one.name for one in hooks.OVERRIDDEN if one.owner.endswith("AttentionBackend")}
    assert methods_of(partial_class(Backend)) == listed


def test_no_other_attribute_hangs_on_sglangs_objects() -> None:
    """One name for all: whatever is set under another one would show here."""
    names = {one.name for one in hooks.ATTRIBUTES}
    found: set[str] = set()
    for path in RUNTIME.rglob("*.py"):
        found |= set(re.findall(r"\.(_?kvshare\w*) = ", path.read_text(encoding="utf-8")))
    # The table of cos and sin is set past torch's own attribute check.
    assert found | {"kvshare_table"} == names


def test_every_hook_of_ours_has_its_point() -> None:
    """A function named hook_* that no entry names would be dead, or touch SGLang unseen."""
    named = {point.ours.split(":")[1] for point in (*hooks.FLAGS, *hooks.WRAPPED, *hooks.DOORS)}
    defined: set[str] = set()
    for path in RUNTIME.rglob("*.py"):
        defined |= set(re.findall(r"^def (hook_\w+)\(", path.read_text(encoding="utf-8"), re.M))
    assert defined == named


# What SGLang's updater does that leaves the weights of the model that answers as they are.
_NO_NEW_WEIGHTS = frozenset(
    "flush_cache_after_weight_update record_weight_version_after_update begin_weight_update"
    " init_weights_update_group destroy_weights_update_group get_weights_by_name check_weights"
    " release_memory_occupation resume_memory_occupation save_remote_model"
    " save_sharded_model".split()
)


def test_no_way_to_replace_weights_goes_past_us() -> None:
    """Each is wrapped, or calls what is."""
    from sglang.srt.managers.scheduler_components.weight_updater import (
        SchedulerWeightUpdaterManager,
    )

    owner = f"{SchedulerWeightUpdaterManager.__module__}.SchedulerWeightUpdaterManager"
    wrapped = {point.target for point in hooks.WRAPPED}
    functions = vars(SchedulerWeightUpdaterManager)
    ways = {name for name in methods_of(SchedulerWeightUpdaterManager) if name[0] != "_"}
    for name in ways - _NO_NEW_WEIGHTS:
        calls = {f"{owner}.{called}" for called in functions[name].__code__.co_names}
        assert wrapped & (calls | {f"{owner}.{name}"}), name


def test_a_point_of_another_version_is_neither_wrapped_nor_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (point,) = (one for one in hooks.WRAPPED if one.target.endswith(".end_weight_update"))
    assert not hooks.applied(point)
    monkeypatch.setattr(versions, "sglang_version", lambda: (0, 5, 20))
    hooks.register((point,))
    assert hooks.applied(point)
    monkeypatch.undo()
    assert not hooks.applied(point)


def test_types_of_attributes_exist() -> None:
    import kvshare_sglang.config
    from kvshare_sglang.runtime import attention, batch, doubt, request
    from kvshare_sglang.runtime.cache import index_sync

    rooms: Any = SimpleNamespace(**{"torch.Tensor": True})
    modules = (builtins, kvshare_sglang.config, attention, batch, doubt, request, index_sync)
    for module in modules:
        vars(rooms).update(vars(module))
    assert all(hasattr(rooms, one.holds) for one in hooks.ATTRIBUTES)
