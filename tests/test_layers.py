"""Imports only go down: ``LAYERS`` and ``RUNTIME_ORDER``. Names are used; none is a machine's."""

import ast
import collections
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "kvshare_sglang"

FLOOR = {f"{PACKAGE}.errors", f"{PACKAGE}.config", f"{PACKAGE}.plan"}
PURE = f"{PACKAGE}.radix_fuzzy"
POLICY = f"{PACKAGE}.policy"
KERNELS = f"{PACKAGE}.kernels"
RUNTIME = f"{PACKAGE}.runtime"
SIM = f"{PACKAGE}.sim"
WIRE = f"{PACKAGE}.wire"
ROUTER = f"{PACKAGE}.router"

# What each room may import beside the standard library and itself. A name stands for all below
# it. The three rooms over the floor are siblings: none imports another.
LAYERS = {
    PACKAGE: FLOOR,  # the root __init__: importing the package costs nothing
    f"{PACKAGE}.errors": set(),
    f"{PACKAGE}.config": {f"{PACKAGE}.errors"},
    f"{PACKAGE}.plan": {"numpy"},
    WIRE: {"msgspec", "zmq", *FLOOR},
    PURE: {"numpy", "xxhash", "rapidfuzz", *FLOOR},
    POLICY: {"numpy", *FLOOR},
    KERNELS: {"torch", "triton", "flashinfer", "numpy", *FLOOR},
    SIM: {"torch", "numpy", "transformers", "simpy", PURE, POLICY, KERNELS, *FLOOR},
    RUNTIME: {
        *("sglang", "torch", "numpy", "prometheus_client", "pydantic", "huggingface_hub"),
        *("msgspec", "zmq", "yaml", WIRE),  # SGLang reads its own files of options by yaml
        *(PURE, POLICY, KERNELS, *FLOOR),
    },
    # A process of its own, without SGLang and without torch.
    ROUTER: {
        *("numpy", "xxhash", "blake3", "zmq", "aiohttp", "starlette", "uvicorn", "orjson"),
        *("transformers", "prometheus_client", "msgspec", "yarl"),
        *(WIRE, PURE, POLICY, *FLOOR),
    },
    f"{PACKAGE}.plugin": {RUNTIME},
    f"{PACKAGE}.__main__": {"sglang"},
    # Over all rooms: nothing imports it.
    f"{PACKAGE}.bench": {
        *("torch", "sglang", "transformers", "tokenizers", "numpy", "rapidfuzz"),
        *("httpx", "tqdm", "matplotlib", "psutil", "prometheus_client"),
        *("gguf", "safetensors"),  # to convert a model with real weights
        *("lab", "gpu_oracles"),  # of the tests: a visit to a GPU machine runs them
        *(PURE, POLICY, KERNELS, SIM, RUNTIME, ROUTER, WIRE, *FLOOR),
    },
}
# The order inside runtime, from the bottom up: a module imports only from rows above its own.
RUNTIME_ORDER = (
    ("versions", "report", "calibration"),
    ("hooks", "request"),
    ("batch", "doors", "cache.eviction", "cache.index_sync", "shadow"),
    ("profiles",),
    (
        "attention",
        "copying",
        "probe",
        "slices",
        "cache.sources",
        "cache.branches",
        "cache.copies",
    ),
    ("cache.queue", "cache.pins", "trace_graphs", "carry", "felt"),
    ("cache.retain", "repair"),
    ("cache.radix",),
    ("support", "stream"),
    ("charging",),
    ("scheduler", "trace_on_device"),
    ("attention_trace", "dhd"),
    ("prefill", "decode", "doubt"),
    ("forward", "preflight"),
    ("launch",),
)


