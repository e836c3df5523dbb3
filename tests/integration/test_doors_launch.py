"""Every way to start: ``--kvshare`` works there, or one line says why not; none runs without."""

import contextlib
import dataclasses
import json
import logging
import os
import random
import signal
import site
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import odd
import pytest
import requests
from conftest import Texts
from lab import lab, request
from server import SPEC, environment, forked, main, serve, unmeasured

from kvshare_sglang.bench.processes import free_port
from kvshare_sglang.config import KVShareConfig

ROOT = Path(__file__).resolve().parents[2]
TOKEN_BYTES = 4 * 2 * 2 * 32 * 4  # of the model: layers, K and V, heads, dim, float32


def run(
    *command: str, path: Path | None = None, timeout: int = 600
) -> subprocess.CompletedProcess[str]:
    """A command to its end; ``path`` is a folder to import from, before all others."""
    env = environment()
    if path is not None:
        env["PYTHONPATH"] = ":".join(filter(None, [str(path), env.get("PYTHONPATH")]))
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)


def sglang_command(folder: str, *argv: str) -> None:
    """As ``sglang`` with these arguments; ``folder`` is one more to import from."""
    site.addsitedir(folder)
    sys.argv = ["sglang", *argv]
    from sglang.cli.main import main

    main()


def start_each(starts: list[list[str]]) -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    for argv in starts:
        try:
            prepare_server_args(argv)
            print("STARTED")
        except SystemExit as end:
            print(json.dumps(end.code))


