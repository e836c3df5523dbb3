"""One stage of a visit, in a process of its own: what it found goes to ``SCRATCH/<stage>.json``.

Labs start processes that import the main script again: nothing here loads torch or sglang before
a stage needs it.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from kvshare_sglang.bench.gpu_visit.env import ROOT
from kvshare_sglang.bench.gpu_visit.pack import commit_of
from kvshare_sglang.bench.gpu_visit.plan import Stage, nvidia_smi
from kvshare_sglang.bench.gpu_visit.results import write_json

PACKAGES = ("torch", "triton", "sglang", "sglang-kernel", "flashinfer-python", "transformers")

Note = Callable[[dict[str, Any]], None]


def run(stage: Stage, scratch: Path, device: str) -> None:
    """Do it; the JSON is written whatever happens, short of a crash, and while the stage runs."""
    begun = time.perf_counter()
    last: dict[str, Any] = {}

    def note(found: dict[str, Any]) -> None:
        last.update(found)
        seconds = round(time.perf_counter() - begun, 1)
        write_json(
            scratch / f"{stage.name}.json", {"stage": stage.name, **last, "seconds": seconds}
        )

    try:
        note(_work(stage, scratch, device, note))
    except BaseException as error:
        note({"ok": False, "error": f"{type(error).__name__}: {error}"[-2000:]})
        traceback.print_exc()


def _work(stage: Stage, scratch: Path, device: str, note: Note) -> dict[str, Any]:
    """What the stage found: at least ``ok``."""
    if stage.step == "env":
        return facts(device)
    if stage.step == "kernels":
        from kvshare_sglang.bench.gpu_visit import kernels, table

        return table.measure(kernels.KERNELS, table.box_of(device), note)
    if stage.step == "tune":
        from kvshare_sglang.bench.gpu_visit import table, tune

        return tune.run(table.box_of(device), note)
    if stage.step == "ttft":
        from kvshare_sglang.bench.gpu_visit import ttft

        numbers = scratch / f"{stage.name}.numbers.json"
        return ttft.run(numbers, device, stage.backend, stage.what, note)
    if stage.step == "misses":
        from kvshare_sglang.bench.gpu_visit import misses

        return misses.run(device, stage.backend)
    if stage.step == "profile":
        from kvshare_sglang.bench.gpu_visit import profile

        return profile.run(device, stage.backend, stage.what)
    import gpu_oracles as oracles  # of the tests: see env.py

    model = oracles.make_model(scratch / "models", small=device == "cpu")
    case = oracles.Case(stage.backend, stage.page or 1, device)
    return dict(getattr(oracles, f"check_{stage.step}")(case, model).to_json())


def facts(device: str) -> dict[str, Any]:
    """The card, the driver, and the versions of all that takes part."""
    import torch

    found: dict[str, Any] = {
        "device": device,
        "versions": {name: _version(name) for name in PACKAGES}
        | {"python": sys.version.split()[0]},
        "cuda of torch": torch.version.cuda,
        "commit": commit_of(ROOT),
        "cores": len(os.sched_getaffinity(0)),
        "nvidia-smi": nvidia_smi("name,driver_version,memory.total,memory.used,clocks.max.sm"),
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found["card"] = card.name
        found["compute capability"] = f"{card.major}.{card.minor}"
        found["memory_gib"] = round(card.total_memory / 2**30, 1)
        found["multiprocessors"] = card.multi_processor_count
    elif device != "cpu":
        return {"ok": False, "error": "torch sees no GPU", "figures": found}
    return {"ok": True, "figures": found}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
