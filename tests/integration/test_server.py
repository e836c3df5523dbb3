"""What a user sees of a real ``python -m sglang.launch_server --kvshare`` over HTTP."""

import asyncio
import concurrent.futures
import dataclasses
import json
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
import transformers
from conftest import Texts
from lab import computed
from server import ARGS, Server, forked, main, refuse, serve
from starlette.applications import Starlette

from kvshare_sglang.bench import common, passages
from kvshare_sglang.bench.text import chat, served
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.errors import UnsupportedError
from kvshare_sglang.router.brain import Brain
from kvshare_sglang.router.metrics import Metrics
from kvshare_sglang.router.prompts import Prompts
from kvshare_sglang.router.server import Proxy, Settings
from kvshare_sglang.runtime import hooks, versions


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Overlap on, chunked prefill and mixed chunks on, metrics on."""
    more = ["--kvshare", "--enable-metrics"]
    more += ["--chunked-prefill-size", "256", "--enable-mixed-chunk"]
    with serve(model, tmp_path_factory.mktemp("server"), *more) as it:
        yield it


def info(answer: dict) -> dict:
    (value,) = answer["meta_info"]["kvshare"]
    return value


def test_moved_text_is_reused_and_reported(server: Server, texts: Texts) -> None:
    a, b = texts.passage(300), texts.passage(250)
    server.generate(a + b)
    answer = server.generate(b + texts.passage(6) + a + texts.passage(10))
    seen = info(answer)
    assert seen["declined"] is None
    assert seen["copied_tokens"] > 350
    assert seen["source_depth"] == 0
    assert seen["exact_tokens"] == answer["meta_info"]["cached_tokens"] == 0
    total = seen["exact_tokens"] + seen["copied_tokens"] + computed(seen)
    assert total == answer["meta_info"]["prompt_tokens"]
    assert "KVShare batch, #reuse-seq: 1" in server.log.read_text()
    page = requests.get(server.url + "/metrics", timeout=30).text
    for kind in ("exact", "copied", "recomputed", "fresh"):
        assert f'kind="{kind}"' in page
    for name in ("lookup_seconds_count", "copy_seconds_count", "declined_requests_total"):
        assert f"sglang:kvshare_{name}" in page


def cached(server: Server) -> float:
    """Prompt tokens that SGLang's metrics call cached, so far."""
    page = requests.get(server.url + "/metrics", timeout=30).text
    lines = [line for line in page.splitlines() if line.startswith("sglang:cached_tokens_total{")]
    return sum(float(line.split()[-1]) for line in lines)


def test_blended_tokens_are_called_cached_nowhere(server: Server, texts: Texts) -> None:
    """In an answer, its details, SGLang's metrics and its log."""
    head, moved = texts.passage(40), texts.passage(300)
    server.generate(head)
    server.generate(moved)
    asked = head + moved + texts.passage(8)
    assert info(server.generate(asked))["copied_tokens"] > 200
    before, start = cached(server), server.log.stat().st_size
    answer = server.generate(asked + texts.passage(20), return_cached_tokens_details=True)
    meta, seen = answer["meta_info"], info(answer)
    exact = seen["exact_tokens"]
    assert 40 <= exact < 60  # and the first rows of what moved, which ran
    assert seen["blended_tokens"] > 200
    assert meta["cached_tokens"] == meta["cached_tokens_details"]["device"] == exact
    assert cached(server) - before == exact
    said = server.log.read_bytes()[start:].decode()
    told = [int(n) for n in re.findall(r"Prefill batch.*#cached-token: (\d+)", said)]
    assert sum(told) == exact


