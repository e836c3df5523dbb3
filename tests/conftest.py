"""What all tests share: how hard Hypothesis looks, and which tests this machine can run."""

import importlib.util
import os

import pytest
from hypothesis import settings

settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if "CI" in os.environ else "dev")
)


def _why_not(marker: str) -> str | None:
    """Why tests with this marker cannot run here."""
    if marker == "sglang" and importlib.util.find_spec("sglang") is None:
        return "SGLang is not installed"
    if marker == "gpu":
        import torch  # here, so that a run of pure tests never loads it

        if not torch.cuda.is_available():
            return "no GPU"
    if marker == "weights":
        from kvshare_sglang.bench import smollm2

        if not (smollm2.MODELS / smollm2.NAME / smollm2.STAMP).is_file():
            return "SmolLM2 is not here: python -m kvshare_sglang.bench.smollm2 fetches it"
    return None


# The files that take 20 to 300 seconds, longest first: two workers that take whole files end
# together.
LONG = (
    "test_doors_launch.py",
    "test_gpu_path.py",
    "test_doors_requests.py",
    "test_server.py",
    "test_visit.py",
    "test_doubt.py",
    "test_life.py",
    "test_memory_over_time.py",
    "test_conversation.py",
    "test_doors_together.py",
    "test_exact_stays_exact.py",
    "test_conversations.py",
    "test_driver.py",
    "test_reader.py",
    "test_check.py",
    "test_partial_prefill.py",
    "test_any_length.py",
    "test_refresh.py",
    "test_schedule.py",
    "test_reports.py",
    "test_mutations.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    for marker in ("sglang", "gpu", "weights"):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (why := _why_not(marker)):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=why))
