"""A visit to a GPU machine: what travels, what comes back, and what a failure may not cost."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from gpu_probes import parts_of, summed_up

from kvshare_sglang.bench.gpu_visit import __main__ as gpu_visit
from kvshare_sglang.bench.gpu_visit import env as visit_env
from kvshare_sglang.bench.gpu_visit.pack import PackError, of_kit, pack
from kvshare_sglang.bench.gpu_visit.plan import STEPS, Stage, stages
from kvshare_sglang.bench.gpu_visit.results import tail, write_archive
from kvshare_sglang.bench.gpu_visit.run import How, Visit, marked

ROOT = Path(__file__).resolve().parents[2]

# ---- pack ----------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """A small checkout with a list, and a kit beside it."""
    root = tmp_path / "root"
    for name, size in {
        "a/one.py": 100,
        "a/__pycache__/one.pyc": 9000,
        "b.txt": 50,
        "c.bin": 4000,
    }.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * size)
    (root / "list").write_text("# what travels\na\n*.txt  # a glob\n")
    kit = tmp_path / "kit"
    kit.mkdir()
    (kit / "install.sh").write_text("true\n")
    (kit / "big.whl").write_bytes(b"x" * 2000)
    return root


def names(folder):
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}


def test_what_the_list_names_travels_and_nothing_else(tree, tmp_path):
    carry = tmp_path / "carry"
    for _ in range(2):  # what was packed before goes
        told = pack(tree, tree / "list", carry, kit=tmp_path / "kit", limit=10_000)
        assert "4 files" in told
        assert names(carry) == {
            "a/one.py", "b.txt", "kit/install.sh", "kit/big.whl", "commit.txt", ".gitignore"
        }  # fmt: skip
        (carry / "a" / "old.py").write_text("")
    assert (carry / "commit.txt").read_text().strip() == "unknown"


def test_too_much_is_refused_with_value_limit_and_the_largest_before_anything_is_written(
    tree, tmp_path
):
    (tmp_path / "kit" / "big.whl").write_bytes(b"x" * (2 * 2**20 + 100_000))
    told = r"2\.1 MiB would travel, the limit is 1\.0 MiB; largest: kit/big\.whl \(2\.1 MiB\)"
    with pytest.raises(PackError, match=told):
        pack(tree, tree / "list", tmp_path / "carry", kit=tmp_path / "kit", limit=2**20)
    assert not (tmp_path / "carry").exists()


def test_a_folder_that_holds_something_else_is_left_alone(tree, tmp_path):
    with pytest.raises(PackError, match="holds something that was not packed here"):
        pack(tree, tree / "list", tree, kit=None, limit=10_000)
    assert (tree / "b.txt").exists()


def test_a_line_that_names_nothing_and_a_kit_without_its_script_are_refused(tree, tmp_path):
    (tree / "list").write_text("a\nno-such-file\n")
    with pytest.raises(PackError, match=r"list, line 2: nothing matches 'no-such-file'"):
        pack(tree, tree / "list", tmp_path / "carry", kit=None, limit=10_000)
    with pytest.raises(PackError, match=r"--kit must be a folder with an install\.sh"):
        of_kit(tree)


def test_the_real_list_holds_all_that_a_visit_imports_and_is_small(tmp_path):
    carry = tmp_path / "carry"
    pack(ROOT, ROOT / "scripts" / "gpu_visit.list", carry, kit=None, limit=2 * 2**20)
    help_text = subprocess.run(
        [carry / "scripts" / "gpu_visit.sh", "run", "--help"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "", "PYTHON": sys.executable},
    ).stdout  # fmt: skip
    assert "--seconds" in help_text
    for name in (
        "tests/bench/gpu/gpu_oracles.py",
        "tests/integration/lab.py",
        "kvshare_sglang/bench/models/llama-8b.json",
    ):
        assert (carry / name).is_file()


# ---- the plan ------------------------------------------------------------------------------------


def test_every_step_can_be_asked_for_alone_and_names_are_unique():
    for device, backends in (("cpu", ["torch_native"]), ("cuda", ["flashinfer", "triton"])):
        for gib in (0.0, 80.0, 140.0):
            flat = [s for group in stages(device, backends, gpu_gib=gib) for s in group]
            assert {stage.step for stage in flat} == set(STEPS)
            assert len({stage.name for stage in flat}) == len(flat)
            assert all("/" not in stage.name for stage in flat)


def test_an_unknown_step_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        gpu_visit.parse(["run", "out", "--steps", "kernels,nothing"])
    assert "got nothing" in capsys.readouterr().err
    args = gpu_visit.parse(["run", "out", "--steps", "kernels,ttft", "--device", "cpu"])
    assert args.steps == ["kernels", "ttft"]


def test_the_entry_point_written_on_the_spot_is_the_installed_one(tmp_path):
    visit_env.write_metadata(tmp_path)
    (found,) = importlib.metadata.Distribution.discover(path=[str(tmp_path)])
    installed = importlib.metadata.distribution("kvshare-sglang").entry_points
    told = {(entry.group, entry.name, entry.value) for entry in found.entry_points}
    assert told == {(entry.group, entry.name, entry.value) for entry in installed}
    assert ("sglang.srt.plugins", "kvshare", "kvshare_sglang.plugin:register") in told


def test_a_kit_sets_what_it_likes_and_the_rest_stays(tmp_path):
    site = tmp_path / "site.env"
    site.write_text('export A=1\nB="$HOME/two"\nexport PYTHONPATH=/x${PYTHONPATH:+:$PYTHONPATH}\n')
    env = visit_env.with_kit({"HOME": "/h", "PYTHONPATH": "/y", "PATH": os.environ["PATH"]}, site)
    assert (env["A"], env["B"], env["PYTHONPATH"], env["HOME"]) == ("1", "/h/two", "/x:/y", "/h")


def test_a_machine_without_sglang_goes_on_in_what_the_kit_installed(tmp_path, monkeypatch):
    kit, scratch, out = tmp_path / "kit", tmp_path / "scratch", tmp_path / "out"
    for folder in (kit, scratch, out):
        folder.mkdir()
    (kit / "install.sh").write_text('echo "export FROM_KIT=$(basename $1)" > "$KIT_SITE.env"\n')
    monkeypatch.setattr(
        visit_env, "probe", lambda env: ([] if "FROM_KIT" in env else ["sglang", "zmq"], False)
    )
    args = gpu_visit.parse(["run", str(out), "--kit", str(kit), "--device", "cpu"])
    place = gpu_visit.Place(args, scratch)
    install, smoke, kernels = Stage("install", 20), Stage("smoke", 20, "x"), Stage("kernels", 20)
    assert gpu_visit.wanted(install, args, place)
    for steps, wanted in (("smoke", True), ("env,kernels", False)):
        args.steps = steps.split(",")
        assert gpu_visit.wanted(install, args, place) == wanted
    assert place.why_not(smoke) == "this Python lacks: sglang, zmq"
    assert place.why_not(kernels) is None
    how = How(place.command, place.environment, place.why_not)
    Visit(out, scratch, how, seconds=60, jobs=1).run([[install]])
    assert place.why_not(smoke) is None
    assert place.environment()["FROM_KIT"] == "kit"
    assert place.environment()["PYTHONPATH"].startswith(str(scratch / "metadata"))
    (scratch / "smoke_x.json").write_text('{"ok": false, "error": "RuntimeError: no"}')
    assert place.why_not(Stage("ttft", 20, "x")) == "no server with x started"


# ---- results -------------------------------------------------------------------------------------


def test_an_archive_fits_by_cutting_logs_and_at_last_by_leaving_numbers_out(tmp_path):
    scratch, out = tmp_path / "scratch", tmp_path / "results.tgz"
    (scratch / "tmp").mkdir(parents=True)
    (scratch / "small.json").write_text("{}")
    (scratch / "tmp" / "server.log").write_bytes(os.urandom(300_000))
    write_archive(out, scratch, limit=100_000)
    assert out.stat().st_size <= 100_000
    with tarfile.open(out) as tar:
        assert tar.getnames() == ["small.json", "tmp/server.log"]
    (scratch / "large.json").write_bytes(os.urandom(200_000))
    write_archive(out, scratch, limit=100_000)
    with tarfile.open(out) as tar:
        assert tar.getnames() == ["small.json"]


def test_a_log_keeps_its_start_and_its_end(tmp_path):
    log = tmp_path / "x.log"
    log.write_bytes(b"start" + b"." * 5000 + b"end")
    cut = tail(log, 200)
    assert cut.startswith(b"start")
    assert cut.endswith(b"end")
    assert b"4808 bytes left out" in cut
    assert tail(log, 6000) == log.read_bytes()


def test_a_profile_counts_what_overlaps_once():
    spans = [("b", 100.0, 200.0), ("a", 0.0, 50.0), ("a", 30.0, 40.0), ("b", 150.0, 260.0)]
    found = summed_up(spans, most=1)
    assert (found["span_ms"], found["busy_ms"], found["gaps_ms"]) == (0.26, 0.21, 0.05)
    assert found["kernels"] == 4
    assert found["longest"] == [{"name": "b", "ms": 0.21, "calls": 2}]


def test_a_profile_is_told_in_parts():
    spans = [("x", 100.0, 200.0), ("_mass", 250.0, 300.0), ("y", 340.0, 360.0), ("x", 350.0, 370.0)]
    assert parts_of(spans, ("_copy", "_mass")) == [
        {"up_to": "_mass", "ms": 0.2, "busy_ms": 0.15},
        {"up_to": "the end", "ms": 0.07, "busy_ms": 0.03},
    ]


# ---- the run -------------------------------------------------------------------------------------

# Stages by what they do; run as a program this file visits them all.
WORK = {
    "good": "import json; json.dump({'ok': True, 'figures': {'x': 1}}, open('good.json', 'w'))",
    "false": "import json; json.dump({'ok': False, 'checks': [{'name': 'law', 'value': 3,"
    " 'ok': False}]}, open('false.json', 'w'))",
    "crash": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    # what it wrote before it hung counts; a child in a session of its own must not outlive it
    "hang": "import json, subprocess, time; json.dump({'ok': False, 'figures': {'half': 2}},"
    " open('hang.json', 'w')); subprocess.Popen(['sleep', '600'], start_new_session=True);"
    " time.sleep(600)",
    "last": "import json; json.dump({'ok': True}, open('last.json', 'w'))",
}


def visit_of(folder: Path, *, hang_s: float = 10, **more) -> tuple[Visit, list[list[Stage]]]:
    out, scratch = folder / "out", folder / "scratch"
    out.mkdir(exist_ok=True)
    scratch.mkdir(exist_ok=True)

    def why_not(stage):
        if stage.step == "broken":
            raise RuntimeError("planted")
        return "not here" if stage.step == "absent" else None

    there = f"import os; os.chdir({str(scratch)!r}); "
    how = How(
        lambda stage: [sys.executable, "-c", there + WORK[stage.step]],
        lambda: dict(os.environ),
        why_not,
    )  # fmt: skip
    groups = [
        [Stage("good", 20), Stage("false", 20)],
        [Stage("crash", 20), Stage("absent", 20), Stage("broken", 20)],
        [Stage("hang", hang_s)],
        [Stage("last", 20)],
    ]
    return Visit(out, scratch, how, **{"seconds": 60, "jobs": 2, **more}), groups


def until_gone(mark: str) -> None:
    """A killed process is there until its parent has seen it end."""
    while marked(mark):
        time.sleep(0.05)


def told(folder: Path) -> dict:
    """The summary; the archive must be whole too, and few files lie there."""
    with tarfile.open(folder / "out" / "results.tgz") as tar:
        assert all(tar.extractfile(name).read() is not None for name in tar.getnames())
    assert len(list((folder / "out").iterdir())) <= 4
    return json.loads((folder / "out" / "summary.json").read_text())


def test_a_stage_that_fails_crashes_or_hangs_stops_no_other(tmp_path):
    visit, groups = visit_of(tmp_path)
    visit.run(groups)
    found = told(tmp_path)
    assert {name: stage["verdict"] for name, stage in found["stages"].items()} == {
        "good": "ok", "false": "FAILED", "crash": "FAILED", "absent": "skipped",
        "broken": "FAILED", "hang": "FAILED", "last": "ok",
    }  # fmt: skip
    why = {name: stage.get("why") for name, stage in found["stages"].items()}
    assert why["false"] == "law: 3"
    assert "code -9" in why["crash"]
    assert why["absent"] == "not here"
    assert why["broken"] == "RuntimeError: planted"
    assert why["hang"] == "stopped after 10 s"
    assert found["figures"] == {"good": {"x": 1}, "hang": {"half": 2}}
    assert not found["ok"]
    until_gone(f"{os.getpid()}-hang")


def test_stages_without_time_left_are_skipped(tmp_path):
    visit, groups = visit_of(tmp_path, seconds=5)
    visit.run(groups)
    assert {s["verdict"] for s in told(tmp_path)["stages"].values()} == {"skipped"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_visit_that_is_killed_leaves_whole_files(tmp_path, number):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, __file__, str(tmp_path)], env=env)
    mark = f"{process.pid}-hang"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and len(marked(mark)) < 2:
            time.sleep(0.05)
        assert len(marked(mark)) >= 2  # the stage and its child
        process.send_signal(number)
        process.wait(30)
        found = told(tmp_path)
        assert found["stages"]["good"]["verdict"] == "ok"
        assert found["figures"]["good"] == {"x": 1}
        if number == signal.SIGTERM:
            assert found["stages"]["hang"]["verdict"] == "FAILED"
            until_gone(mark)
        else:
            assert found["stages"]["hang"]["verdict"] == "running"
    finally:
        process.kill()
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    visit, groups = visit_of(Path(sys.argv[1]), hang_s=600, seconds=600)
    visit.run(groups)


def test_what_compiles_at_its_first_call_is_timed_as_often_as_anything(monkeypatch) -> None:
    """The time that timing may take begins behind the warm-up."""
    from kvshare_sglang.bench.gpu_visit import table

    now, calls = [0.0], []

    def run() -> None:
        now[0] += 0.001 if calls else 10 * table.MOST_S
        calls.append(now[0])

    monkeypatch.setattr(table.time, "perf_counter", lambda: now[0])
    box = table.box_of("cpu")
    assert table.timed(box, run, repeats=5)["n"] == 5
    assert len(calls) == 8