def test_reuse_is_switched_off_and_on_for_those_who_say_nothing(
    server: Server, texts: Texts
) -> None:
    source = texts.passage(300)
    server.generate(source)

    def declined(**more: Any) -> str | None:
        said: str | None = info(server.generate(texts.passage(6) + source, **more))["declined"]
        return said

    for on in (0, 1):
        reply = server.post("/set_internal_state", {"server_args": {"kvshare_reuse": on}})
        assert reply.status_code == 200
        assert declined() == (None if on else "shadow")
        assert declined(custom={"kvshare": "auto"}) is None
        page = requests.get(server.url + "/metrics", timeout=30).text
        gauge = next(line for line in page.splitlines() if "kvshare_shadow_off{" in line)
        assert float(gauge.split()[-1]) == 1 - on


def test_request_options_pass_through_every_endpoint(server: Server) -> None:
    text = "def main(argv):\n    return sum(len(a) for a in argv if a.startswith('x'))\n" * 9
    server.generate("import os\n" + text)
    exact = server.generate("#!python\n" + text, custom={"kvshare": "exact"})
    assert info(exact)["declined"] == "exact_requested"
    assert info(server.generate("# moved\n" + text))["copied_tokens"] > 64
    before = tokens_copied(server)
    body = {"model": "x", "max_tokens": 4, "temperature": 0}
    chat = {**body, "messages": [{"role": "user", "content": text + "once"}]}
    plain = {**body, "prompt": "## other\n" + text + "twice"}
    for path, request in (("/v1/chat/completions", chat), ("/v1/completions", plain)):
        reply = server.post(path, {**request, "custom_params": {"kvshare": "exact"}})
        assert reply.status_code == 200
        assert tokens_copied(server) == before, path
        reply = server.post(path, {**request, "custom_params": {"kvshare": {"budget": 9}}})
        assert reply.status_code == 400
        assert "custom_params.kvshare.budget must be a number in [0, 1], got 9" in reply.text
    for custom in ("exact", ["exact"], 5):
        sampling = {"max_new_tokens": 4, "custom_params": custom}
        reply = server.post("/generate", {"text": text, "sampling_params": sampling})
        assert reply.status_code == 400
        assert (
            f"custom_params must be an object, got {custom!r}" in reply.json()["error"]["message"]
        )
    chat["messages"][0]["content"] = "Again: " + text + "thrice"
    assert server.post("/v1/chat/completions", chat).status_code == 200
    assert tokens_copied(server) > before


def tokens_copied(server: Server) -> float:
    for line in requests.get(server.url + "/metrics", timeout=30).text.splitlines():
        if line.startswith("sglang:kvshare_tokens_total") and 'kind="copied"' in line:
            return float(line.rsplit(" ", 1)[1])
    return 0.0