def test_what_cannot_start_says_so_in_one_line(model: Path, tmp_path: Path) -> None:
    """As ``sglang.launch_server`` starts, many times in one process."""
    config = json.loads((model / "config.json").read_text())
    for name in ("tokenizer", "gone", "other", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").touch()
    (tmp_path / "gone" / "config.json").write_text(json.dumps(config))
    # Not even a header: whoever reads these weights fails otherwise.
    for name in ("other", "broken"):
        (tmp_path / name / "model.safetensors").touch()
    other = {**config, "architectures": ["GemmaForCausalLM"], "model_type": "gemma"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(other))
    (tmp_path / "broken" / "config.json").write_text("{")
    options = tmp_path / "options.yaml"
    options.write_text("kvshare: true\nkvshare-budget: 7.5\n")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = str(sock.getsockname()[1])
        good = ["--model-path", str(model)]
        cases = [
            (["--model-path", str(tmp_path / "misspelt")], "there is no such directory"),
            (["--model-path", "misspelt/name"], "is no directory and no model of the hub: "),
            (["--model-path", str(tmp_path / "tokenizer")], "is not a model (only a tokenizer)"),
            (["--model-path", str(tmp_path / "gone")], "has no weights"),
            (["--model-path", str(tmp_path / "broken")], "cannot be read: "),
            (["--model-path", str(tmp_path / "other")], "the architecture GemmaForCausalLM yet"),
            ([*good, "--max-total-tokens", "100"], "a KV pool of 100 tokens is too small"),
            ([*good, "--port", port], f"--port {port} cannot be listened on"),
            ([*good, "--grpc-port", port], f"--grpc-port {port} cannot be listened on"),
            ([*good, "--nccl-port", port], f"--nccl-port {port} cannot be listened on"),
            ([*good, "--dist-init-addr", f"localhost:{port}"], f"localhost:{port} cannot be lis"),
            ([*good, "--config", str(options)], "--kvshare-budget must be float in [0, 1], got"),
            ([*good, f"--config={options}"], f"SGLang does not read {options} here"),
        ]
        starts = [[*argv, "--device", "cpu", "--kvshare"] for argv, _ in cases]
        done = forked(start_each, starts)
    assert done.returncode == 0, done.said[-3000:]
    said = [json.loads(line) for line in done.said.splitlines() if line.startswith('"')]
    assert len(said) == len(cases), done.said
    for line, (_, expected) in zip(said, cases, strict=True):
        assert line.startswith("error: ")
        assert expected in line
        assert "\n" not in line


def start_with_the_model(argv: list[str], rooms: list[float]) -> None:
    """The process with the model, as a launcher starts it, where memory has room for so many tokens
    of KV (below 0: not even for the weights)."""
    import multiprocessing

    from sglang.srt.distributed import bootstrap
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.mem_cache import kv_cache_configurator
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import PortArgs, prepare_server_args

    load_plugins()
    server_args = prepare_server_args(argv)
    server_args.resolve_once()
    server_args.check_server_args()
    signal.signal(signal.SIGQUIT, lambda *_: print("QUIT"))
    context, gib = multiprocessing.get_context("fork"), 1 << 30
    bootstrap.get_available_gpu_memory = lambda *a, **k: 8.0
    for room in rooms:
        left = 8 * (1 - server_args.mem_fraction_static) + room * TOKEN_BYTES / gib
        kv_cache_configurator.get_available_gpu_memory = lambda *a, left=left, **k: left
        _, pipe = context.Pipe()
        given = (server_args, PortArgs.init_new(server_args), 0, 0, 0, None, pipe)
        process = context.Process(target=run_scheduler_process, args=given)
        process.start()
        process.join()
        print("ENDED", process.exitcode)


def test_a_pool_that_memory_makes_too_small_is_one_line_of_the_process_with_the_model(
    model: Path,
) -> None:
    """Only there it is known. No room at all SGLang finds, too little to reuse we do."""
    flags = dataclasses.replace(SPEC, mem_fraction=0.5).flags()
    argv = ["--model-path", str(model), *flags, "--kvshare"]
    done = forked(start_with_the_model, argv, [-1.0, 0.5, 100.5])
    assert done.returncode == 0, done.said[-3000:]
    said = done.said.splitlines()
    assert "Traceback" not in done.said, done.said[-3000:]
    errors = [line for line in said if line.startswith("error: ")]
    no_room = "error: --mem-fraction-static 0.5 leaves no room for a KV pool, at least 144 tokens"
    assert [line.startswith(no_room) for line in errors] == [True, True, False], errors
    assert errors[2].startswith("error: a KV pool of 100 tokens is too small for one prompt")
    assert "at least 144 are needed: raise" in errors[2]
    assert said.count("QUIT") == said.count("ENDED 1") == 3


def tell_of_itself(argv: list[str], token: str) -> None:
    """All that SGLang can say of how it was started: settings, command line, ours; and the log."""
    logging.basicConfig(level="DEBUG")
    os.environ["KVSHARE_STREAM_TOKEN"] = token
    sys.argv = ["sglang.launch_server", *argv]
    start_each([argv])
    from sglang.srt.server_args import prepare_server_args

    args = prepare_server_args(argv)
    print(vars(args), args, sys.argv, getattr(args, "launch_command", ""))
    with contextlib.suppress(ImportError):  # SGLang 0.5.22 on
        from sglang.srt.utils.common import build_server_info

        print(json.dumps(build_server_info(args, {}), default=str))


def test_the_token_of_the_stream_is_told_nowhere(model: Path, tmp_path: Path) -> None:
    secret = "the-token-that-nobody-may-see"
    (tmp_path / "token").write_text(secret)
    argv = ["--model-path", str(model), "--device", "cpu", "--kvshare"]
    endpoint = f"tcp://0.0.0.0:{free_port()}"
    argv += ["--kvshare-stream", endpoint]
    for given in ([], ["--kvshare-stream-token-file", str(tmp_path / "token")]):
        done = forked(tell_of_itself, [*argv, *given], "" if given else secret)
        assert done.returncode == 0, done.said[-3000:]
        assert "STARTED" in done.said
        assert endpoint in done.said
        assert secret not in done.said
    # Not by value: who tries is told no, and not what was given.
    done = forked(start_each, [[*argv, "--kvshare-stream-token", secret]])
    assert "error: --kvshare-stream-token-file must be" in done.said
    assert secret not in done.said


def test_a_start_that_fails_ends_the_process_with_that_line(tmp_path: Path) -> None:
    misspelt = str(tmp_path / "misspelt")
    given = ("--device", "cpu", "--kvshare", "--model-path", misspelt)
    done = forked(main, "sglang.launch_server", *given)
    assert done.returncode == 1
    assert done.said.splitlines()[-1].startswith(f"error: --model-path {misspelt}:")
    assert "Traceback" not in done.said


def test_the_help_of_sglang_serve_leads_to_the_flags(tmp_path: Path) -> None:
    """It loads no plug-ins, but lists the types of models they add, and shows the help of one."""
    made = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert made.returncode == 0, made.stderr
    general = forked(sglang_command, str(tmp_path), "serve", "--help")
    assert "--model-type {auto,llm,diffusion,kvshare}" in general.said
    help_of_ours = ("serve", "--model-type", "kvshare", "--help")
    ours = forked(sglang_command, str(tmp_path), *help_of_ours)
    assert ours.returncode == 0, ours.said
    for field in dataclasses.fields(KVShareConfig):
        assert "--kvshare-" + field.name.replace("_", "-") in ours.said


def test_engines_take_kvshare_as_keywords_and_by_their_server_args(
    model: Path, tmp_path: Path
) -> None:
    """Three engines of one script, the last without kvshare. What Engine makes of keywords is what
    ``server_args`` makes of them."""
    script = tmp_path / "engines.py"
    script.write_text(
        """
import sys
import odd
import sglang
from sglang.srt.server_args import ServerArgs
from kvshare_sglang.plugin import server_args

if __name__ == "__main__":
    common = dict(
        model_path=sys.argv[1], device="cpu", attention_backend="torch_native", dtype="float32",
        skip_tokenizer_init=True, max_total_tokens=4096, max_running_requests=4,
        mem_fraction_static=0.3, grammar_backend="none", random_seed=1, log_level="info",
    )
    try:
        ServerArgs(**common, kvshare=True)
    except TypeError as error:
        print("NO KEYWORD", error)
    try:  # the first of this process: no plug-in is loaded yet
        sglang.Engine(server_args=ServerArgs(**common), kvshare=True, kvshare_budget=0.1)
    except ValueError as error:
        print("BESIDE", error)
    try:
        sglang.Engine(**common, kvshare=True, kvshare_budget=7.0)
    except ValueError as error:
        print("REFUSED", error)
    keywords = dict(**common, kvshare=True, kvshare_seam=8)
    ours, engines = server_args(**keywords), sglang.Engine.server_args_class(**keywords)
    print("SAME", ours == engines and ours._kvshare == engines._kvshare)
    a = list(range(100, 400))
    silent = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    params = {**silent, "custom_params": {"kvshare": "auto"}}
    for how in (dict(server_args=ServerArgs(**common, radix_cache_backend="kvshare")), keywords):
        engine = sglang.Engine(**how)
        answer = engine.generate(input_ids=a, sampling_params=silent)
        print("SILENT", answer["meta_info"]["kvshare"][0]["declined"])
        answer = engine.generate(input_ids=[7, 8, 9] + a, sampling_params=params)
        print("COPIED", answer["meta_info"]["kvshare"][0]["copied_tokens"])
        bad = {**params, "custom_params": {"kvshare": "exakt"}}
        try:
            engine.generate(input_ids=[a, a[:9]], sampling_params=[params, bad])
        except ValueError as error:
            print("BAD", error)
        stream = dict(input_ids=[7, 9] + a, stream=True)
        *_, last = engine.generate(**stream, sampling_params=params)
        print("COPIED", last["meta_info"]["kvshare"][0]["copied_tokens"])
        try:
            list(engine.generate(**stream, sampling_params=bad))
        except ValueError as error:
            print("BAD", error)
        later = engine.async_generate(input_ids=[9, 9] + a, sampling_params=params)
        answer = engine.loop.run_until_complete(later)
        print("COPIED", answer["meta_info"]["kvshare"][0]["copied_tokens"])
        if how is keywords:
            print("TRIED", odd.through_engine(engine, a[:50]))
        engine.shutdown()
    engine = sglang.Engine(**common)
    answer = engine.generate(input_ids=[7, 8, 9] + a, sampling_params=params)
    print("PLAIN", answer["meta_info"].get("kvshare"))
    engine.shutdown()
"""
    )
    done = run(sys.executable, str(script), str(model), path=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout.splitlines()
    assert any(line.startswith("TRIED") for line in printed)
    assert "NO KEYWORD" in done.stdout
    assert "BESIDE Engine was given kvshare, kvshare_budget beside server_args" in done.stdout
    assert "REFUSED --kvshare-budget must be float in [0, 1], got 7.0" in printed
    copied = [int(line.split()[1]) for line in printed if "COPIED" in line]
    assert "SAME True" in printed
    assert printed.count("SILENT default_exact") == 2  # this model was never measured
    assert len(copied) == 6
    assert min(copied) > 150
    bad = "BAD custom_params.kvshare.mode must be one of auto, exact, got 'exakt'"
    assert printed.count(bad) == 4
    assert "PLAIN None" in printed
    configs = [unmeasured(), unmeasured(seam=8)]
    said = done.stdout + done.stderr
    assert all(said.count(config) == 1 for config in configs)


def test_the_rust_front_end_takes_options_by_generate_and_says_the_rest_in_the_log(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: Texts
) -> None:
    """Requests go from Rust to the scheduler: no process of ours judges them, none may hurt it."""
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with serve(model, tmp_path, "--kvshare", "--enable-metrics") as it:
        document = texts.passage(200)

        def ask(option: Any, *codes: int) -> bool:
            """Whether the request copied something."""
            prompt = [*texts.passage(9), *document, *texts.passage(9)]
            said = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}
            said["custom_params"] = {"kvshare": option}
            before = it.log.read_text().count("#copied-token")
            reply = it.post("/generate", {"input_ids": prompt, "sampling_params": said})
            assert reply.status_code in (200, *codes), reply.text
            if reply.status_code == 200:
                assert len(reply.json()["output_ids"]) == 3
            return it.log.read_text().count("#copied-token") > before

        assert not ask(None)
        assert ask("auto")
        assert ask({"budget": 0.5})
        assert ask({"ttl": 5})
        assert not ask("exact")
        assert not ask("exakt")
        why = "reuses nothing: custom_params.kvshare.mode must be one of auto, exact, got 'exakt'"
        assert why in it.log.read_text()
        for bad in ({"a": 1}, {"budget": "x"}, {"budget": -1}, {"mode": "x" * 999}, 7, 10**30):
            assert not ask(bad), bad
        for bad in ({"ttl": "x"}, {"ttl": -1}, {"ttl": 3601}):
            assert not ask(bad), bad
        rng = random.Random(5)
        drawn = [odd.options(rng) for _ in range(40)]
        bad = [one for one in drawn if odd.refusal(one) is not None and "nan" not in str(one)]
        for option in ([["exact"]], {"mode": {}}, {"budget": [1]}, *bad):
            if "inf" not in str(option):  # which JSON cannot say
                assert not ask(option, 400), option  # it refuses some itself
        parameters = [({"sampling_params": wrong}, said) for wrong, said in odd.PARAMETERS]
        for wrong, _ in (*odd.FIELDS, *parameters):
            body = {"input_ids": [*texts.passage(9), *document], "sampling_params": {}} | wrong
            body["sampling_params"] = {"max_new_tokens": 2} | body["sampling_params"]
            with contextlib.suppress(requests.RequestException):
                it.post("/generate", body)
            assert len(it.generate([5], new=3)["output_ids"]) == 3, wrong
        assert "Traceback" not in it.log.read_text().split("KVShare is on", 1)[1]


# ---- benchmarks ------------------------------------------------------------------------------


@pytest.fixture
def datasets(tmp_path: Path) -> Path:
    """A folder with what SGLang's benchmarks import and this test does not use."""
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in" / "datasets.py").write_text("load_dataset = None\n")
    (tmp_path / "stand-in" / "tabulate.py").write_text("tabulate = None\n")
    return tmp_path / "stand-in"


def run_beside(folder: str, module: str, *argv: str) -> None:
    """A module as a program; ``folder`` is one more to import from."""
    site.addsitedir(folder)
    main(module, *argv)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of three that share all but their beginning, as SGLang's benchmarks read it."""
    text = " ".join(f"word{i} = compute({i})" for i in range(60))
    talks = [[{"value": f"case {i}: {text}"}, {"value": "yes"}] for i in range(3)]
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([{"conversations": talk} for talk in talks]))
    return file


