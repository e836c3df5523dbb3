"""The path that GPUs take holds the laws, without a GPU: SGLang's server on its own triton backend,
its kernels and ours in Triton's interpreter. What that cannot show: graphs, FlashInfer, speed."""

import importlib.util
from pathlib import Path

import gpu_oracles
import pytest
from gpu_oracles import Case

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpu_oracles.make_model(tmp_path_factory.mktemp("models"), small=True)


@pytest.mark.parametrize(
    ("law", "page", "attention", "most_ranges"),
    [
        ("partial", 1, "auto", 1024),
        ("partial", 16, "backend", 1024),  # ranges of rows as requests; in chunks, mixed
        ("choice", 16, "auto", 1024),
        ("choice", 1, "backend", 1024),
        ("choice", 1, "backend", 8),  # fewer than a trace takes: rows between run too
        ("exact", 16, "auto", 1024),
        ("exact", 1, "backend", 8),
        ("profiles", 1, "auto", 1024),
        ("doubts", 16, "auto", 1024),
        ("doubts", 1, "backend", 8),
    ],
)
def test_law(law: str, page: int, attention: str, most_ranges: int, model: Path) -> None:
    case = Case("triton", page, "cpu", attention, most_ranges)
    assert getattr(gpu_oracles, f"check_{law}")(case, model).failed == []
