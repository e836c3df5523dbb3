"""A real SGLang scheduler and model in a child process, stepped by a script.

Nothing is mocked but the wires: requests come from a list instead of a socket, and answers are
read off the request objects. The event loop is SGLang's own, overlapped or not. Between scripts
the scheduler has been idle, so its own leak checks have run.
"""

import contextlib
import functools
import gc
import importlib
import multiprocessing
import os
import sys
import traceback
import types
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

BASE = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_total_tokens": 16384,
    "max_running_requests": 8,
    "chunked_prefill_size": 4096,
    "mem_fraction_static": 0.3,
    "grammar_backend": "none",
    "disable_overlap_schedule": True,
    "random_seed": 1,
    "log_level": "error",
}

# What a child's first import of SGLang must find.
ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
IMPORTED = ["sglang.srt.entrypoints.http_server", "sglang.srt.models.registry"]
IMPORTED += [f"kvshare_sglang.runtime.{name}" for name in ("forward", "doors", "scheduler")]


class LabError(AssertionError):
    """What failed in the child, with its traceback."""


class Lab:
    """The parent's side. ``play`` runs a script; ``ask`` calls ``module:function(child, ...)``."""

    def __init__(self, model: Path, **server_args: Any) -> None:
        settings = {**BASE, **server_args, "model_path": str(model)}
        # ``env`` is there before SGLang is imported, which takes seconds; ``late_env`` before it
        # starts.
        context = imported()
        self._pipe, theirs = context.Pipe()
        if "kvshare" in server_args:
            # What structure says can be told in a test beforehand; other choices are asked for.
            settings.setdefault("kvshare_select", "window")
            settings.setdefault("kvshare_calibration", "off")
        self._process = context.Process(target=_child_main, args=(theirs, settings), daemon=True)
        with _imported_with(settings.get("env", {})):
            self._process.start()
        theirs.close()
        self._answer()

    def play(self, script: list[Any]) -> dict[str, dict[str, Any]]:
        """Serve a script to the end; the answers by request id.

        Its items: a request (dict, see ``request``) or a list of them that arrive together;
        ``("abort", rid)``; ``("flush",)``; ``("idle",)``: go on when all is served;
        ``("call", "module:function", *args)``: as ``ask``, in between;
        ``("polls", n)``: go on after n rounds of the event loop.
        """
        self._pipe.send(("play", script))
        answers: dict[str, dict[str, Any]] = self._answer()
        return answers

    def one(self, prompt: list[int], **options: Any) -> dict[str, Any]:
        """Serve one request alone; its answer."""
        return self.play([request("only", prompt, **options)])["only"]

    def flush(self) -> None:
        self.play([("flush",)])

    def ask(self, function: str, *args: Any) -> Any:
        self._pipe.send(("ask", function, args))
        return self._answer()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError, EOFError, OSError):
            self._pipe.send(("stop",))
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self) -> Any:
        # A stuck scheduler must fail a test, not hang the gate.
        if not self._pipe.poll(600):
            self._process.kill()
            raise LabError("the scheduler gave no answer within 600 s")
        try:
            ok, value = self._pipe.recv()
        except EOFError:
            raise LabError(f"the scheduler died, exit code {self._process.exitcode}") from None
        if not ok:
            raise LabError(value)
        return value


def computed(record: dict[str, Any]) -> int:
    """Rows that ran for a prompt, from what its answer says under ``kvshare``."""
    return int(record["recomputed_tokens"] + record["fresh_tokens"])


@contextlib.contextmanager
def lab(model: Path, **server_args: Any) -> Iterator[Lab]:
    """A lab for the length of a ``with`` block."""
    it = Lab(model, **server_args)
    try:
        yield it
    finally:
        it.close()


