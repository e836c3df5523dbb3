"""A calibration is its model's and no other's; what it says holds where the user said nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvshare_sglang.bench import smollm2
from kvshare_sglang.bench.models import READER
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.errors import StartError
from kvshare_sglang.runtime import calibration, launch

CHECK = {"trace": {"kl": 0.01, "agree": 0.97}, "copies": {"kl": 0.1, "agree": 0.7}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory: no weights are read for more than their bytes."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "_name_or_path": "here"}))
    header = b'{"a": 1}'
    weights = bytes(range(256)) * 8192
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weights)
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(calibration.FOLDER, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return calibration.home()


def write(path: Path, mark: str, **more: Any) -> Path:
    made = calibration.as_json(
        "model", mark, probe_at=0.4, stretch=2, budget=0.2, holds=True, prompts=30, check=CHECK
    )
    path.write_text(json.dumps({**made, **more}))
    return path


def of(model: Path | str, *, device: str = "cpu", **flags: Any) -> KVShareConfig:
    """The config that a server gets."""
    values = {"kvshare": True, "model_path": str(model), "device": device}
    values |= {f"kvshare_{name}": value for name, value in flags.items()}
    config = launch.config_from(values, eviction_given=False)
    assert config is not None
    return config


def test_a_model_is_known_by_its_config_and_its_weights(model: Path, tmp_path: Path) -> None:
    mark = calibration.fingerprint(model)
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    (copy / "tokenizer.json").write_text("{}")
    (copy / "config.json").write_text(json.dumps({"_name_or_path": "there", "hidden_size": 8}))
    assert calibration.fingerprint(copy) == mark
    weights = copy / "model.safetensors"
    data = weights.read_bytes()
    # the same tensors, written with another header
    weights.write_bytes((9).to_bytes(8, "little") + b'{"a": 1} ' + data[16:])
    assert calibration.fingerprint(copy) == mark
    weights.write_bytes(data[:-1])
    assert calibration.fingerprint(copy) != mark
    changed = bytearray(data)
    changed[16 + len(data) // 2] ^= 1  # the first byte of a piece that is read
    weights.write_bytes(changed)
    assert calibration.fingerprint(copy) != mark
    weights.write_bytes(data)
    assert calibration.fingerprint(copy) == mark
    (copy / "config.json").write_text(json.dumps({"hidden_size": 16}))
    assert calibration.fingerprint(copy) != mark


def test_what_was_measured_holds_and_what_the_user_says_wins(model: Path, home: Path) -> None:
    mark = calibration.fingerprint(model)
    path = write(home / calibration.file_name("model", mark), mark)
    plain = KVShareConfig()
    for config in (of(model), of(model, calibration=str(path))):
        assert (config.probe_at, config.stretch, config.budget) == (0.4, 2, 0.2)
        assert config.calibration == str(path)
    # the user's word wins, also where it is the default's
    assert of(model, probe_at=plain.probe_at).probe_at == plain.probe_at
    assert of(model, budget=plain.budget).budget == plain.budget
    assert of(model, calibration="off") == KVShareConfig(calibration="off")


def test_a_token_is_in_doubt_by_what_reuse_moves_margins_by(model: Path, home: Path) -> None:
    mark = calibration.fingerprint(model)
    path = home / calibration.file_name("model", mark)

    def found(noise: float, **more: Any) -> KVShareConfig:
        check = {**CHECK, "trace": {**CHECK["trace"], "noise": noise}}
        write(path, mark, check=check, **more)
        return of(model)

    assert found(0.3).doubt == 0.6
    assert "tokens in doubt below 0.6 nats" in calibration.told(of(model), layers=9, model="x")[0]
    assert of(model, doubt=0.0).doubt == 0.0
    assert of(model, device="cuda").doubt == 0.0  # it waits for the device: opt in
    assert found(0.1).doubt == 0.0  # a toss for full prefill too
    depends = {"at": 0.69, "budget": 0.2, "kl": 0.01, "agree": 0.9}
    assert found(0.3, depends={**depends, "noise": 0.2}).doubt == 0.4
    assert found(0.3, depends=depends).doubt == 0.0  # written before that was measured
    assert found(0.3).doubt_shift == 0.0  # the same
    assert found(0.3, depends={**depends, "noise": 0.2, "shift": 0.13}).doubt_shift == 0.13
    assert of(model, doubt_shift=0.5).doubt_shift == 0.5
    assert of(model, device="cuda").doubt_shift == 0.0
    said = calibration.told(of(model), layers=9, model="x")[0]
    assert "below 0.4 nats or less, all of it where ends of prompts move by 0.13" in said
    for bad in (-1, True, "x", float("nan")):
        with pytest.raises(StartError, match=r"is broken: .*noise|is broken: '<='"):
            found(bad)
        with pytest.raises(StartError, match=r"is broken: .*shift|is broken: '<='"):
            found(0.3, depends={**depends, "shift": bad})


def test_a_model_that_was_never_measured_reuses_only_where_asked_to_and_with_care(
    model: Path, home: Path
) -> None:
    plain = KVShareConfig()
    config = of(model)
    assert (config.probe_at, config.budget, config.default) == (0.5, 2 * plain.budget, "exact")
    said, is_warning = calibration.told(config, layers=30, model="some/model")
    assert is_warning
    assert "\n" not in said
    assert "probe layer 14 of 30, stretch 6, budget 0.3" in said
    assert said.endswith("python -m kvshare_sglang.bench calibrate some/model")
    assert "never measured: only requests that ask for it reuse (--kvshare-default)" in said
    given = of(model, default="auto")
    assert (given.default, given.budget) == ("auto", 2 * plain.budget)
    said, is_warning = calibration.told(given, layers=30, model="some/model")
    assert is_warning
    assert "never measured: all reuse" in said
    given = of(model, probe_at=plain.probe_at, budget=plain.budget)
    assert (given.probe_at, given.budget) == (plain.probe_at, plain.budget)
    assert of(model, budget=0.8).budget == 0.8
    # nothing of a trace is measured for those that choose otherwise
    assert of(model, select="window") == KVShareConfig(select="window", default="exact")
    assert of(model, select="dhd", default="auto") == KVShareConfig(select="dhd")
    path = write(home / "m.json", calibration.fingerprint(model))
    with pytest.raises(StartError, match=r"m\.json is of --kvshare-select trace, .* is dhd: drop"):
        of(model, select="dhd", calibration=str(path))
    said, is_warning = calibration.told(of(model, select="dhd"), layers=30, model="x")
    assert is_warning
    assert "dhd was not measured, only requests that ask for it reuse" in said


def test_a_model_whose_answers_suffered_is_as_one_that_was_never_measured(
    model: Path, home: Path
) -> None:
    mark = calibration.fingerprint(model)
    write(home / calibration.file_name("model", mark), mark, holds=False)
    config = of(model)
    assert (config.probe_at, config.budget) == (0.4, 2 * KVShareConfig().budget)
    write(home / calibration.file_name("model", mark), mark, holds=False, budget=0.5)
    assert of(model).budget == 0.5
    config = of(model)
    assert config.default == "exact"
    said, is_warning = calibration.told(config, layers=30, model="x")
    assert is_warning
    assert "answers suffered: only requests that ask for it reuse" in said
    assert "probe layer 12 of 30" in said


def test_what_sources_attended_to_is_known_where_it_was_better_and_can_be_kept(
    model: Path, home: Path
) -> None:
    mark = calibration.fingerprint(model)
    depends = {"at": 0.7, "budget": 0.15, "kl": 0.002, "agree": 0.99}
    write(home / calibration.file_name("model", mark), mark, depends=depends)
    config = of(model)
    assert (config.depends_at, config.budget, config.default) == (0.7, 0.15, "auto")
    said, is_warning = calibration.told(config, layers=31, model="x")
    assert not is_warning
    assert "budget 0.15, what sources attended to in layer 21; KL to full prefill 0.002" in said
    # elsewhere, or where the user says no, it is as if there were no such thing
    for config in (of(model, device="cuda"), of(model, depends_at=0.0)):
        assert (config.depends_at, config.budget) == (0.0, 0.2)
        said, _ = calibration.told(config, layers=31, model="x")
        assert "what sources attended to" not in said
        assert "KL to full prefill 0.01" in said
    assert of(model, budget=0.4).budget == 0.4
    said, _ = calibration.told(of(model, budget=0.4), layers=31, model="x")
    assert "KL to full prefill 0.01" in said  # with this budget it was not measured
    # nor where other selectors choose
    for more in ({"enable_lora": True}, {"lora_paths": ["a"]}, {"kv_cache_dtype": "fp8_e5m2"}):
        values = {"kvshare": True, "model_path": str(model), "device": "cpu", **more}
        config = launch.config_from(values, eviction_given=False)
        assert config is not None
        assert (config.depends_at, config.budget) == (0.0, 0.2)
    # answers that suffer without it hold with it
    write(home / calibration.file_name("model", mark), mark, depends=depends, holds=False)
    assert (of(model).default, of(model).budget) == ("auto", 0.15)
    assert of(model, device="cuda").default == "exact"
    assert not calibration.told(of(model), layers=31, model="x")[1]
    # and where it was no better the file says so
    write(home / calibration.file_name("model", mark), mark, depends=None)
    assert of(model).depends_at == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"fingerprint": "0" * 16}, "it is of the model 0000000000000000, and .* is "),
        (
            {"recipe": 0},
            f"made by kvshare_sglang .*recipe 0.*, this is .*recipe {calibration.RECIPE}",
        ),
        ({"form": "a recipe for soup"}, "is none: its form is not"),
        ({"probe_at": 2}, "probe_at must be in \\[0, 1\\], got 2"),
        ({"probe_at": None}, "is broken"),
        ({"budget": 1.5}, "budget must be in \\[0, 1\\], got 1.5"),
        ({"holds": "yes"}, "holds must be true or false, got 'yes'"),
        ({"check": {}}, "lacks 'trace'"),
        ({"check": None}, "is broken"),
        ({"prompts": "many"}, "is broken"),
        ({"stretch": "far"}, "is broken"),
        ({"depends": {"at": 0.5}}, "lacks 'kl'"),
        ({"depends": 0.5}, "is broken"),
        ({"depends": {"at": 0, "budget": 0.1, "kl": 0, "agree": 1}}, "at must be above 0, got 0"),
        (
            {"depends": {"at": 3, "budget": 0.1, "kl": 0, "agree": 1}},
            "depends at must be in \\[0, 1\\], got 3",
        ),
    ],
)
def test_a_file_that_is_broken_or_of_another_model_ends_the_start(
    model: Path, tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    path = write(tmp_path / "mine.json", calibration.fingerprint(model), **change)
    with pytest.raises(StartError, match=why) as ended:
        of(model, calibration=str(path))
    assert str(path) in str(ended.value)
    assert "\n" not in str(ended.value)


def test_a_file_that_cannot_be_read_ends_the_start(model: Path, home: Path, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"none\.json cannot be read: No such file"):
        of(model, calibration=str(tmp_path / "none.json"))
    with pytest.raises(StartError, match="weights of no-such-model are not on this machine"):
        of("no-such-model", calibration=str(write(tmp_path / "m.json", "0")))
    # one that was found is no less broken
    mark = calibration.fingerprint(model)
    (home / calibration.file_name("model", mark)).write_text('{"form"')
    with pytest.raises(StartError, match="is broken"):
        of(model)


def test_the_calibrations_that_come_with_the_package_are_of_their_models() -> None:
    found = calibration.find(str(READER))
    assert found is not None
    assert found.holds
    assert found.path.parent == calibration.BUILT_IN
    names = {path.name.rsplit("-", 2)[0] for path in calibration.BUILT_IN.glob("*.json")}
    assert names == {"reader", "smollm2"}
    made = smollm2.MODELS / smollm2.NAME
    if made.is_dir():
        found = calibration.find(str(made))
        assert found is not None
        assert found.path.name.startswith("smollm2-")
