"""Commands keep one contract: listed with their help, imported when asked for, refused clearly."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvshare_sglang.bench import __main__ as bench
from kvshare_sglang.bench.common import cores, read_result, settings, threads, write_result

ROOT = Path(__file__).resolve().parents[2]
THERE = [name for name, module in bench.COMMANDS.items() if importlib.util.find_spec(module)]


@pytest.mark.parametrize("name", THERE)
def test_a_command_has_a_help_arguments_and_a_run(name, capsys):
    module = importlib.import_module(bench.COMMANDS[name])
    assert module.__doc__.splitlines()[0] == bench.about(name)
    assert callable(module.run)
    with pytest.raises(SystemExit) as ended:
        bench.main([name, "--help"])
    assert ended.value.code == 0
    assert {"--json", "--device"} <= set(capsys.readouterr().out.split())


def test_the_list_of_commands_imports_none_of_them():
    code = "import sys\nfrom kvshare_sglang.bench.__main__ import main\ntry: main(['--help'])\n"
    code += "finally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert all(name in done.stdout for name in bench.COMMANDS), done.stderr
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "sglang", "httpx", *bench.COMMANDS.values()}


def test_a_command_that_is_missing_is_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(bench.COMMANDS, "gone", "kvshare_sglang.bench.gone")
    assert bench.main(["gone"]) == 1
    told = capsys.readouterr().err
    assert told == "error: gone is not there: no module kvshare_sglang.bench.gone\n"


def test_a_package_that_a_command_lacks_is_named_with_its_extra(monkeypatch, capsys):
    def absent(name):
        raise ModuleNotFoundError("No module named 'httpx'", name="httpx")

    monkeypatch.setattr(bench.importlib, "import_module", absent)
    assert bench.main(["ttft"]) == 1
    assert "ttft needs httpx: pip install -e '.[bench]'" in capsys.readouterr().err


def test_every_result_has_one_form_and_names_no_machine_path(tmp_path):
    out = tmp_path / "result.json"
    args = bench.argparse.Namespace(
        command="match", json=out, requests=[tmp_path / "a.jsonl"], device="cpu"
    )
    assert settings(args)["requests"] == ["a.jsonl"]
    write_result(args, {"rows": [1]}, model="small")
    found = read_result(out, "rows", "env")
    assert {"command", "device", "model", "versions", "commit", "cpu"} <= set(found["env"])
    assert str(tmp_path) not in json.dumps(found)


def test_the_table_of_match_is_written_from_an_earlier_result(tmp_path):
    row = {"beyond_share": 0.4, "useful_share": 0.35, "share_of_ceiling": 0.99}
    matchers = ("kvshare", "winnow", "fixed-any-offset", "ceiling")
    result = tmp_path / "m.json"
    rest = dict.fromkeys(
        ("prefix_share", "saved_share", "runs_mean", "edits_mean", "lookup_ms_p50"), 0.0
    )
    rest |= {"lookup_ms_p99": 0.0, "bytes_per_token": 12.0}
    rows = {matcher: {**row, **rest} for matcher in matchers}
    rows["kvshare"]["unequal_tokens"] = 0
    result.write_text(json.dumps({"files": {"rag": {"unlimited": rows}}}))
    page = tmp_path / "page.md"
    page.write_text("<!-- match -->\n<!-- /match -->\n")
    assert bench.main(["match", "--result", str(result), "--table", str(page)]) == 0
    assert "| rag | 40.0% | 99.0% | 35.0% | 35.0% | 35.0% | 35.0% |" in page.read_text()


@pytest.mark.parametrize(
    ("asked", "wanted"), [("1", 1), ("3", 3), ("", None), ("0", None), ("two", None)]
)
def test_work_of_this_process_takes_the_threads_that_the_environment_says(
    asked, wanted, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads() == (wanted or cores())