def test_streaming_and_several_samples(server: Server, texts: Texts) -> None:
    a = texts.passage(400)
    server.generate(a)
    prompt = texts.passage(5) + a + texts.passage(12)
    whole = server.generate(prompt, new=24)
    assert info(whole)["copied_tokens"] > 200
    sampling = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    other = texts.passage(7) + a + texts.passage(12)
    reply = server.post(
        "/generate", {"input_ids": other, "sampling_params": sampling, "stream": True}, stream=True
    )
    events = [line[6:] for line in reply.iter_lines() if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    last = json.loads(events[-2])
    assert len(last["output_ids"]) == 24
    assert info(last)["copied_tokens"] > 200
    many = server.generate(texts.passage(9) + a, sampling={"n": 3, "max_new_tokens": 6})
    assert len(many) == 3
    assert len({tuple(answer["output_ids"]) for answer in many}) == 1, "greedy samples agree"
    # SGLang prefills a prompt of several samples once, with an answer of no tokens: it reuses, and
    # the samples share what it leaves.
    assert all(info(answer)["blended_tokens"] > 200 for answer in many)


@pytest.mark.parametrize("stream", [False, True])
def test_a_token_in_doubt_is_told_however_late_it_comes(
    server: Server, texts: Texts, stream: bool
) -> None:
    """SGLang sends what an answer says of itself with its first tokens."""
    a, late = texts.passage(400), 0
    for doubt in (0.003, 0.01, 0.03, 0.1):
        server.flush()
        server.generate(a)
        sampling = {"temperature": 0, "max_new_tokens": 80, "ignore_eos": True}
        sampling["custom_params"] = {"kvshare": {"budget": 0, "doubt": doubt}}
        body = {"input_ids": texts.passage(5) + a + texts.passage(12), "sampling_params": sampling}
        reply = server.post("/generate", {**body, "stream": stream}, stream=stream)
        if stream:
            events = [line[6:] for line in reply.iter_lines() if line.startswith(b"data: ")]
            meta = json.loads(events[-2])["meta_info"]
        else:
            meta = reply.json()["meta_info"]
        records = meta["kvshare"]
        assert records[0]["copied_tokens"] > 200
        late += len(records) == 2
        if len(records) == 2:
            assert "settled_tokens" not in records[0]
            assert records[1]["settled_tokens"] > 400
            assert records[1]["settled_tokens"] <= 417 + 79
            assert records[1] == {**records[0], "settled_tokens": records[1]["settled_tokens"]}
    assert late or not stream, "no token was in doubt but the first"
    page = requests.get(server.url + "/metrics", timeout=30).text
    ((labels, settled),) = common.metric(page, "sglang:kvshare_doubts_total")
    assert labels["outcome"] == "settled"
    assert settled > 0


def test_the_router_and_a_real_worker_agree_on_tokens(server: Server, model: Path) -> None:
    """Else no token would ever be handed on, and every prompt would be tokenised twice."""

    async def compared() -> frozenset[str]:
        brain = Brain([server.url], Prompts.load(str(model)), Metrics())
        proxy = Proxy(brain, Settings("http://127.0.0.1:9", ("",)))
        async with proxy.lifespan(Starlette()):
            for _ in range(1200):
                if brain.is_compared(0):
                    break
                await asyncio.sleep(0.1)
            return brain.sure()

    assert "/generate" in asyncio.run(compared())


def test_flush_and_abort(server: Server, texts: Texts) -> None:
    a = texts.passage(300)
    server.generate(a)
    server.flush()
    assert info(server.generate(texts.passage(5) + a))["declined"] == "no_match"
    start = server.log.stat().st_size
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(server.generate, texts.passage(3) + a, new=4000) for _ in range(3)]
        while b"#running-req: 3" not in server.log.read_bytes()[start:]:
            assert not any(job.done() for job in slow)  # they answer 4,000 tokens each
            time.sleep(0.1)
        assert server.post("/abort_request", {"abort_all": True}).status_code == 200
        kinds = {answer.result()["meta_info"]["finish_reason"]["type"] for answer in slow}
    assert kinds == {"abort"}
    assert len(server.generate(texts.passage(3) + a)["output_ids"]) == 8


