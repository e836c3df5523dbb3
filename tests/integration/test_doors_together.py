"""Every door at once, on a server whose chunks and memory are smaller than what it is asked."""

import collections
import concurrent.futures
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import requests
from doors import DOORS, NATIVE, Door, events, told
from lab import computed
from server import Server, serve

CLIENTS, REQUESTS = 8, 12
NAMED = ("--served-model-name", "x")
# How often memory runs out is a matter of time. SGLang takes one back by itself every so often.
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Chunks of 64, mixed, room for some eight answers, and requests that are retracted."""
    args = ["--kvshare", "--chunked-prefill-size", "64", "--enable-mixed-chunk", *NAMED]
    args += ["--schedule-conservativeness", "0.05", "--max-total-tokens", "2000"]
    args += ["--schedule-policy", "kvshare", "--kvshare-schedule-bound", "2000"]
    args += ["--enable-cache-report"]
    with serve(model, tmp_path_factory.mktemp("together"), *args, env=RETRACT) as it:
        yield it


class Wanted(NamedTuple):
    """What one request asks for."""

    door: Door
    text: str
    header: str
    stream: bool
    more: dict[str, Any]  # of its body
    samples: int
    stranger: bool  # a tenant of its own, whom nothing is given
    cut: bool  # its client goes away after the first event


def wanted(rng: random.Random, name: str, documents: list[str]) -> Wanted:
    door = rng.choice([door for door in DOORS if door.path != "/v1/responses"])
    some = rng.sample(documents, rng.randrange(1, 4))
    if rng.random() < 0.3:  # an edit
        words = some[0].split()
        words[rng.randrange(len(words))] = "otherwise"
        some[0] = " ".join(words)
    text = " ".join([rng.choice(["Read", "Here is", "So"]), *some, name])
    new, samples, stranger = rng.choice([1, 8, 64]), 1, False
    more: dict[str, Any] = {}
    if door.path in NATIVE:
        sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        if rng.random() < 0.5:
            more |= {"return_logprob": True, "logprob_start_len": rng.choice([-1, 0, 0, 7])}
            more |= {"top_logprobs_num": rng.choice([0, 2])}
        if rng.random() < 0.2:
            sampling["n"] = samples = 3
        if rng.random() < 0.2:
            more["extra_key"], stranger = name, True
        more["sampling_params"] = sampling
    else:
        more |= {"max_tokens": new, "ignore_eos": True}
    if door.path in ("/v1/completions", "/v1/chat/completions"):
        if rng.random() < 0.4:
            chat = door.path == "/v1/chat/completions"
            more |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
        if rng.random() < 0.2:
            more["n"] = samples = 2
        if rng.random() < 0.2:
            more["cache_salt"], stranger = name, True
    header = rng.choice(["auto", "auto", "auto", "exact", "0.4"])
    stream = rng.random() < 0.5
    cut = stream and rng.random() < 0.3
    return Wanted(door, text, header, stream, more, samples, stranger, cut)


def ask(server: Server, it: Wanted) -> requests.Response | None:
    body = it.door.body(it.text, **it.more, stream=it.stream)
    headers = {"X-KVShare": it.header}
    if not it.cut:
        return server.post(it.door.path, body, headers=headers)
    with server.post(it.door.path, body, headers=headers, stream=True) as reply:
        assert reply.status_code == 200, reply.text
        next(reply.iter_lines())
    return None


def records_of(it: Wanted, reply: requests.Response) -> list[dict[str, Any]]:
    """One of each sample."""
    if it.door.path not in NATIVE:
        return told(it.door, reply)
    return [record for info in infos(reply) for record in info["kvshare"]]


def infos(reply: requests.Response) -> list[dict[str, Any]]:
    """What /generate and Vertex say of each sample, in its last event."""
    found = events(reply)
    each = found[0] if isinstance(found[0], list) else found
    last = {one.get("index", i if each is found[0] else 0): one for i, one in enumerate(each)}
    return [one["meta_info"] for one in last.values()]


def input_logprobs(reply: requests.Response) -> list[float]:
    """Of the prompt of such an answer."""
    (info,) = infos(reply)
    return [one[0] for one in info["input_token_logprobs"]]


def test_every_door_at_once_in_too_little_room(server: Server) -> None:
    """Logprobs of prompts and answers, samples, streams that are cut, edits and strangers, eight at
    a time, while requests are retracted: every answer is whole and its report adds up, strangers
    get nothing, who wants logprobs of a prompt gets its own, and the server lives."""
    rng = random.Random(11)
    words = [f"w{i}" for i in range(300)]
    documents = [" ".join(rng.choices(words, k=n)) for n in (40, 90, 60, 120, 75)]
    seen: collections.Counter[str] = collections.Counter()
    # Alone each is reused; at once that is a matter of what is evicted when.
    for document in (one for one in documents if len(one.split()) > 80):
        server.generate(document)
        told = server.generate(f"So {document}")["meta_info"]["kvshare"][0]
        assert told["copied_tokens"] > 0, told

    def client(seed: int) -> list[tuple[Wanted, list[float]]]:
        rng, exact = random.Random(seed + 100), []
        for i in range(REQUESTS):
            it = wanted(rng, f"question {seed} {i}", documents)
            reply = ask(server, it)
            seen["cut"] += reply is None
            if reply is None:
                continue
            records = records_of(it, reply)
            assert len(records) == it.samples
            native = it.door.path in NATIVE
            prompt = infos(reply)[0]["prompt_tokens"] if native else 0
            for one in records:
                led = one["exact_tokens"] + one["blended_tokens"]
                assert not native or led + one["copied_tokens"] + computed(one) == prompt, one
                assert it.header != "exact" or one["copied_tokens"] == one["blended_tokens"] == 0
                seen[str(one["declined"])] += 1
                seen["copied"] += one["copied_tokens"] > 0
                if it.stranger:  # several samples share the prompt of the first
                    assert one["copied_tokens"] == one["blended_tokens"] == 0, one
                    assert one["exact_tokens"] == 0 or it.samples > 1, one
            if it.more.get("return_logprob") and it.samples == 1:
                (info,) = infos(reply)
                assert len(info["output_token_logprobs"]) == info["completion_tokens"]
                start = it.more["logprob_start_len"]
                asked = info["prompt_tokens"] - start if start >= 0 else 0
                assert len(info["input_token_logprobs"]) == asked
                if start == 0:  # of each token, so that none may be a copy
                    exact.append((it, input_logprobs(reply)))
        return exact

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        exact = [one for some in pool.map(client, range(CLIENTS)) for one in some]
    # What the test is about was there.
    assert seen["copied"] > 0, seen
    assert seen["exact_requested"] > 10, seen
    assert seen["cut"] > 5, seen
    assert len(exact) >= 3
    for it, found in exact:
        server.flush()
        alone = ask(server, it._replace(stream=False))
        assert alone is not None
        np.testing.assert_allclose(found[1:], input_logprobs(alone)[1:], atol=2e-3)
    log = server.log.read_text()
    assert sum(map(int, re.findall(r"#retracted_reqs: (\d+)", log))) > 0
    assert "memory leak" not in log
    assert "Traceback" not in log.split("The server is fired up")[1]
