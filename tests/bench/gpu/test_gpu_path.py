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
    ("law", "page", "attention"),
    [
        ("partial", 1, "auto"),
        ("partial", 16, "backend"),  # ranges of rows as requests; in chunks, mixed with decoding
        ("choice", 16, "auto"),
        ("choice", 1, "backend"),
        ("exact", 16, "auto"),
        ("profiles", 1, "auto"),
        ("doubts", 16, "auto"),
    ],
)
def test_law(law: str, page: int, attention: str, model: Path) -> None:
    case = Case("triton", page, "cpu", attention)
    assert getattr(gpu_oracles, f"check_{law}")(case, model).failed == []