class Said(chat.Texts):
    """The words of a tokenizer without a chat."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.stop = -1

    def ids(self, text: str, earlier: Any = ()) -> np.ndarray:
        said = " ".join([*(words for turn in earlier for words in turn), text])
        return np.asarray(self._tokenizer(said)["input_ids"], np.int32)


def test_the_bench_asks_real_passages_of_this_server(server: Server, model: Path) -> None:
    """Each arm over the same cache, none over what another left, full prefill over no copy."""
    said, rng = Said(model), random.Random(5)
    words = [rng.choice("the old mill by a long wall of red stone".split()) for _ in range(400)]
    first, second = " ".join(words[:200]), " ".join(words[200:])
    prompt = f"Read this. {second} {first} What is it?"
    one = passages.Asked(prompt, (f"Here: {first} {second}",), ("no",), "no")
    row = served.answers(server, said, one, ["ours", "copies"])
    full, ours, copies = (row["arms"][name] for name in ("full", "ours", "copies"))
    alone = server.ask(said.ids(prompt).tolist(), max_new_tokens=chat.WRITTEN, kvshare="exact")
    assert full["text"] == said.text(alone.output_ids)
    assert 0.1 < ours["recomputed"] < 0.5
    assert copies["recomputed"] < 0.1
    assert copies["computed"] < ours["computed"] < 0.7
    assert ours["same"] == (ours["text"] == full["text"])

    # The next turn goes on from what the first left, in each arm from its own.
    turn = one._replace(prompt="And then?", earlier=((prompt, "It is the mill."),))
    later = served.answers(server, said, turn, ["ours", "copies"])
    full, ours, copies = (later["arms"][name] for name in ("full", "ours", "copies"))
    ids = said.ids(turn.prompt, turn.earlier).tolist()
    alone = server.ask(ids, max_new_tokens=chat.WRITTEN, kvshare="exact")
    assert full["text"] == said.text(alone.output_ids)
    assert later["tokens"] == len(ids) > row["tokens"]
    assert copies["computed"] <= ours["computed"] < 0.2


def test_odd_prompts_are_answered_as_without_kvshare(server: Server) -> None:
    assert len(server.generate([5], new=3)["output_ids"]) == 3
    assert len(server.generate([5] * 5000, new=3)["output_ids"]) == 3
    assert len(server.generate([5] * 5100, new=3)["output_ids"]) == 3
    assert server.generate("é𝄞漢字 \u0000\u200b" * 40, new=3)["meta_info"]["completion_tokens"] == 3
    reply = server.post("/generate", {"input_ids": [5] * 9000})
    assert reply.status_code == 400  # SGLang's own verdict, and it lives on
    assert len(server.generate([5], new=3)["output_ids"]) == 3


def test_a_prompt_of_no_tokens_is_a_400_and_hurts_no_one(server: Server) -> None:
    """Stock SGLang 0.5.22 and 0.5.23 die of it."""
    sampling = {"max_new_tokens": 3}
    bodies: list[tuple[str, dict]] = [
        ("/generate", {"text": ""}),
        ("/generate", {"input_ids": []}),
        ("/generate", {"text": "", "stream": False, "extra_key": "tenant"}),
        ("/v1/completions", {"model": "x", "prompt": "", "max_tokens": 3}),
    ]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        good = [pool.submit(server.generate, [5, 6, 7 + i], new=40) for i in range(3)]
        for path, body in bodies:
            reply = server.post(path, {**body, "sampling_params": sampling})
            assert reply.status_code == 400, (path, body, reply.text)
        assert all(len(answer.result()["output_ids"]) == 40 for answer in good)
    reply = server.post("/generate", {"text": "", "sampling_params": sampling})
    assert "the prompt has 0 tokens, at least 1 is needed" in reply.text
    # One among good ones: SGLang answers a batch as a whole, and lives on.
    server.post("/generate", {"text": ["some text", ""], "sampling_params": sampling})
    assert len(server.generate([5], new=3)["output_ids"]) == 3


def test_a_word_of_one_tenant_takes_nothing_from_another(server: Server, texts: Texts) -> None:
    """An adapter's id is not for clients to say: SGLang adds it to the key of a tenant."""
    theirs = texts.passage(200)
    server.generate(theirs, extra_key="b")
    server.generate([5], new=1, lora_id="b")
    mine = server.generate([*texts.passage(5), *theirs], extra_key="b")
    assert info(mine)["declined"] is None
    assert info(mine)["copied_tokens"] > 100


