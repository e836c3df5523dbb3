"""What another SGLang changes for us: what we change or rely on, settings, pins, the smoke test.

Started by scripts/next_sglang.sh. Asks both versions the same questions, each in a process of its
own, and writes one page: what broke, what differs, what is new and must be served or refused by
name. The touches are those of ``runtime/hooks.py``, the settings those of ``runtime/support.py``.
"""

import argparse
import inspect
import json
import os
import pkgutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from kvshare_sglang.bench.common import ROOT

SMOKE = "tests/integration/test_server.py"
PINNED = ("torch", "transformers", "flashinfer-python", "triton", "xgrammar")
# Kinds of touches: functions that we wrap, methods that our classes define anew, names that hang
# on SGLang's objects, fields of its batches.
KINDS = ("wrapped", "overridden", "attributes", "fields", "used")
TAKEN = "taken by SGLang"


# ---- what one SGLang says, in its own process --------------------------------------------------


def facts() -> dict[str, Any]:
    """Of the SGLang that is imported: what is there of all that we touch, settings, pins.

    A touch is None where it is gone; one that this version does not need is in ``unneeded``.
    """
    found = nothing()
    for read in (_touches, _cache, _settings):
        try:
            read(found)
        except Exception as error:
            found["errors"].append(f"{read.__name__[1:]}: {brief(error)}")
    for line in metadata.requires("sglang") or ():
        name = line.split(";")[0].split("=")[0].split("<")[0].split(">")[0].split("[")[0].strip()
        if name in PINNED and "extra ==" not in line:
            found["pins"][name] = line.split(";")[0].strip()
    return found


def nothing(*errors: str) -> dict[str, Any]:
    empty: dict[str, Any] = {kind: {} for kind in KINDS}
    lists: dict[str, Any] = {"settings": [], "judged": [], "unneeded": [], "errors": [*errors]}
    return {**empty, **lists, "pins": {}}


def _touches(found: dict[str, Any]) -> None:
    from kvshare_sglang.runtime import hooks

    for point in (*hooks.FLAGS, *hooks.WRAPPED):
        if hooks.is_here(point):
            found["wrapped"][point.target] = _signature_at(*point.target.rsplit(".", 1))
        else:
            found["unneeded"].append(point.target)
    for method in hooks.OVERRIDDEN:
        name = f"{method.owner}.{method.name}"
        if hooks.is_here(method):
            found["overridden"][name] = _signature_at(method.owner, method.name)
        else:
            found["unneeded"].append(name)
    for one in hooks.ATTRIBUTES:
        owner = _find(one.owner)
        free = None if owner is None else TAKEN if hasattr(owner, one.name) else "free"
        found["attributes"][f"{one.owner}.{one.name}"] = free
    batch = _find(hooks._BATCH)
    bases = batch.__mro__ if batch else ()
    names = {name for base in bases for name in inspect.get_annotations(base)}
    for name in hooks.FIELDS:
        found["fields"][f"{hooks._BATCH}.{name}"] = "there" if name in names else None
    for used in hooks.USED:
        name = f"{used.owner}.{used.name}"
        if hooks.is_here(used):
            found["used"][name] = "there" if hooks.is_there(used) else None
        else:
            found["unneeded"].append(name)


def _cache(found: dict[str, Any]) -> None:
    """Our cache class is made over SGLang's as it is imported."""
    import kvshare_sglang.runtime.cache.radix  # noqa: F401


def _settings(found: dict[str, Any]) -> None:
    from sglang.srt.server_args import ServerArgs

    from kvshare_sglang.runtime.support import SETTINGS

    found["judged"] = [setting.name for setting in SETTINGS]
    found["settings"] = sorted(
        {name for base in ServerArgs.__mro__ for name in inspect.get_annotations(base)}
    )


def _find(name: str) -> Any:
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return None


def _signature_at(owner: str, name: str) -> str | None:
    function = getattr(_find(owner), name, None)
    return None if function is None else signature(function)