def on(model: Path, prompts: Path) -> list[str]:
    """What a benchmark is told of the server and of its prompts."""
    return [
        *("--model-path", str(model), "--kvshare", "--kvshare-seam", "8"),
        *("--kvshare-default", "auto"),
        *dataclasses.replace(SPEC, max_total_tokens=8192).flags(),
        *("--max-running-requests", "1", "--dataset-name", "sharegpt", "--skip-warmup"),
        *("--dataset-path", str(prompts)),
    ]


def refused_alone(datasets: Path, module: str, arguments: list[str]) -> bool:
    """It reads its arguments before it loads plug-ins, and does not run."""
    alone = forked(run_beside, str(datasets), module, *arguments)
    return alone.returncode == 2 and (
        "unrecognized arguments: --kvshare" in alone.said.splitlines()[-1]
    )


def test_the_offline_benchmark_reuses_when_the_plug_ins_come_first(
    model: Path, datasets: Path, prompts: Path
) -> None:
    module = "sglang.benchmark.offline_throughput"
    arguments = [*on(model, prompts), "--num-prompts", "3", "--sharegpt-output-len", "4"]
    done = forked(run_beside, str(datasets), "kvshare_sglang", module, *arguments)
    assert done.returncode == 0, done.said[-3000:]
    assert unmeasured(default="auto", seam=8) in done.said
    assert "KVShare batch, #reuse-seq: 1" in done.said
    assert refused_alone(datasets, module, arguments)


