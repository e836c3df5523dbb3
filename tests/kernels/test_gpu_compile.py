"""What the compiler makes of the kernels for GPUs: they fit, do not spill, and read widely."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HOPPER = 90
PRODUCTS = ("attend", "profile", "lse", "mass")
# A sum for each head or distance, and pairs that lie side by side: narrower, and of few bytes or of
# no model that is served.
NARROW = ("merge of sums", "mean", "copy, gpt-j")
# Bytes of shared memory that a program may have: A100, RTX 3090, H100, B200.
SHARED = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    env.pop("TRITON_INTERPRET", None)
    env["PYTHONPATH"] = f"{ROOT}:{env.get('PYTHONPATH', '')}"
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))]
    done = subprocess.run(
        [*command, *map(str, SHARED)],
        capture_output=True, text=True, check=False, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def of_a_common_model(made):
    return [one for one in made if one["dtype"] == "bfloat16" and one["dim"] == 128]


def test_every_kernel_fits_every_card(made):
    assert [one for one in made if one["shared"] > SHARED[one["arch"]]] == []


def test_every_kernel_there_is_was_compiled(made):
    """Those that a card has in the package, by their names in the source."""
    folder = ROOT / "kvshare_sglang" / "kernels" / "gpu"
    texts = [path.read_text() for path in folder.glob("*.py")]
    launched = {name for text in texts for name in re.findall(r"\b(_\w+)\[", text)}
    known = {
        "_attend": "attend",
        "_merge": "merge",
        "_given": "profile",
        "_mean": "mean",
        "_lse": "lse",
        "_merge_lse": "merge of sums",
        "_mass": "mass",
        "_copy": "copy",
    }
    assert launched & set(re.findall(r"def (_\w+)", "".join(texts))) == set(known)
    for arch in SHARED:
        assert set(known.values()) <= {one["kernel"] for one in made if one["arch"] == arch}


def test_nothing_spills_where_it_was_measured(made):
    """Elsewhere a few registers may: what shapes are best there nobody has seen."""
    common = of_a_common_model(made)
    assert [one for one in common if one["spills"] > (0 if one["arch"] == HOPPER else 16)] == []


def test_memory_is_read_sixteen_bytes_at_a_time(made):
    common = [one for one in of_a_common_model(made) if one["kernel"] not in NARROW]
    assert [one for one in common if one["loads of 2 bytes"]] == []
    assert [one for one in common if not one["loads of 16 bytes"]] == []


def test_products_run_on_tensor_cores(made):
    products = [one for one in of_a_common_model(made) if one["kernel"] in PRODUCTS]
    hopper = [one for one in products if one["arch"] == HOPPER]
    assert len(hopper) == 4
    assert [one for one in hopper if not one["wgmma"]] == []
    assert [one for one in products if one["arch"] == 80 and not one["mma"]] == []