def _imports(tree: ast.AST, *, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each import, those inside functions and by string too."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                if level:  # one dot is the package that the module is in
                    parts = module.split(".")
                    above = parts[: len(parts) - level + is_package]
                    source = ".".join([*above, source] if source else above)
                yield from ((node.lineno, f"{source}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def _is_within(name: str, layers: set[str]) -> bool:
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)


def violations(root: Path) -> list[str]:
    """Say each import under ``root`` that does not go down."""
    found = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        is_package = path.name == "__init__.py"
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if is_package else parts)
        layer = module if module in LAYERS else ".".join(parts[:2])
        if layer not in LAYERS:
            found.append(f"{path.relative_to(root)}: {layer} belongs to no layer")
            continue
        allowed = LAYERS[layer] | ({layer} if layer != PACKAGE else set())
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for line, name in _imports(tree, module=module, is_package=is_package):
            is_light = name.split(".")[0] in sys.stdlib_module_names
            if not (is_light or _is_within(name, allowed) or name == f"{PACKAGE}.__version__"):
                found.append(f"{path.relative_to(root)}:{line}: {layer} imports {name}")
    return found


def test_imports_only_go_down():
    assert violations(ROOT) == []


def _typing_only(tree: ast.AST) -> set[int]:
    """Lines under ``if TYPE_CHECKING``: imports there exist for the reader alone."""
    return {
        line.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for line in ast.walk(node)
        if hasattr(line, "lineno")
    }


def test_runtime_keeps_its_inner_order():
    """Late imports count; only those for type checking and the strings of the hook table do not."""
    floor = {name: i for i, names in enumerate(RUNTIME_ORDER) for name in names}
    found = []
    for path in sorted((ROOT / PACKAGE / "runtime").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / PACKAGE / "runtime").with_suffix("").parts)
        if path.name == "__init__.py":
            continue
        assert name in floor, f"{name} has no place in RUNTIME_ORDER"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        skip = _typing_only(tree)
        module = f"{RUNTIME}.{name}"
        for line, target in _imports(tree, module=module, is_package=False):
            inside = target.removeprefix(f"{RUNTIME}.")
            below = [other for other in floor if inside == other or inside.startswith(other + ".")]
            if target.startswith(RUNTIME) and line not in skip:
                found += [
                    f"{name}:{line} imports {other}"
                    for other in below
                    if floor[other] >= floor[name]
                ]
    assert found == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("policy/routing.py", "def choose():\n    import torch\n"),
        ("policy/routing.py", "import importlib\nimportlib.import_module('torch')\n"),
        (
            "policy/routing.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n",
        ),
        ("policy/routing.py", "from kvshare_sglang.kernels import ops\n"),
        ("policy/routing.py", "from kvshare_sglang import plugin\n"),
        ("policy/routing.py", "from kvshare_sglang.radix_fuzzy import tree\n"),
        ("kernels/ops.py", "from kvshare_sglang.radix_fuzzy import tree\n"),
        ("sim/engine.py", "from kvshare_sglang.runtime import report\n"),
        ("sim/engine.py", "import sglang\n"),
        ("runtime/batch.py", "from kvshare_sglang.sim import engine\n"),
        ("runtime/batch.py", "from kvshare_sglang.bench import common\n"),
        ("sim/engine.py", "from kvshare_sglang.bench import common\n"),
        ("bench/ttft.py", "import requests\n"),
        ("radix_fuzzy/tree.py", "from kvshare_sglang.policy import eviction\n"),
        ("radix_fuzzy/tree.py", "from ..policy.eviction import score\n"),
        ("radix_fuzzy/tree.py", "from .. import policy\n"),
        ("radix_fuzzy/__init__.py", "from ..cache import FuzzyRadixCache\n"),
        ("radix_fuzzy/tree.py", "import torch\n"),
        ("kernels/ops.py", "import sglang.srt.utils\n"),
        ("kernels/ops.py", "from ..policy import routing\n"),
        ("errors.py", "from .config import KVShareConfig\n"),
        ("config.py", "import numpy as np\n"),
        ("__init__.py", "from .plugin import register\n"),
        ("__init__.py", "import numpy\n"),
        ("extras/new.py", "import json\n"),
    ],
)
def test_an_import_that_goes_up_is_found(tmp_path, path, source):
    file = tmp_path / PACKAGE / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "policy/routing.py",
            "import heapq\nimport numpy as np\nfrom ..plan import Rows\n",
        ),
        ("policy/routing.py", "from . import views\nfrom kvshare_sglang import __version__\n"),
        ("radix_fuzzy/__init__.py", "from .tree import Tree\nfrom ..errors import KVShareError\n"),
        ("radix_fuzzy/deep/er.py", "from ..tree import Tree\nimport rapidfuzz.distance\n"),
        ("kernels/ops.py", "import torch\nfrom kvshare_sglang.plan import Run\n"),
        ("runtime/batch.py", "import sglang\nfrom ..kernels import ops\n"),
        ("sim/engine.py", "import torch\nfrom ..policy.select import base\n"),
        ("bench/ttft.py", "import httpx\nfrom ..runtime import hooks\nfrom . import common\n"),
    ],
)
def test_an_import_that_goes_down_is_allowed(tmp_path, path, source):
    file = tmp_path / PACKAGE / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert violations(tmp_path) == []


def test_importing_the_plugin_leaves_torch_out():
    code = f"import sys, {PACKAGE}.plugin; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr or "torch was imported"


@pytest.mark.parametrize("module", ["bench", "bench.gpu_visit.__main__"])
def test_importing_the_bench_needs_nothing_that_a_machine_may_lack(module):
    code = f"import sys, {PACKAGE}.{module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    others = set(done.stdout.split()) & {"torch", "sglang", "numpy", "tqdm", "httpx", "xxhash"}
    assert others == set()


def test_no_file_edits_the_search_path_of_modules():
    edit = re.compile(r"\bsys\.path\s*(\.(insert|append|extend)\b|\[.*\]\s*=[^=]|\+?=[^=])")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in (PACKAGE, "scripts", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if edit.search(line)
    ]
    assert found == []


def test_each_name_of_a_module_is_used_somewhere():
    """A table of cases that no test reads is a test that cannot fail."""
    by_name = ("test_", "Test", "pytest_", "break_", "check_", "_", "pytestmark")  # put together
    folders = (PACKAGE, "scripts", "tests", "examples")
    files = [ROOT / "setup.py", *(p for f in folders for p in sorted((ROOT / f).rglob("*.py")))]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    words = collections.Counter(w for text in texts.values() for w in re.findall(r"\w+", text))
    found = []
    for path, text in texts.items():
        for node in ast.parse(text).body:
            names: list[str] = []
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                names = [] if node.decorator_list else [node.name]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [one.id for one in targets if isinstance(one, ast.Name)]
            for name in names:
                if words[name] == 1 and not name.startswith(by_name):
                    found.append(f"{path.relative_to(ROOT)}: {name}")
    assert found == []


def test_no_file_names_the_machine_it_was_written_on():
    # joined here, so that this file does not hold the words it looks for
    words = ["/wo" + "rk/"] + [
        ".".join(host)
        for host in (
            ("pypi", "org"),
            ("files", "pythonhosted", "org"),
            ("download", "pytorch", "org"),
            ("registry", "npmjs", "org"),
        )
    ]
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], capture_output=True, cwd=ROOT
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        if path.is_file():  # a deleted file stays listed until it is staged
            content = path.read_bytes()
            found += [f"{name}: {word}" for word in words if word.encode() in content]
    assert found == []