def test_the_offline_benchmark_does_not_run_without_a_file_of_options_that_asks_for_us(
    model: Path, datasets: Path, prompts: Path, tmp_path: Path
) -> None:
    """It takes ``--config``, and reads no file: it ran without kvshare, and said nothing."""
    file = tmp_path / "options.yaml"
    file.write_text("kvshare: true\n")
    arguments = on(model, prompts)
    del arguments[2:7]  # what names kvshare
    done = forked(
        run_beside, str(datasets), "sglang.benchmark.offline_throughput", *arguments,
        "--num-prompts", "1", "--config", str(file),
    )  # fmt: skip
    assert done.returncode != 0
    assert f"SGLang does not read {file} here, and it asks for kvshare" in done.said


def test_the_benchmark_of_one_batch_starts_a_server_that_reuses(
    model: Path, datasets: Path, prompts: Path, tmp_path: Path
) -> None:
    """In a process of its own, which loads plug-ins as late as a server does."""
    module = "sglang.benchmark.one_batch_server"
    arguments = [
        *(*on(model, prompts), "--port", str(free_port()), "--batch-size", "3"),
        *("--enable-multi-batch", "--input-len", "300", "--output-len", "4"),
        *("--result-filename", str(tmp_path / "result.jsonl")),
    ]
    started = ("kvshare_sglang", module, *arguments)
    done = forked(run_beside, str(datasets), *started)
    assert done.returncode == 0, done.said[-3000:]
    assert unmeasured(default="auto", seam=8) in done.said
    assert "KVShare batch, #reuse-seq: 1" in done.said
    assert (tmp_path / "result.jsonl").is_file()
    assert refused_alone(datasets, module, arguments)


