"""Whose eviction policy holds, which ServerArgs have kvshare on, and what ends a start."""

import argparse
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.errors import KVShareError, StartError, UnsupportedError
from kvshare_sglang.runtime import calibration, launch, preflight, support


@pytest.fixture(autouse=True)
def _not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a measurement says of a model is no matter of these tests."""
    monkeypatch.setattr(calibration, "settled", lambda config, **kw: config)


def parsed(*argv: str) -> dict[str, Any]:
    """What SGLang's command line with our flags gives for ``argv``."""
    parser = argparse.ArgumentParser()
    launch.hook_add_cli_args(ServerArgs.add_cli_args, parser)
    return vars(parser.parse_args(["--model-path", "x", *argv]))


def eviction_of(values: dict[str, Any]) -> str:
    config = launch.config_from(values, eviction_given="radix_eviction_policy" in values)
    assert config is not None
    return config.eviction


@pytest.mark.parametrize(
    ("argv", "ours"),
    [
        ([], "frequency"),
        (["--radix-eviction-policy", "lru"], "sglang"),  # SGLang's default, but asked for
        (["--radix-eviction-policy=lfu"], "sglang"),
        (["--radix-eviction-policy", "lfu", "--kvshare-eviction", "frequency"], "frequency"),
        (["--kvshare-eviction", "sglang"], "sglang"),
    ],
)
def test_a_policy_of_sglangs_stays_unless_ours_is_named(argv: list[str], ours: str) -> None:
    assert eviction_of(parsed("--kvshare", *argv)) == ours
    engine: dict[str, Any] = {"kvshare": True}
    for flag, value in zip(*[iter(" ".join(argv).replace("=", " ").split())] * 2, strict=True):
        engine[flag.removeprefix("--").replace("-", "_")] = value
    assert eviction_of(engine) == ours


def test_a_policy_that_was_not_given_is_sglangs_default() -> None:
    args = argparse.Namespace(**parsed())
    assert not hasattr(args, "radix_eviction_policy")
    plain = argparse.ArgumentParser()
    ServerArgs.add_cli_args(plain)
    default = plain.parse_args(["--model-path", "x"]).radix_eviction_policy
    built = launch.hook_from_cli_args(ServerArgs.from_cli_args.__func__, ServerArgs, args)
    assert built.radix_eviction_policy == default


def test_the_name_of_our_backend_is_another_switch() -> None:
    values = parsed("--radix-cache-backend", "kvshare", "--kvshare-budget", "0.3")
    assert launch.config_from(values, eviction_given=False) == KVShareConfig(budget=0.3)
    assert launch.config_from(parsed(), eviction_given=True) is None


# ---- who orders the queue --------------------------------------------------------------------


def config_of(values: dict[str, Any]) -> KVShareConfig:
    config = launch.config_from(values, eviction_given=True)
    assert config is not None
    return config


def test_our_schedule_is_one_of_sglangs_choices_and_is_fcfs_to_it() -> None:
    values = parsed("--kvshare", "--schedule-policy", "kvshare", "--kvshare-schedule-bound", "9")
    config = config_of(values)
    assert (config.schedule, config.schedule_bound) == ("kvshare", 9)
    assert values["schedule_policy"] == "fcfs"
    engine = {"kvshare": True, "schedule_policy": "kvshare"}
    assert config_of(engine).schedule == "kvshare"
    assert engine["schedule_policy"] == "fcfs"


@pytest.mark.parametrize("theirs", ["fcfs", "lpm", "random"])
def test_a_schedule_of_sglangs_stays(theirs: str) -> None:
    values = parsed("--kvshare", "--schedule-policy", theirs)
    assert config_of(values).schedule == "sglang"
    assert values["schedule_policy"] == theirs


def test_our_schedule_needs_kvshare_and_says_so_in_one_line() -> None:
    args = argparse.Namespace(**parsed("--schedule-policy", "kvshare"))
    with pytest.raises(SystemExit, match=r"^error: --schedule-policy kvshare needs --kvshare$"):
        launch.hook_from_cli_args(ServerArgs.from_cli_args.__func__, ServerArgs, args)
    with pytest.raises(KVShareError, match="needs --kvshare"):
        launch.engine_server_args(model_path="x", schedule_policy="kvshare")


