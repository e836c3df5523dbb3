"""TTFT, nothing to reuse and TPOT of a visit: which servers ttft starts on which card."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvshare_sglang.bench.gpu_visit.plan import TWO_SERVERS_GIB, gpu_gib

# Longest prompts early: if time runs out, the shorter ones are missed less.
SIZES = (8192, 32768, 16384, 4096)
# Of SGLang's own list, those that the prompts and their partial batches need: each takes time at
# start. Longer batches run eagerly, as by default.
GRAPHS = (*range(64, 1025, 64), *range(1280, 4097, 256), *range(4608, 8193, 512))
FIGURES = ("prompts", "arm", "ttft_p50_s", "ttft_plain_p50_s", "ratio_plain", "iqr", "ceiling",
           "computed_share", "merged_tokens")  # fmt: skip


def run(
    numbers: Path, device: str, backend: str, what: str, note: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run the bench; ``note`` is told what there is whenever it has written."""
    arms = [word for word in what.split("-") if word not in ("short", "deep")]
    extent = what.rpartition("-")[2]
    if device != "cpu" and (gib := gpu_gib()) < TWO_SERVERS_GIB:
        need = f"two servers of an 8B model need {TWO_SERVERS_GIB} GiB of GPU memory"
        return {"ok": False, "error": f"{need}, here are {gib:.0f}"}
    numbers.unlink(missing_ok=True)
    options = on_cpu() if device == "cpu" else on_gpu(backend, arms, extent)
    words = ["--json", str(numbers), "--arms", ",".join(arms), *options]
    command = [sys.executable, "-m", "kvshare_sglang.bench", "ttft", *words]
    bench = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    seen = ""
    while bench.poll() is None:
        time.sleep(0.5)
        text = numbers.read_text() if numbers.exists() else ""
        if text != seen:
            seen = text
            note({"ok": False, "command": command[1:], "figures": figures(numbers)})
    found = {"ok": bench.returncode == 0, "command": command[1:], "figures": figures(numbers)}
    if bench.returncode:
        found["error"] = f"the bench ended with code {bench.returncode}"
    return found


def figures(numbers: Path) -> dict[str, Any]:
    """The part of a result that a summary shows; empty before there is one."""
    if not numbers.exists():
        return {}
    result = json.loads(numbers.read_text())
    rows = [{key: row[key] for key in FIGURES if key in row} for row in result["rows"]]
    return {"rows": rows, "miss": result["miss"], "tpot": result["tpot"]}


def on_cpu() -> list[str]:
    """A rehearsal: the same code in a small shape."""
    return [
        *("--device", "cpu", "--model", "replay-5m", "--sizes", "512", "--repeats", "1"),
        *("--miss-pairs", "2", "--tpot", "1", "--chunk", "2048", "--plain-chunk", "2048"),
        *("--threads", "1", "--plain-threads", "1", "--max-total-tokens", "4096"),
    ]


def on_gpu(backend: str, arms: list[str], extent: str) -> list[str]:
    """The shape of an 8B model. Chunks are as large as the prompts: longer ones are never traced,
    and plain gets the same, so that one set of servers does for everything."""
    short, deep = extent == "short", extent == "deep"
    full, traced = not (short or deep), "trace" in arms
    sizes = {"short": SIZES[:1], "deep": SIZES[:3]}.get(extent, SIZES)
    longest = max(sizes)
    server = (
        f"--attention-backend {backend} --sampling-backend pytorch"
        # The servers start side by side and each sees what the others took: the number of tokens,
        # not this share, is what bounds their memory.
        f" --mem-fraction-static 0.85 --max-prefill-tokens {longest}"
        f" --context-length {longest + 4096}"
        " --cuda-graph-max-bs-decode 8 --cuda-graph-bs-prefill " + " ".join(map(str, GRAPHS))
    )
    return [
        *("--device", "cuda", "--model", "llama-8b", "--dummy-weights"),
        *("--budget", "0.05,0.15,0.3" if deep and traced else "0.05"),
        *("--sizes", ",".join(map(str, sizes))),
        *("--reused", "0.98,0.9" if full else "0.98"),
        *("--repeats", "2" if short else "3"),
        *(("--miss-pairs", "60", "--tpot", "2") if full or traced else ("--miss-pairs", "0")),
        *("--chunk", str(longest), "--plain-chunk", str(longest)),
        *("--threads", "4", "--plain-threads", "4"),
        *("--max-total-tokens", str(int(2.3 * longest))),
        *(f"--server-arg={word}" for word in server.split()),
    ]