def request(
    rid: str,
    prompt: list[int],
    *,
    new: int = 8,
    kvshare: Any = None,
    extra_key: str | None = None,
    logprob_start: int | None = None,
    forced: Any = None,
    keep: str = "",
    lora: bool = False,
    hidden_states: bool = False,
    priority: int | None = None,
    fields: dict[str, Any] | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """One request, greedy.

    ``forced``: ranges of rows to compute; everything else is copied from the same positions of the
    same text cached under extra_key "donor" (exact KV in the skipped slots). ``keep``: "kv" keeps
    the KV of the whole row at release. ``lora``: run with the server's first adapter. ``fields``:
    fields of SGLang's request that have no name here.
    """
    return {
        "rid": rid,
        "prompt": list(prompt),
        "new": new,
        "kvshare": kvshare,
        "extra_key": extra_key,
        "logprob_start": logprob_start,
        "forced": forced,
        "keep": keep,
        "lora": lora,
        "hidden_states": hidden_states,
        "priority": priority,
        "fields": fields or {},
        "sampling": sampling,
    }


def _environment() -> dict[str, str]:
    return {**ENVIRONMENT, "OMP_NUM_THREADS": os.environ.get("KVSHARE_LAB_THREADS", "1")}


def imported() -> Any:
    """Processes in which SGLang is imported, which is most of what a start takes: forks of one that
    did nothing else. Their variables are those that the first of them found. Where there is a GPU,
    whose libraries bear no fork, each imports it itself."""
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, _environment()):
        forkserver.ensure_running()
    return context


def _imported_with(env: dict[str, str]) -> contextlib.AbstractContextManager[Any]:
    """While a process of ``imported`` starts: these variables too are what the import found."""
    import torch

    if not env or torch.cuda.is_available():
        return contextlib.nullcontext()
    its = _fork_server(tuple(sorted(env.items())))
    return mock.patch.object(forkserver, "connect_to_new_process", its.connect_to_new_process)


@functools.cache
def _fork_server(env: tuple[tuple[str, str], ...]) -> forkserver.ForkServer:
    its = forkserver.ForkServer()
    its.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, {**_environment(), **dict(env)}):
        its.ensure_running()
    return its


# ---- the child -------------------------------------------------------------------------------


def _child_main(pipe: Any, settings: dict[str, Any]) -> None:
    # SGLang collects garbage at its start and with each flush: half a second for all that it
    # imported, which is none.
    gc.freeze()
    os.environ.update(_environment())
    os.environ.update({**settings.pop("env", {}), **settings.pop("late_env", {})})
    try:
        child = Child(settings)
        gc.freeze()
        pipe.send((True, None))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        return
    while True:
        try:
            what, *args = pipe.recv()
        except EOFError:
            return
        if what == "stop":
            os._exit(0)  # SGLang's threads outlive the main one
        try:
            value = child.play(*args) if what == "play" else child.ask(*args)
            pipe.send((True, value))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def look_once_for_who_imported() -> None:
    """SGLang looks through all modules for those that imported a function that a hook wraps, at
    each of our thirty: most of what a start takes. Here each module is looked through once."""
    from sglang.srt.plugins import hook_registry

    holders: dict[int, list[tuple[Any, str]]] = {}
    seen: set[str] = set()

    def propagate(original: Any, wrapped: Any, source: Any) -> int:
        for name in [name for name in sys.modules if name not in seen]:
            seen.add(name)
            for attr, value in list(getattr(sys.modules[name], "__dict__", {}).items()):
                if isinstance(value, types.FunctionType):
                    holders.setdefault(id(value), []).append((sys.modules[name], attr))
        known = holders.pop(id(original), [])
        its = [(module, attr) for module, attr in known if vars(module).get(attr) is original]
        for module, attr in its:
            setattr(module, attr, wrapped)
        holders.setdefault(id(wrapped), []).extend([*its, (source, wrapped.__name__)])
        return len(its)

    hook_registry._propagate_patch = propagate


