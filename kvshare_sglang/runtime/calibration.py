"""What a model was measured to bear: the file, whose it is, and what a server does with it.

``python -m kvshare_sglang.bench calibrate`` writes it. A server finds it by the model, beside those
that come with the package. Needs neither SGLang nor torch.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from kvshare_sglang import __version__
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.errors import StartError
from kvshare_sglang.policy.select.attention_trace import probe_layer

FORM = "kvshare calibration 1"
RECIPE = 4  # raise it when traces choose otherwise, so that older measurements no longer hold
FOLDER = "KVSHARE_CALIBRATION_DIR"
BUILT_IN = Path(__file__).resolve().parent.parent / "calibrations"
AUTO, OFF, NONE = "auto", "off", "none"  # values of --kvshare-calibration that are no files

# Where a token's margin is below so many times what reuse moves margins by, it is in doubt: of a
# normal error one flip in forty is beyond. With less SmolLM2's answers are not within one point.
DOUBTED = 2.0
TOSS = 0.2  # nats: less is a toss for full prefill too, whose bf16 logits are an eighth apart

# Times the default budget: what requests that ask get of a model that holds no answers yet.
UNMEASURED_BUDGET = 2

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")  # the first kind that is there
_SAMPLES, _SAMPLE = 16, 1 << 16  # so many places of a file are looked at, so many bytes each
_NO_MATTER = ("_name_or_path", "transformers_version")  # of a config.json


class Calibration(NamedTuple):
    """A measured model. ``check``: means over ``prompts`` prompts, by arm (``trace``, ``copies``):
    ``kl`` to full prefill along its continuation, ``agree`` of first tokens. ``budget``: the least
    with which answers stay; ``holds``: whether they were good enough with it. ``depends``: where
    it is better that traces know what the sources attended to, the depth at which, and the budget
    with which answers hold then. ``noise``: by how many nats reuse moves the margin between the two
    likeliest tokens, of a trace without that and of one with it; ``shift``: by what share it moves
    the end of prompts whose margins move so much; each 0 where that was not measured."""

    path: Path
    fingerprint: str
    probe_at: float
    stretch: int
    budget: float
    holds: bool
    prompts: int
    check: dict[str, dict[str, float]]
    depends: tuple[float, float] | None = None
    noise: tuple[float, float] = (0.0, 0.0)
    shift: tuple[float, float] = (0.0, 0.0)


def fingerprint(folder: Path) -> str:
    """16 hex digits that tell model directories apart: config.json, and of each weights file its
    name, its size and some 64 KiB pieces. Not all of the weights is read: two models that differ
    in none of these are taken for one. Milliseconds. Raises OSError, ValueError."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in _NO_MATTER}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for file in _weights(folder):
        with file.open("rb") as content:
            start = _data_start(file, content)
            size = file.stat().st_size - start
            digest.update(f"{file.name} {size}".encode())
            for i in range(_SAMPLES):
                content.seek(start + i * size // _SAMPLES)
                digest.update(content.read(_SAMPLE))
    return digest.hexdigest()[:16]


def folder_of(model: str, revision: str | None = None) -> Path | None:
    """The directory of a model: its own, or where Hugging Face's cache holds it; None where it is
    not on this machine."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # no such name, or not fetched yet
        return None


def home() -> Path:
    """Where calibrations are written and looked for first."""
    return Path(os.environ.get(FOLDER) or Path.home() / ".cache" / "kvshare_sglang" / "calibration")


def file_name(model: str, mark: str) -> str:
    """What the calibration of a model with the fingerprint ``mark`` is called."""
    return f"{model}-{mark}-r{RECIPE}.json"


def as_json(
    model: str, mark: str, *, probe_at: float, stretch: int, budget: float, holds: bool,
    prompts: int, check: dict[str, dict[str, float]],
    depends: dict[str, float] | None = None, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A calibration as its file holds it; ``more`` is for who reads it. ``depends``: ``at`` and
    ``budget``, ``kl`` and ``agree``."""
    return {
        "form": FORM, "recipe": RECIPE, "plugin": __version__, "model": model,
        "fingerprint": mark, "probe_at": probe_at, "stretch": stretch, "budget": budget,
        "holds": holds, "prompts": prompts, "check": check, "depends": depends, **more,
    }  # fmt: skip


def read(path: Path) -> Calibration:
    """Raises StartError, naming the file and what is wrong with it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartError(f"calibration {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise StartError(f"calibration {path} is broken: {error}") from None
    if not isinstance(found, dict) or found.get("form") != FORM:
        raise StartError(f"calibration {path} is none: its form is not {FORM!r}")
    if found.get("recipe") != RECIPE:
        raise StartError(
            f"calibration {path} does not match: it was made by kvshare_sglang"
            f" {found.get('plugin')} (recipe {found.get('recipe')!r}), this is {__version__}"
            f" (recipe {RECIPE})"
        )
    try:
        probe_at, stretch, holds = found["probe_at"], int(found["stretch"]), found["holds"]
        check = {
            arm: {name: float(found["check"][arm][name]) for name in ("kl", "agree")}
            for arm in ("trace", "copies")
        }
        prompts, mark = int(found["prompts"]), str(found["fingerprint"])
        depends = found.get("depends")  # in none that was written before there was such a thing
        if depends is not None:
            check["depends"] = {name: float(depends[name]) for name in ("kl", "agree")}
        shares = {name: found[name] for name in ("probe_at", "budget")}
        shares |= {f"depends {name}": depends[name] for name in ("at", "budget") if depends}
        if depends is not None and not depends["at"]:
            raise ValueError(f"depends at must be above 0, got {depends['at']!r}")
        for name, value in shares.items():
            if isinstance(value, bool) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value!r}")
        noise, shift = (
            (found["check"]["trace"].get(name, 0.0), (depends or {}).get(name, 0.0))
            for name in ("noise", "shift")
        )
        for name, value in (*(("noise", one) for one in noise), *(("shift", one) for one in shift)):
            if isinstance(value, bool) or not 0 <= value <= 100:
                raise ValueError(f"{name} must be in [0, 100], got {value!r}")
        if not isinstance(holds, bool):
            raise ValueError(f"holds must be true or false, got {holds!r}")
    except KeyError as error:
        raise StartError(f"calibration {path} is broken: it lacks {error}") from None
    except (TypeError, ValueError) as error:
        raise StartError(f"calibration {path} is broken: {error}") from None
    budget = float(found["budget"])
    moves, ends = (float(noise[0]), float(noise[1])), (float(shift[0]), float(shift[1]))
    both = None if depends is None else (float(depends["at"]), float(depends["budget"]))
    return Calibration(
        path, mark, float(probe_at), stretch, budget, holds, prompts, check, both, moves, ends
    )


def find(model: str, revision: str | None = None) -> Calibration | None:
    """The calibration of a model among those of this machine and of the package. Raises
    StartError where there is one that is broken."""
    folder = folder_of(model, revision)
    if folder is None:
        return None
    try:
        mark = fingerprint(folder)
    except (OSError, ValueError):
        return None  # no model: what ends the start for it says so better
    for place in (home(), BUILT_IN):
        for path in sorted(place.glob(f"*-{mark}-r{RECIPE}.json")):
            return _of(path, mark, model)
    return None


def named(path: Path, model: str, revision: str | None = None) -> Calibration:
    """The calibration that the user names. Raises StartError unless it is the model's."""
    found = read(path)
    folder = folder_of(model, revision)
    if folder is None or not _weights(folder):
        raise StartError(
            f"calibration {path} cannot be compared: the weights of {model} are not on this"
            " machine yet"
        )
    try:
        mark = fingerprint(folder)
    except (OSError, ValueError) as error:
        raise StartError(f"calibration {path} cannot be compared with {model}: {error}") from None
    return _of(found.path, mark, model)


def settled(
    config: KVShareConfig, *, given: Collection[str], model: str, revision: str | None = None,
    on_cpu: bool = False,
) -> KVShareConfig:  # fmt: skip
    """The config of a server for ``model``, its ``calibration`` now the file that holds, or
    ``none``. Where nothing says that its answers hold, requests that say nothing get no reuse. What
    the user has ``given`` stays. Raises StartError on a file that is broken, or of another model or
    selector. ``on_cpu``: whether it can be kept there what rows attended to."""
    if config.calibration == OFF:
        return config
    if config.select != "trace":  # of these nothing is measured
        if config.calibration not in (AUTO, NONE):
            raise StartError(
                f"--kvshare-calibration {config.calibration} is of --kvshare-select trace, and"
                f" --kvshare-select is {config.select}: drop one"
            )
        config = dataclasses.replace(config, calibration=AUTO)
        return config if "default" in given else dataclasses.replace(config, default="exact")
    if config.calibration in (AUTO, NONE):
        found = find(model, revision) if config.calibration == AUTO else None
    else:
        found = named(Path(config.calibration), model, revision)
    says: dict[str, Any] = {"calibration": NONE if found is None else str(found.path)}
    if found is not None:
        says |= {"probe_at": found.probe_at, "stretch": found.stretch, "budget": found.budget}
    if found is not None and found.depends and on_cpu and "depends_at" not in given:
        says["depends_at"], says["budget"] = found.depends
    elif found is None or not found.holds:
        care = min(1.0, UNMEASURED_BUDGET * config.budget)
        says |= {"default": "exact", "budget": max(care, says.get("budget", 0.0))}
    if found is not None and on_cpu:
        says["doubt"] = doubt_of(found.noise["depends_at" in says])
        says["doubt_shift"] = found.shift["depends_at" in says]
    mine = {name: value for name, value in says.items() if name not in given}
    return dataclasses.replace(config, **{**mine, "calibration": says["calibration"]})


def doubt_of(noise: float) -> float:
    """The margin, in nats, below which a token is in doubt; 0 where reuse adds no more to it than
    what full prefill has itself."""
    doubt = round(DOUBTED * noise, 2)
    return doubt if doubt > TOSS else 0.0


def told(config: KVShareConfig, *, layers: int, model: str) -> tuple[str, bool]:
    """What a server of a settled config says of it at start, and whether that is a warning."""
    layer = f"probe layer {probe_layer(layers, config.probe_at)} of {layers}"
    here = f"{layer}, stretch {config.stretch}, budget {config.budget:g}"
    if config.depends_at and config.select == "trace":
        here += f", what sources attended to in layer {probe_layer(layers, config.depends_at)}"
    if config.doubt:
        here += f", tokens in doubt below {config.doubt:g} nats"
        if config.doubt_shift:
            here += f" or less, all of it where ends of prompts move by {config.doubt_shift:.2g}"
    who = "only requests that ask for it reuse" if config.default == "exact" else "all reuse"
    if config.calibration == OFF:
        return f"KVShare: answers were not looked at: {here}", False
    if config.calibration == AUTO:
        return f"KVShare: {config.select} was not measured, {who} (--kvshare-default)", True
    if config.calibration == NONE:
        return (
            f"KVShare: this model was never measured: {who} (--kvshare-default), with care"
            f" ({here}). Measure it: python -m kvshare_sglang.bench calibrate {model}"
        ), True
    found = read(Path(config.calibration))
    with_sources = found.depends == (config.depends_at, config.budget)
    trace, copies = found.check["depends" if with_sources else "trace"], found.check["copies"]
    said = (
        f"{here}; KL to full prefill {trace['kl']:.2g} (copies alone {copies['kl']:.2g}), the same"
        f" first token in {trace['agree']:.0%} of {found.prompts} prompts"
    )
    if found.holds or with_sources:
        return f"KVShare is calibrated: {said} ({found.path})", False
    return (
        f"KVShare is calibrated, but answers suffered: {who} (--kvshare-default): {said}"
        f" ({found.path})"
    ), True


def _of(path: Path, mark: str, model: str) -> Calibration:
    found = read(path)
    if found.fingerprint != mark:
        raise StartError(
            f"calibration {path} does not match: it is of the model {found.fingerprint}, and"
            f" {model} is {mark} (config.json or weights differ)"
        )
    return found


def _weights(folder: Path) -> list[Path]:
    for kind in _WEIGHTS:
        if found := sorted(folder.glob(kind)):
            return found
    return []


def _data_start(file: Path, content: Any) -> int:
    """Where a safetensors file has its tensors: what is before them differs by who wrote it."""
    if file.suffix != ".safetensors":
        return 0
    return 8 + int.from_bytes(content.read(8), "little")
