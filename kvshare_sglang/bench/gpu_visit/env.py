"""What the stages of a visit run in: environment variables, a kit, the plug-in's entry point."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
# The package, and the labs and laws of the tests.
IMPORTED = (ROOT, ROOT / "tests" / "bench" / "gpu", ROOT / "tests" / "integration")
# What the servers, the labs and the bench import that not every machine has.
NEEDED = (
    "torch sglang transformers tokenizers numpy xxhash rapidfuzz httpx tqdm fastapi uvicorn zmq"
).split()

_PROBE = """
import importlib.util, json, sys
from importlib import metadata
lacks = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
found = metadata.entry_points(group="sglang.srt.plugins")
print(json.dumps({"lacks": lacks, "plugin": any(one.name == "kvshare" for one in found)}))
"""


def base(device: str, scratch: Path) -> dict[str, str]:
    """For every stage. What the caller has set stays, and so does what a kit sets."""
    env = {**os.environ, "TMPDIR": str(scratch / "tmp")}
    for name in ("KVSHARE_LAUNCHER", "KVSHARE_MEASURE_ALL_ROWS"):
        env.pop(name, None)
    env["PYTHONPATH"] = joined(":".join(map(str, IMPORTED)), env.get("PYTHONPATH"))
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        return {**quiet, "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", **env}
    flashinfer = {
        # The paged wrapper alone: the ragged one compiles another set of kernels on Hopper, which
        # takes minutes. A kit that carries them built sets 0.
        "SGLANG_FLASHINFER_USE_PAGED": "1",
        # Some of its modules leave symbols open that are never called: bind them when called.
        "FLASHINFER_EXTRA_LDFLAGS": "-Wl,-z,lazy",
    }
    return {**quiet, **flashinfer, **env}


def with_kit(env: dict[str, str], site_env: Path) -> dict[str, str]:
    """The environment after a kit's ``site.env``, a file of shell assignments."""
    command = ["bash", "-c", 'set -a; . "$1"; exec env -0', "-", str(site_env)]
    done = subprocess.run(command, env=env, capture_output=True, check=True)
    pairs = (part.partition("=") for part in done.stdout.decode().split("\0") if part)
    return {name: value for name, _, value in pairs}


def probe(env: dict[str, str]) -> tuple[list[str], bool]:
    """Which modules this Python lacks, and whether SGLang finds the plug-in."""
    command = [sys.executable, "-c", _PROBE, *NEEDED]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    return told["lacks"], told["plugin"]


def write_metadata(folder: Path) -> None:
    """The installed package's metadata, as far as SGLang looks for it: it finds the plug-in by
    its entry points, in whatever process it starts, though nothing is installed here."""
    setup = (ROOT / "setup.py").read_text()
    version = re.search(r'version="(.+?)"', setup)
    entries = re.findall(r'"(sglang\..+?)": \["(.+?)"\]', setup)
    if version is None or not entries:
        raise RuntimeError("setup.py names no version or no entry point")
    info = folder / f"kvshare_sglang-{version[1]}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: kvshare-sglang\nVersion: {version[1]}\n"
    (info / "METADATA").write_text(text)
    points = "".join(f"[{group}]\n{entry}\n" for group, entry in entries)
    (info / "entry_points.txt").write_text(points)


def joined(first: str, rest: str | None) -> str:
    return f"{first}:{rest}" if rest else first