class Child:
    """Owns the scheduler; ``scheduler``, ``cache`` and ``runner`` are SGLang's objects."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from sglang.srt.entrypoints.engine import Engine
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import PortArgs

        look_once_for_who_imported()
        load_plugins()
        mutation = settings.pop("mutation", None)
        server_args = Engine.server_args_class(**settings)
        if mutation is not None:
            _call(mutation)
        if settings.get("page_size", 1) > 1:
            _call("cpu_paging:install")
        self.scheduler = _make_scheduler(server_args, PortArgs)
        self.cache = self.scheduler.tree_cache
        self.runner = self.scheduler.tp_worker.model_runner
        self.reqs: dict[str, Any] = {}
        self.specs: dict[str, dict[str, Any]] = {}
        self.kept: dict[str, Any] = {}
        self.logits: dict[str, Any] = {}
        self.layer_rows: list[list[int]] = []  # per forward: rows of hidden states in each layer
        self._script: list[Any] = []
        self._polls = 0
        self._wait_polls = 0
        self._wait_idle = False
        self._tap()

    # ---- taps: read only ---------------------------------------------------------------

    def _tap(self) -> None:
        scheduler = self.scheduler
        # On the classes, since the objects have slots; there is one scheduler in this process.
        type(scheduler.request_receiver).recv_requests = lambda _, local_reqs=None: self._receive()
        for name in ("send_to_tokenizer", "send_to_detokenizer"):
            type(getattr(scheduler.ipc_channels, name)).send_output = lambda *a, **k: None
        enqueue = scheduler._add_request_to_queue

        def note(req: Any, *args: Any, **kw: Any) -> Any:
            self.reqs[req.rid] = req
            return enqueue(req, *args, **kw)

        scheduler._add_request_to_queue = note
        pool = scheduler.req_to_token_pool
        free = pool.free

        def free_row(req: Any, *args: Any, **kw: Any) -> Any:
            if self.specs.get(req.rid, {}).get("keep") == "kv":
                self.kept[req.rid] = self.read_kv(req)
            return free(req, *args, **kw)

        pool.free = free_row
        forward = self.runner.forward

        def run(fb: Any, *args: Any, **kw: Any) -> Any:
            prefill = fb.forward_mode.is_extend()
            self.layer_rows.append([])
            out = forward(fb, *args, **kw)
            if not prefill:
                self.layer_rows.pop()
            else:  # that which settles a token too: its logits are those that count
                logits = out.logits_output.next_token_logits.float().clone()
                for rid, row in zip(fb.rids, logits, strict=False):
                    self.logits[rid] = row
            return out

        self.runner.forward = run
        for layer in self.runner.model.model.layers:
            layer.register_forward_pre_hook(
                lambda module, args: (
                    self.layer_rows[-1].append(args[1].shape[0]) if self.layer_rows else None
                )
            )

    def read_kv(self, req: Any) -> tuple[Any, Any]:
        """K and V [layers, tokens, heads, dim] of a request's committed row."""
        import torch

        row = req.kv.req_pool_idx if hasattr(req.kv, "req_pool_idx") else req.req_pool_idx
        slots = self.scheduler.req_to_token_pool.req_to_token[row, : len(req.origin_input_ids)]
        pool = self.runner.token_to_kv_pool
        layers = range(self.runner.model_config.num_hidden_layers)
        return (
            torch.stack([pool.get_key_buffer(i)[slots.long()].clone() for i in layers]),
            torch.stack([pool.get_value_buffer(i)[slots.long()].clone() for i in layers]),
        )

    # ---- scripts -------------------------------------------------------------------------

    def play(self, script: list[Any]) -> dict[str, dict[str, Any]]:
        for store in (self.reqs, self.specs, self.kept, self.logits):
            store.clear()
        self.layer_rows.clear()
        self._script = list(script)
        self._polls = self._wait_polls = 0
        self._wait_idle = False
        self.scheduler.gracefully_exit = False
        self.scheduler.run_event_loop()
        return {rid: self._answer(req) for rid, req in self.reqs.items()}

    def ask(self, function: str, args: tuple[Any, ...]) -> Any:
        return _call(function, self, *args)

    def _receive(self) -> list[Any]:
        """What SGLang's loop polls in each round."""
        self._polls += 1
        idle = self.scheduler.is_fully_idle()
        if not self._script:
            if idle and self._wait_polls <= 0:
                # One more round, so that on_idle has checked the pools since the last answer.
                if self._wait_idle:
                    self.scheduler.gracefully_exit = True
                self._wait_idle = True
            self._wait_polls -= 1
            return []
        if self._wait_idle and not idle:
            return []
        if self._wait_polls > 0:
            self._wait_polls -= 1
            return []
        self._wait_idle = False
        item = self._script.pop(0)
        if isinstance(item, dict):
            return [self._tokenized(item)]
        if isinstance(item, list):
            return [self._tokenized(spec) for spec in item]
        if item[0] == "idle":
            self._wait_idle = True
        elif item[0] == "polls":
            self._wait_polls = item[1]
        elif item[0] == "abort":
            from sglang.srt.managers.io_struct import AbortReq

            return [AbortReq(rid=item[1])]
        elif item[0] == "flush":
            self.scheduler.flush_cache()
        elif item[0] == "call":
            self.ask(item[1], tuple(item[2:]))
        else:
            raise ValueError(f"unknown script item {item!r}")
        return []

    def _tokenized(self, spec: dict[str, Any]) -> Any:
        from array import array

        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        self.specs[spec["rid"]] = spec
        custom = {} if spec["kvshare"] is None else {"kvshare": spec["kvshare"]}
        params = SamplingParams(
            **{
                "temperature": 0,
                "ignore_eos": True,
                "max_new_tokens": spec["new"],
                **spec["sampling"],
            },
            custom_params=custom or None,
        )
        params.normalize(None)
        want_logprob = spec["logprob_start"] is not None
        names = getattr(TokenizedGenerateReqInput, "__struct_fields__", ())
        more = {"token_type_ids": None} if "token_type_ids" in names else {}
        more |= {"stream": False, **spec["fields"]}
        if spec["lora"]:
            more["lora_id"] = next(iter(self.runner.lora_manager.loras))
        return TokenizedGenerateReqInput(
            **more,
            rid=spec["rid"],
            input_text=None,
            input_ids=array("q", spec["prompt"]),
            input_embeds=None,
            mm_inputs=None,
            sampling_params=params,
            return_logprob=want_logprob,
            logprob_start_len=spec["logprob_start"] if want_logprob else -1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            extra_key=spec["extra_key"],
            return_hidden_states=spec["hidden_states"],
            priority=spec["priority"],
        )

    def _answer(self, req: Any) -> dict[str, Any]:
        import torch

        info = (req.customized_info or {}).get("kvshare")
        logprob = getattr(req, "logprob", None)
        return {
            "output": list(req.output_ids)[: req.finished_len or None],
            "cached": req.cached_tokens,
            "finish": req.finished_reason.to_json() if req.finished_reason else None,
            "kvshare": dict(info[0]) if info else None,
            "retractions": getattr(req, "retraction_count", 0),
            "logits": self.logits.get(req.rid),
            "input_logprobs": getattr(logprob, "input_token_logprobs_val", None),
            "kv": self.kept.get(req.rid),
            "hidden_states": [torch.tensor(part) for part in req.hidden_states],
        }


def _make_scheduler(server_args: Any, port_args_class: Any) -> Any:
    """What run_scheduler_process does up to its event loop, by version."""
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.runtime_context import publish

    try:
        from sglang.srt.runtime_context import SpawnRanks
    except ImportError:  # 0.5.17
        port_args = port_args_class.init_new(server_args)
        publish(server_args, role="scheduler")
        ranks = dict.fromkeys(
            ("gpu_id", "tp_rank", "moe_ep_rank", "pp_rank", "attn_cp_rank", "moe_dp_rank"), 0
        )
        return Scheduler(server_args, port_args, **ranks, dp_rank=None)
    if hasattr(server_args, "resolve_once"):
        server_args.resolve_once()
    server_args.check_server_args()
    port_args = port_args_class.init_new(server_args)
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    return Scheduler(server_args, port_args)


def _call(function: str, *args: Any) -> Any:
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)(*args)
