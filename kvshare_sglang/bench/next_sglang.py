"""What another SGLang changes for us: seams, cache methods, settings, pins, and the smoke test.

Started by next_sglang.sh. Asks both versions the same questions, each in a process of its own, and
writes one page: what broke, what differs, what is new and must be served or refused by name.
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

ROOT = Path(__file__).resolve().parent.parent
SMOKE = "tests/integration/test_server.py"
PINNED = ("torch", "transformers", "flashinfer-python", "triton", "xgrammar")


# ---- what one SGLang says, in its own process --------------------------------------------------


def facts() -> dict[str, Any]:
    """Of the SGLang on sys.path: signatures of all that we touch, settings, pins."""
    from kvshare_sglang import hooks

    found: dict[str, Any] = {"seams": {}, "cache": {}, "settings": [], "pins": {}, "errors": []}
    for seam in (*hooks.FLAG_SEAMS, *hooks.SEAMS):
        try:
            found["seams"][seam.target] = signature(pkgutil.resolve_name(seam.target))
        except Exception as error:
            found["seams"][seam.target] = None
            found["errors"].append(f"{seam.target}: {brief(error)}")
    try:
        from kvshare_sglang.cache import FuzzyRadixCache, RadixCache

        # What our cache defines anew; what RadixCache lacks here may be of another version.
        for name in sorted(vars(FuzzyRadixCache)):
            if not name.startswith("__"):
                theirs = getattr(RadixCache, name, None)
                found["cache"][name] = signature(theirs) if callable(theirs) else None
    except Exception as error:
        found["errors"].append(f"our cache class cannot be built: {brief(error)}")
    try:
        from sglang.srt.server_args import ServerArgs

        found["settings"] = sorted(
            {name for base in ServerArgs.__mro__ for name in inspect.get_annotations(base)}
        )
    except Exception as error:
        found["errors"].append(f"ServerArgs: {brief(error)}")
    for line in metadata.requires("sglang") or ():
        name = line.split(";")[0].split("=")[0].split("<")[0].split(">")[0].split("[")[0].strip()
        if name in PINNED and "extra ==" not in line:
            found["pins"][name] = line.split(";")[0].strip()
    return found


def signature(function: Any) -> str:
    """Names, kinds and defaults; annotations may change without harm."""
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters)


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[
        :200
    ]


def ask(folder: Path | None) -> dict[str, Any]:
    """``facts`` of the SGLang in ``folder``, or of the installed one."""
    path = ([str(folder)] if folder else []) + [str(ROOT)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, __file__, "--facts"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"seams": {}, "cache": {}, "settings": [], "pins": {}, "errors": [last]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


# ---- the page ----------------------------------------------------------------------------------


def page(
    pinned: str, version: str, old: dict[str, Any], new: dict[str, Any], smoke: str | None
) -> tuple[list[str], bool]:
    """The lines of the page, and whether anything broke. ``smoke``: what failed in it, or None."""
    from kvshare_sglang import args

    gone = [
        prefix + name
        for group, prefix in (("seams", ""), ("cache", "RadixCache."))
        for name, text in old[group].items()
        if text is not None and new[group].get(name) is None
    ]
    lost = sorted(set(old["settings"]) - set(new["settings"])) if new["settings"] else []
    known = {name for name, *_ in (*args._SERVED, *args._REFUSED)}
    broke = [*new["errors"], *(f"{name} is gone" for name in gone)]
    broke += [f"the setting {name}, which we judge, is gone" for name in lost if name in known]
    broke += [] if smoke is None else [f"the smoke test failed: {smoke}"]
    changed = [
        f"{name}: ({was}) -> ({now})"
        for group in ("seams", "cache")
        for name, was in old[group].items()
        if was is not None and (now := new[group].get(name)) is not None and was != now
    ]
    pins = [f"{new['pins'][name]} (was {old['pins'].get(name, 'unpinned')})"
            for name in sorted(new["pins"])
            if new["pins"][name] != old["pins"].get(name)]  # fmt: skip
    fresh = sorted(set(new["settings"]) - set(old["settings"]))
    lines = [f"# SGLang {version} against {pinned}", ""]
    for title, rows in (
        ("Broken", broke),
        ("Signatures that changed (harmless while the smoke test passes)", changed),
        ("New settings: serve them, or refuse them by name in args.py", fresh),
        ("Settings that are gone", lost),
        ("Pins that changed", pins),
    ):
        lines += [f"## {title}: {len(rows) or 'none'}", *(f"- {row}" for row in rows), ""]
    verdict = "something broke" if broke else "nothing broke: run the whole gate on it next"
    return [*lines, f"Verdict: {verdict}."], bool(broke)


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    if sys.argv[1:] == ["--facts"]:
        print(json.dumps(facts()))
    else:
        sys.exit(main())
