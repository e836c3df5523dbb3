"""The laws of ``gpu_oracles.py`` on a real GPU; skipped, and counted, where there is none."""

import os
from pathlib import Path

import gpu_oracles
import pytest
from gpu_oracles import Case

pytestmark = [pytest.mark.gpu, pytest.mark.sglang]

BACKENDS = os.environ.get("KVSHARE_GPU_BACKENDS", "triton flashinfer").split()
CASES = [Case(backend, page) for backend in BACKENDS for page in (1, 16)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpu_oracles.make_model(tmp_path_factory.mktemp("models"), small=False)


def test_kernels() -> None:
    from kvshare_sglang.bench.gpu_visit.kernels import KERNELS
    from kvshare_sglang.bench.gpu_visit.table import box_of, measure

    found = measure(KERNELS, box_of("cuda"), lambda so_far: None)
    assert [row for row in found["checks"] if not row["ok"]] == []
    assert found["ok"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.backend}, page {case.page_size}")
@pytest.mark.parametrize("law", ["partial", "choice", "exact", "profiles", "life"])
def test_law(law: str, case: Case, model: Path) -> None:
    assert getattr(gpu_oracles, f"check_{law}")(case, model).failed == []
