"""The same requests through SGLang's own ``sglang.benchmark.serving``, for its familiar figures.

It knows no arrival times: requests come at random (Poisson) at the mean rate of the trace. It
sends a prompt as one message of a chat.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.load.trace import Timed, mean_rate
from kvshare_sglang.bench.processes import signals_ignored, signals_raise, stop_group


def check() -> None:
    """Raise ScriptError, in one line, where SGLang's tool lacks what it needs."""
    if find_spec("datasets") is None:
        raise ScriptError(
            "sglang.benchmark.serving needs the package datasets: run scripts/load_test.sh "
            "--bench-serving, or pip install -r requirements/bench-serving.txt"
        )


def chats(trace: Sequence[Timed]) -> list[dict[str, Any]]:
    """The requests in the form that it reads."""
    out = []
    for one in trace:
        tenant = {} if one.tenant is None else {"extra_key": one.tenant}
        message = {"role": "user", "content": one.prompt}
        out.append(
            {"messages": [message], "max_tokens": one.new_tokens, "temperature": 0, **tenant}
        )
    return out


def drive(url: str, trace: Sequence[Timed], *, tokenizer: Path, timeout_s: float) -> dict[str, Any]:
    """Run it to its end; its own result. What it prints goes to the screen."""
    with tempfile.TemporaryDirectory(prefix="kvshare-load-") as folder, signals_raise():
        requests, out = Path(folder, "requests.jsonl"), Path(folder, "result.jsonl")
        requests.write_text("".join(json.dumps(one) + "\n" for one in chats(trace)))
        rate = mean_rate([one.at_s for one in trace])
        command = [
            *(sys.executable, "-m", "sglang.benchmark.serving"),
            *("--backend", "sglang-oai-chat", "--base-url", url, "--model", str(tokenizer)),
            *("--dataset-name", "openai", "--dataset-path", str(requests)),
            *("--num-prompts", str(len(trace)), "--request-rate", str(rate), "--seed", "0"),
            *("--warmup-requests", "0", "--cache-report", "--output-file", str(out)),
        ]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ScriptError(f"sglang.benchmark.serving took over {timeout_s:.0f} s") from None
        finally:
            with signals_ignored():
                stop_group(process)
        if process.returncode or not out.is_file():
            raise ScriptError(f"sglang.benchmark.serving ended with code {process.returncode}")
        found: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
        return found