@pytest.mark.parametrize("module", ["sglang.benchmark.one_batch", "sglang.bench_one_batch"])
def test_a_benchmark_without_a_cache_names_another(module: str) -> None:
    done = run(sys.executable, "-m", "kvshare_sglang", module, "--kvshare", "--model-path", "x")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {module} runs a model without a scheduler and a cache")
    assert "call sglang.benchmark.one_batch_server" in line


# ---- positions past what the checkpoint says -------------------------------------------------


def test_positions_past_the_table_of_the_checkpoint_are_served(
    models: Path, llama: Path, texts: Texts
) -> None:
    """SGLang makes its table of angles as long as the context that was asked for, so ours is."""
    short = models / "short-context"
    short.mkdir()
    for file in llama.iterdir():
        (short / file.name).symlink_to(file)
    config = json.loads((llama / "config.json").read_text())
    (short / "config.json").unlink()
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    context = 1024
    a = texts.passage(400)
    prompt = [*texts.passage(context - 450), *a, *texts.passage(20)]
    settings = {
        "kvshare": True,
        "dtype": "bfloat16",  # here SGLang keeps the table in less than fp32
        "context_length": context,
        "late_env": {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"},
    }
    with lab(short, **settings) as it:
        it.one(a)
        reused = it.one(prompt, new=4, keep="kv")
        assert reused["kvshare"]["declined"] is None
        assert reused["kvshare"]["copied_tokens"] > 100
        it.flush()
        fresh = it.one(prompt, new=4, kvshare="exact", keep="kv")
        # K of the first layer hangs on a token and its position alone: the copies are right.
        ours, exact = reused["kv"][0][0].float(), fresh["kv"][0][0].float()
        assert (ours - exact).abs().max() < 0.03 * exact.abs().max()
        too_long = it.play([request("long", texts.passage(context + 5), new=2)])["long"]
        assert too_long["finish"]["type"] == "abort"