def signature(function: Any) -> str:
    """Names, kinds and defaults; annotations may change without harm."""
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters)


def brief(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def ask(folder: Path | None) -> dict[str, Any]:
    """``facts`` of the SGLang in ``folder``, or of the installed one."""
    path = ([str(folder)] if folder else []) + [str(ROOT)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-m", "kvshare_sglang.bench.next_sglang", "--facts"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        return nothing((done.stderr.strip().splitlines() or ["no output"])[-1])
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


# ---- the page ----------------------------------------------------------------------------------


def page(
    pinned: str, version: str, old: dict[str, Any], new: dict[str, Any], smoke: str | None
) -> tuple[list[str], bool]:
    """The lines of the page, and whether anything broke. ``smoke``: what failed in it, or None."""
    lost = sorted(set(old["settings"]) - set(new["settings"])) if new["settings"] else []
    broke = [*new["errors"], *(row for kind in KINDS for row in broken(kind, old, new))]
    broke += [
        f"the setting {name}, which we judge, is gone" for name in lost if name in old["judged"]
    ]
    broke += [] if smoke is None else [f"the smoke test failed: {smoke}"]
    changed = [
        f"{name}: ({was}) -> ({now})"
        for kind in ("wrapped", "overridden")
        for name, was in old[kind].items()
        if was is not None and (now := new[kind].get(name)) is not None and was != now
    ]
    pins = [
        f"{new['pins'][name]} (was {old['pins'].get(name, 'unpinned')})"
        for name in sorted(new["pins"])
        if new["pins"][name] != old["pins"].get(name)
    ]
    fresh = sorted(set(new["settings"]) - set(old["settings"]))
    lines = [f"# SGLang {version} against {pinned}", ""]
    for title, rows in (
        ("Broken", broke),
        ("Signatures that changed (harmless while the smoke test passes)", changed),
        ("New settings: serve them, or refuse them by name in runtime/support.py", fresh),
        ("Settings that are gone", lost),
        ("Pins that changed", pins),
    ):
        lines += [f"## {title}: {len(rows) or 'none'}", *(f"- {row}" for row in rows), ""]
    verdict = "something broke" if broke else "nothing broke: run the whole gate on it next"
    return [*lines, f"Verdict: {verdict}."], bool(broke)


def broken(kind: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The touches of one kind that do not hold in ``new``, which needs them."""
    label = {"wrapped": "function", "overridden": "method", "attributes": "attribute"}
    what = label.get(kind, "field" if kind == "fields" else "name")
    out = []
    for name in {**old[kind], **new[kind]}:
        was, now = old[kind].get(name), new[kind].get(name)
        if now == TAKEN:
            out.append(f"the {what} {name} is {TAKEN}")
        elif now is None and (name in new[kind] or was is not None):
            out += [] if name in new["unneeded"] else [f"the {what} {name} is gone"]
    return out


def smoke_test(version: str) -> str | None:
    """Run it on ``version``; None when it passed, else the last lines of its output."""
    env = {**os.environ, "KVSHARE_TRY_SGLANG": version}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", SMOKE, "-k", f"[{version}]"]
    print(f"smoke test on SGLang {version}, about a minute ...", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    if done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout:
        return None
    lines = [
        line for line in done.stdout.splitlines() if line.startswith(("E  ", "FAILED", "ERROR"))
    ]
    return " | ".join(lines[-6:])[:1500] or f"exit status {done.returncode}"


def main() -> int:
    if sys.argv[1:] == ["--facts"]:
        print(json.dumps(facts()))
        return 0
    parser = argparse.ArgumentParser(
        prog="scripts/next_sglang.sh", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("pinned")
    parser.add_argument("version")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    old, new = ask(None), ask(args.folder)
    lines, broke = page(args.pinned, args.version, old, new, smoke_test(args.version))
    print("\n".join(lines))
    path = ROOT / "out" / f"next-sglang-{args.version}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return int(broke)


if __name__ == "__main__":
    sys.exit(main())