def test_a_random_mix_leaves_a_healthy_server(server: Server, texts: Texts) -> None:
    """Requests, streams cut off, aborts and flushes from six clients at once."""
    passages = [texts.passage(n) for n in (120, 300, 90, 210, 400)]
    start = server.log.stat().st_size

    def client(seed: int) -> int:
        rng, fresh = random.Random(seed), Texts(seed)
        reused = 0
        for i in range(40):
            prompt = fresh.passage(rng.randrange(0, 20))
            for passage in rng.sample(passages, rng.randrange(1, 4)):
                prompt += passage[rng.randrange(0, 30) :]
            roll = rng.random()
            if roll < 0.1:
                server.post("/flush_cache")
            elif roll < 0.2:
                rid = f"{seed}-{i}"
                body = {"input_ids": prompt, "rid": rid, "stream": True}
                reply = server.post("/generate", body, stream=True)
                next(reply.iter_lines(), None)
                server.post("/abort_request", {"rid": rid})
                reply.close()
            else:
                extra = {"extra_key": "tenant"} if rng.random() < 0.3 else {}
                answer = server.generate(prompt, new=rng.randrange(1, 30), **extra)
                reused += info(answer)["copied_tokens"] > 0
                assert answer["meta_info"]["finish_reason"]["type"] == "length"
        return reused

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(client, range(6))) > 20
    server.generate([5], new=1)
    log = server.log.read_bytes()[start:]
    assert b"memory leak" not in log
    assert b"Traceback" not in log
    assert server.process.poll() is None


# ---- starting --------------------------------------------------------------------------------


def test_help_lists_every_option() -> None:
    done = forked(main, "sglang.launch_server", "--help")
    assert done.returncode == 0
    for field in dataclasses.fields(KVShareConfig):
        assert "--kvshare-" + field.name.replace("_", "-") in done.said
    assert "--kvshare " in done.said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--kvshare-budget", "1.5"], "--kvshare-budget must be float in [0, 1], got 1.5"),
        (["--kvshare-scope", "global"], "drop --kvshare-scope global"),
        (["--kvshare-calibration", "none.json"], "calibration none.json cannot be read: No such"),
        (["--tp-size", "2"], "does not serve tensor parallelism yet: drop --tp-size (got 2)"),
        (["--disable-radix-cache"], "drop --disable-radix-cache"),
        (["--enable-hierarchical-cache"], "does not serve HiCache yet"),
        (["--speculative-algorithm", "NGRAM"], "does not serve speculative decoding yet"),
        (["--radix-eviction-policy", "tlru"], "drop --radix-eviction-policy (got 'tlru')"),
        (["--enable-return-aux-hidden-states"], "does not serve auxiliary hidden states yet"),
        (["--enable-nvidia-megakernel"], "drop --enable-nvidia-megakernel"),
        (["--enable-amd-monokernel"], "drop --enable-amd-monokernel"),
        (["--enable-kv-cache-sharding"], "drop --enable-kv-cache-sharding"),
        (
            ["--rl-on-policy-target", "fsdp", "--attention-backend", "triton"],
            "does not serve deterministic mode yet",
        ),
    ],
)
def test_what_is_not_served_ends_the_start_with_one_line(
    model: Path, args: list[str], message: str
) -> None:
    printed = refuse(model, "--kvshare", *args)
    assert message in printed
    assert "Traceback" not in printed


def test_an_option_without_the_switch_is_an_error(model: Path) -> None:
    assert "--kvshare-budget given without --kvshare" in refuse(model, "--kvshare-budget", "0.2")


def load_with_launcher(launcher: str | None) -> None:
    """What a process of a server does first; None: it is its own parent's."""
    os.environ["KVSHARE_LAUNCHER"] = str(os.getppid()) if launcher is None else launcher
    from sglang.srt.plugins import load_plugins

    load_plugins()
    print("MISSING", len(hooks.missing()), "OF", len(hooks.WRAPPED))


def test_a_launcher_of_another_server_changes_nothing() -> None:
    """The variable that tells spawned processes of kvshare counts only from their own parent."""
    count = len(hooks.WRAPPED)
    for launcher, missing in (("garbage", count), ("1", count), (None, 0)):
        done = forked(load_with_launcher, launcher)
        assert f"MISSING {missing} OF {count}" in done.said


