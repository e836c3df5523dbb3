"""A whole visit, rehearsed without a GPU: the real SGLang, the real bench, small shapes."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.sglang


def test_a_visit_measures_checks_and_tells(tmp_path: Path) -> None:
    words = ("--device", "cpu", "--steps", "env,kernels,smoke,ttft", "--seconds", "3600")
    done = subprocess.run(
        [ROOT / "scripts" / "gpu_visit.sh", "run", tmp_path, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["ok"]
    assert found["versions"]["sglang"]
    assert found["commit"]
    verdicts = {name: stage["verdict"] for name, stage in found["stages"].items()}
    ttft = "ttft_plain-trace_torch_native"
    assert verdicts == dict.fromkeys(["env", "kernels", "smoke_torch_native", ttft], "ok")
    table = found["figures"]["kernels"]["rows"]
    assert {row["kernel"] for row in table} >= {"copy and rotate", "scattered rows"}
    assert all(row["of_ceiling"] > 0 for row in table)
    (row,) = found["figures"][ttft]["rows"]
    assert row["arm"] == "trace"
    assert row["ratio_plain"] > 0
    assert found["figures"][ttft]["miss"]["ttft_ratio_p50"] > 0
    assert {one["arm"] for one in found["figures"][ttft]["tpot"]} == {"plain", "trace"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.tgz", "summary.json"]
    with tarfile.open(tmp_path / "results.tgz") as tar:
        assert {f"{ttft}.numbers.json", "kernels.json", f"{ttft}.log"} <= set(tar.getnames())