def test_two_schedules_at_once_are_refused() -> None:
    with pytest.raises(KVShareError, match="and --schedule-policy lpm: drop one"):
        config_of(parsed("--kvshare", "--kvshare-schedule", "kvshare", "--schedule-policy", "lpm"))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls what SGLang calls before it starts processes; what they see of kvshare."""
    monkeypatch.setattr(launch, "install", lambda: None)
    monkeypatch.setattr(preflight, "check", lambda values, config: None)
    monkeypatch.setenv(launch.ENV, "left by another server")

    def call(server_args: Any) -> tuple[Any, str | None]:
        launch.hook_check_server_args(lambda it: None, server_args)
        return getattr(server_args, "_kvshare", None), os.environ.get(launch.ENV)

    return call


def test_children_are_told_of_the_server_that_starts_not_of_the_last_one_built(
    launched: Any,
) -> None:
    here = str(os.getpid())
    plain = ServerArgs(model_path="x")
    assert launched(plain) == (None, None)
    ours = ServerArgs(model_path="x", radix_cache_backend="kvshare")
    assert launched(ours) == (KVShareConfig(), here)
    assert launched(plain) == (None, None)
    assert launched(ours) == (KVShareConfig(), here)


def test_a_server_args_built_without_us_keeps_its_policy_and_is_judged(launched: Any) -> None:
    own = ServerArgs(model_path="x", radix_cache_backend="kvshare", radix_eviction_policy="lfu")
    assert launched(own)[0].eviction == "sglang"
    with pytest.raises(UnsupportedError, match="drop --tp-size"):
        launched(ServerArgs(model_path="x", radix_cache_backend="kvshare", tp_size=2))


def test_a_server_args_built_without_us_cannot_name_our_schedule(launched: Any) -> None:
    for backend in (None, "kvshare"):
        with pytest.raises(StartError, match=r"plugin\.server_args\(kvshare=True"):
            launched(
                ServerArgs(model_path="x", radix_cache_backend=backend, schedule_policy="kvshare")
            )


def test_priorities_are_refused_with_our_schedule_alone() -> None:
    args = ServerArgs(model_path="x", enable_priority_scheduling=True)
    support.check_settings(args)
    with pytest.raises(UnsupportedError, match="drop --enable-priority-scheduling"):
        support.check_settings(args, support.WITH_OUR_ORDER)


# ---- what ends a start -----------------------------------------------------------------------


def test_the_least_pool_is_served_and_a_token_less_is_not() -> None:
    config = KVShareConfig(min_reuse=100, seam=20)
    preflight.check_pool(220, config)
    with pytest.raises(StartError, match=r"219 tokens .* at least 220"):
        preflight.check_pool(219, config)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_port_is_free_until_someone_listens(host: str) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        sock.listen()
        with pytest.raises(StartError, match=f"--port {port} .*choose another port"):
            preflight.check_port(host, port)
    preflight.check_port(host, port)


def test_an_address_that_is_not_this_machines_is_named() -> None:
    with pytest.raises(StartError, match=r"--host 192\.0\.2\.1"):
        preflight.check_port("192.0.2.1", 0)
    with pytest.raises(StartError, match="--port 65536"):
        preflight.check_port("127.0.0.1", 65536)


def test_every_port_that_a_server_takes_is_named_as_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SGLANG_GRPC_PORT", raising=False)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        sock.listen()
        free = SimpleNamespace(host="127.0.0.1", port=0)
        preflight.check_listeners(free)  # an SGLang that knows no gRPC
        with pytest.raises(StartError, match=f"^--grpc-port {port} cannot"):
            preflight.check_listeners(SimpleNamespace(**vars(free), grpc_port=port))
        monkeypatch.setenv("SGLANG_GRPC_PORT", str(port))
        with pytest.raises(StartError, match=f"^SGLANG_GRPC_PORT {port} cannot"):
            preflight.check_listeners(SimpleNamespace(**vars(free), grpc_port=None))
        preflight.check_listeners(SimpleNamespace(**vars(free), grpc_port=0))
        taken = {"nccl_port": port}
        with pytest.raises(StartError, match=f"^--nccl-port {port} cannot"):
            preflight.check_rendezvous(taken)
        # Only one of the two is listened on.
        preflight.check_rendezvous({**taken, "dist_init_addr": "localhost:0"})
        with pytest.raises(StartError, match=rf"^--dist-init-addr \[::1\]:{port} cannot"):
            preflight.check_rendezvous({"dist_init_addr": f"[::1]:{port}"})
        monkeypatch.setenv("SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE", "env://")
        preflight.check_rendezvous(taken)
    for left_to_sglang in ({}, {"dist_init_addr": "nowhere"}, {"nccl_port": None}):
        preflight.check_rendezvous(left_to_sglang)


@pytest.mark.parametrize(
    ("said", "ours"),
    [
        ("Not enough memory. Please try to increase --mem-fraction-static.", True),
        ("Loaded weights leave no memory. Raise --mem-fraction-static above 0.003\nmore", True),
        ("if it is an OOM problem, set --mem-fraction-static to a smaller value", False),
        ("CUDA out of memory", False),
        ("", False),
    ],
)
def test_too_little_memory_is_known_by_the_flag_to_raise(said: str, ours: bool) -> None:
    args = ServerArgs(model_path="x", mem_fraction_static=0.1)
    args._kvshare = KVShareConfig(min_reuse=100, seam=20)
    error = preflight.too_little_memory(RuntimeError(said), args)
    assert (error is not None) == ours
    if error is not None:
        assert "--mem-fraction-static 0.1 leaves no room for a KV pool, at least 220" in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize("path", ["s3://bucket/model", "none", "dummy", None])
def test_what_is_no_directory_and_no_name_is_left_to_sglang(path: str | None) -> None:
    preflight.check_checkpoint({"model_path": path})


def test_a_file_and_a_config_elsewhere_are_left_to_sglang(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    preflight.check_checkpoint({"model_path": str(file)})
    preflight.check_checkpoint({"model_path": str(tmp_path), "decrypted_config_file": "x.json"})


def test_weights_are_asked_for_where_they_are_read_from_the_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    )
    values = {"model_path": str(tmp_path)}
    with pytest.raises(StartError, match="has no weights"):
        preflight.check_checkpoint(values)
    preflight.check_checkpoint({**values, "load_format": "dummy"})
    (tmp_path / "model.safetensors").touch()
    preflight.check_checkpoint(values)
    # What SGLang would take from the command line counts.
    other = '{"architectures": ["SomeOtherModel"]}'
    with pytest.raises(UnsupportedError, match="SomeOtherModel"):
        preflight.check_checkpoint({**values, "json_model_override_args": other})


def test_a_file_of_options_that_is_not_read_is_an_error_if_it_asks_for_us(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("tp-size: 1\n")
    for path in (None, str(file), str(tmp_path / "gone.yaml")):
        launch.check_config_file(path)
    for text in ("model-path: /models/kvshare/m\n", "kvshare: false\n", "- kvshare\n", ""):
        file.write_text(text)
        launch.check_config_file(str(file))
    asking = ("kvshare-budget: 0.2\n", "radix_cache_backend: kvshare\n", "kvshare: [\n")
    for text in (*asking, "schedule-policy: kvshare\n", "kvshare: true\n"):
        file.write_text(text)
        with pytest.raises(KVShareError, match=f"give --config {file} to a server"):
            launch.check_config_file(str(file))
    with pytest.raises(SystemExit, match="error: SGLang does not read"):
        launch.hook_from_cli_args(SimpleNamespace, ServerArgs, SimpleNamespace(config=str(file)))


@pytest.mark.parametrize(
    ("program", "words", "found"),
    [
        ("/x/sglang/benchmark/offline_throughput.py", ["--config", "a.yaml"], "a.yaml"),
        ("/x/sglang/bench_one_batch_server.py", ["--n", "3", "--config=a.yaml"], "a.yaml"),
        ("/x/sglang/benchmark/offline_throughput.py", ["--config"], None),
        ("/x/sglang/benchmark/offline_throughput.py", [], None),
        ("/x/mine/benchmark/program.py", ["--config", "a.yaml"], None),
        ("/x/sglang/launch_server.py", ["--config", "a.yaml"], None),  # which reads it
    ],
)
def test_the_file_of_options_that_a_benchmark_takes_and_does_not_read(
    program: str, words: list[str], found: str | None
) -> None:
    assert launch.config_of_a_benchmark([program, *words]) == found


def test_a_start_without_an_engine_does_not_import_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is inside ``Engine`` has imported its module."""
    name = "sglang.srt.entrypoints.engine"
    monkeypatch.delitem(sys.modules, name, raising=False)
    launch.check_engine_keywords()
    assert name not in sys.modules