def start_without_a_seam() -> None:
    from sglang.srt.managers import schedule_policy

    del schedule_policy.PrefillAdder.add_one_req
    main("sglang.launch_server", "--model-path", "dummy", "--kvshare", *ARGS)


def test_a_missing_seam_stops_the_start_by_name() -> None:
    done = forked(start_without_a_seam)
    assert done.returncode != 0
    assert "kvshare refuses to start" in done.said
    assert "PrefillAdder.add_one_req" in done.said


def test_a_version_outside_the_range_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ((0, 5, 16), (0, 5, 24), (0, 6, 0)):
        monkeypatch.setattr(versions, "sglang_version", lambda version=version: version)
        with pytest.raises(UnsupportedError, match=r"\.".join(map(str, version))):
            versions.check_version()
    monkeypatch.setenv(versions.TRY, "0.6.0")
    versions.check_version()  # let in by name, and no other
    monkeypatch.setattr(versions, "sglang_version", lambda: (0, 6, 1))
    with pytest.raises(UnsupportedError, match=r"SGLang 0\.6\.1"):
        versions.check_version()


# One that is tried may be one of them: each once, or pytest renames both.
VERSIONS = dict.fromkeys(["0.5.17", "0.5.21", *os.environ.get(versions.TRY, "").split()])


def greedy(model: Path, prompt: list[int], new: int) -> list[int]:
    """What transformers answers: full prefill for each token, and no token of it a near tie."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            best = reference(torch.tensor([ids])).logits[0, -1].topk(2)
        assert best.values[0] - best.values[1] > 0.01
        ids.append(int(best.indices[0]))
    return ids[len(prompt) :]


@pytest.mark.parametrize("version", list(VERSIONS))
def test_another_version_starts_reuses_and_stays_exact(
    version: str, model: Path, tmp_path: Path, texts: Texts
) -> None:
    """The last for torch 2.11, which GPU machines may have, and the one before 0.5.22's caches."""
    folder = Path(sys.prefix) / f"sglang-{version}"
    if not folder.exists():
        pytest.skip(f"SGLang {version} is not installed; scripts/test.sh does it")
    a, b = texts.passage(300), texts.passage(200)
    prompt = b + texts.passage(6) + a + texts.passage(10)
    expected = greedy(model, prompt, 8)
    with serve(model, tmp_path, "--kvshare", "--kvshare-calibration", "off", sglang=folder) as it:
        it.generate(a + b)
        seen = info(it.generate(prompt, custom={"kvshare": "exact"}))
        assert seen["declined"] == "exact_requested"
        it.flush()
        it.generate(a + b)
        reused = it.generate(prompt)
        assert info(reused)["copied_tokens"] > 350
        # It is a prefix from then on: again, of the next turn, and of samples.
        again = it.generate(prompt)
        assert computed(info(again)) <= 2
        assert again["output_ids"] == reused["output_ids"]
        turn = info(it.generate([*prompt, *reused["output_ids"], *texts.passage(20)]))
        assert turn["blended_tokens"] > 350
        assert computed(turn) <= 20 + 15 + 2
        samples = it.post("/generate", {"input_ids": prompt, "sampling_params": {"n": 2}}).json()
        assert all(computed(info(one)) <= 2 for one in samples)
        exact = it.generate(prompt, custom={"kvshare": "exact"})
        assert exact["output_ids"] == expected
        # What other embeddings made, which these versions cache under the tokens, nobody copies.
        text = texts.passage(300)
        body = {"query": text, "items": [[7]], "label_token_ids": [5, 6], "model": "x"}
        body |= {"embed_override_token_id": text[9], "query_embed_overrides": [[3.0] * 128]}
        body["query_embed_overrides"] *= text.count(text[9])
        assert it.post("/v1/score", body).status_code == 200
        assert info(it.generate(texts.passage(5) + text))["copied_tokens"] == 0
        assert "memory leak" not in it.log.read_text()
