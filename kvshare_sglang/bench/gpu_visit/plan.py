"""Which stages a visit has, in order of value, and how long each may take. Knows no SGLang."""

import subprocess
from typing import NamedTuple

STEPS = (
    "env",
    "install",
    "kernels",
    "tune",
    "smoke",
    "misses",
    "ttft",
    "partial",
    "choice",
    "exact",
    "profiles",
    "doubts",
    "life",
    "profile",
)
ASKED = ("tune", "misses")  # run only where they are named
PAGES = (1, 16)
# Each server has 16 GB of weights, 128 KiB of KV a token, and its graphs.
TWO_SERVERS_GIB, THREE_SERVERS_GIB = 70, 110


class Stage(NamedTuple):
    """One thing to do, in a process group of its own, for at most ``limit_s`` seconds.

    ``what``: a step, in this variant: arms of a TTFT run, the choice that is profiled.
    """

    step: str
    limit_s: float
    backend: str = ""
    page: int = 0
    what: str = ""

    @property
    def name(self) -> str:
        parts = [self.step, self.what, self.backend, f"page{self.page}" if self.page else ""]
        return "_".join(part for part in parts if part)

    @property
    def needs_sglang(self) -> bool:
        return self.step not in ("env", "install", "kernels", "tune")

    @property
    def needs_smoke(self) -> bool:
        """Whether it is of no use where no server of the backend starts."""
        return self.needs_sglang and self.step != "smoke"


def stages(
    device: str, backends: list[str], *, gpu_gib: float, ttft: str = "full"
) -> list[list[Stage]]:
    """Groups of stages, one after the other; those of a group run side by side.

    Alone on the machine: whatever is timed. ``backends``: the first is the one that is timed most.
    ``ttft``: "short" is 8k alone, "deep" 8k to 32k, trace and window each beside plain: each
    for a visit of a few minutes.
    """
    first = backends[0]
    pages = PAGES if device != "cpu" else PAGES[:1]
    arms = (
        ["plain-window-trace"] if gpu_gib >= THREE_SERVERS_GIB else ["plain-window", "plain-trace"]
    )
    if device == "cpu":
        arms = ["plain-trace"]
    elif ttft == "short":  # with few tokens the KV of three servers is small
        arms = ["plain-window-trace-short"]
    elif ttft == "deep":
        arms = ["plain-trace-deep", "plain-window-deep"]

    def laws(step: str, limit_s: float) -> list[Stage]:
        return [Stage(step, limit_s, b, page) for b in backends for page in pages]

    groups = [
        [Stage("kernels", 60), Stage("install", 90)],
        # After the kit, whose versions it tells. The first server of a backend waits for its
        # kernels to compile, the GPU idle: time to try shapes of ours.
        [Stage("env", 60), Stage("tune", 60)],
        [Stage("smoke", 200, backend) for backend in backends],
        [Stage("misses", 150, first)],
        *([Stage("ttft", 210, first, what=what)] for what in arms),
        [
            one
            for law in ("partial", "choice", "exact", "profiles", "doubts")
            for one in laws(law, 150)
        ],
        laws("life", 150),
        *([Stage("ttft", 90, backend, what="plain-trace-short")] for backend in backends[1:]),
        *([Stage("profile", 90, first, what=what)] for what in ("trace", "window")),
    ]
    if device != "cpu":
        return groups
    # A rehearsal is no visit: others may use the machine, and nothing depends on how fast it is.
    return [[one._replace(limit_s=10 * one.limit_s) for one in group] for group in groups]


def nvidia_smi(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def gpu_gib() -> float:
    """Memory of the first GPU; 0 without one."""
    lines = nvidia_smi("memory.total").splitlines()
    return int(lines[0]) / 1024 if lines and lines[0].strip().isdigit() else 0.0
