"""Every door of a server: what a request may ask for, what is refused, what its answer says."""

import collections
import contextlib
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import front_ends
import grpc
import httpx
import odd
import pytest
import requests
from conftest import Texts
from doors import DOORS, NATIVE, VERTEX, Door, chat, events, told
from lab import computed
from server import Server, forked, script, serve, unmeasured

from kvshare_sglang.bench.processes import free_port

CODE = "def main(argv):\n    return sum(len(a) for a in argv if a.startswith('x'))\n" * 9

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
KINDS = ("exact", "blended", "copied", "recomputed", "fresh")

NAMED = ("--served-model-name", "x")
OPTIONS = "kvshare: true\nkvshare-default: auto\nkvshare-seam: 8\nradix-eviction-policy: lru\n"

# As many first tokens may a text share with what other tests asked of the same server: a chat
# template's, and by chance a few more. All that reuses here begins with a number of its own.
SHARED = 16


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Started as ``sglang serve``, by a file of options."""
    folder, grpc_port = tmp_path_factory.mktemp("doors"), free_port()
    args = ("--enable-cache-report", "--enable-metrics", "--grpc-port", str(grpc_port), *NAMED)
    with serve(model, folder, *args, options=OPTIONS) as it:
        it.grpc_port = grpc_port  # type: ignore[attr-defined]
        begin(it)
        yield it


@pytest.fixture(scope="module")
def behind_smg(server: Server) -> Iterator[str]:
    """The address of the real gateway in front of the real server."""
    with front_ends.smg(server.url) as url:
        yield url


def begin(server: Server) -> None:
    """Its cache holds ``CODE`` and nothing else."""
    server.flush()
    server.generate("import os\n" + CODE)


@pytest.fixture(scope="module")
def workers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two processes tokenise; requests that say nothing are exact."""
    folder = tmp_path_factory.mktemp("workers")
    args = ("--kvshare", "--kvshare-default", "exact", "--tokenizer-worker-num", "2", *NAMED)
    with pytest.MonkeyPatch.context() as patch:
        # A worker that takes longer to start is ended and started anew.
        patch.setenv("SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT", "600")
        with serve(model, folder, *args) as it:
            while it.log.read_text().count("Application startup complete") < 2:
                assert it.process.poll() is None, it.log_tail()
                time.sleep(0.1)
            begin(it)
            yield it


WITH_OPTIONS = [door for door in DOORS if door.options]
every_door = pytest.mark.parametrize("door", DOORS, ids=lambda door: door.path)
every_server = pytest.mark.parametrize("name", ["server", "workers"])
both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def doors_of(server: Server) -> list[Door]:
    """SGLang serves Responses only where packages are that a CPU does not need otherwise."""
    without = "(/v1/responses) disabled" in server.log.read_text()
    return [door for door in DOORS if not (without and door.path == "/v1/responses")]


def need(server: Server, door: Door) -> None:
    if door not in doors_of(server):
        pytest.skip("this SGLang serves no Responses: its packages are not installed")


def fresh(door: Door, stream: bool, what: str) -> str:
    """Text that moves ``CODE`` behind a beginning which no other request has, from its first word:
    what reused before may be the prefix of what begins alike."""
    asked = f"{what} {door.path} {stream}"
    return f"{random.Random(asked).randrange(10**6)} {asked}\n" + CODE


def test_sglang_serve_takes_its_options_from_a_file(server: Server) -> None:
    # An eviction policy of SGLang's was named, if only its default: it stays.
    assert unmeasured(default="auto", seam=8, eviction="sglang") in server.log.read_text()


@every_door
@both_ways
def test_the_answer_says_what_was_reused(server: Server, door: Door, stream: bool) -> None:
    need(server, door)
    reply = server.post(door.path, door.body(fresh(door, stream, "seen"), stream=stream))
    (seen,) = told(door, reply)
    assert seen["declined"] is None
    assert seen["copied_tokens"] > 64
    led = seen["exact_tokens"] + seen["blended_tokens"]
    assert led <= SHARED
    whole = led + seen["copied_tokens"] + computed(seen)
    if door.path.startswith("/api/"):  # Ollama's own words have no place for what was cached
        (*_, last) = events(reply)
        assert whole == last.get("prompt_eval_count", whole)
        return
    # Next to it stands what SGLang says: the exact prefix alone is called cached.
    usage: dict[str, Any] = {}
    for event in events(reply):
        event = event.get("message", event)
        usage |= event.get("usage") or event.get("meta_info") or {}
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or usage
    cached = details.get("cached_tokens", details.get("cache_read_input_tokens", 0))
    assert cached == seen["exact_tokens"] < seen["copied_tokens"]
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    prompt += cached * (door.path == "/v1/messages")  # there the two are apart
    assert whole == prompt


@every_door
@both_ways
def test_a_conversation_goes_on_as_a_prefix(server: Server, door: Door, stream: bool) -> None:
    """The next turn of text that reused costs its new text and some repair, at every door; other
    words in front make it reuse again; a turn that asks for exact takes nothing of it."""
    need(server, door)
    question = fresh(door, stream, "talk")
    rng = random.Random(question)
    last = "\n" + " ".join(str(rng.randrange(10**6)) for _ in range(15))  # as nothing else here

    def turn(front: str, *, header: str = "auto", more: bool) -> dict[str, Any]:
        said = [front + question, *(["So it is.", last] if more else [])]
        body = door.body("".join(said), stream=stream)
        roles = ("user", "assistant", "user")
        talk = [{"role": r, "content": text} for r, text in zip(roles, said, strict=False)]
        for key in ("messages", "input"):
            if key in body:
                body[key] = talk
        (seen,) = told(door, server.post(door.path, body, headers={"X-KVShare": header}))
        return seen

    first = turn("", more=False)
    before = sum(first[f"{kind}_tokens"] for kind in KINDS)
    assert first["copied_tokens"] > 64
    second = turn("", more=True)
    new = second["fresh_tokens"]
    assert second["blended_tokens"] > 64
    # a template may end what it began otherwise, and the tokens where texts meet may be others
    led = second["exact_tokens"] + second["blended_tokens"] + second.get("repaired_tokens", 0)
    assert led >= before - SHARED
    assert second["copied_tokens"] == 0
    assert computed(second) <= new + max(15, new // 4) + SHARED
    other = turn(f"{rng.randrange(10**6)} is another beginning.\n", more=True)
    assert other["copied_tokens"] > 64
    assert other["exact_tokens"] + other["blended_tokens"] <= SHARED
    exact = turn("", header="exact", more=True)
    assert exact["declined"] == "exact_requested"
    assert exact["blended_tokens"] == 0


@every_door
@both_ways
def test_a_header_says_how(server: Server, door: Door, stream: bool) -> None:
    need(server, door)

    def ask(header: str) -> dict[str, Any]:
        body = door.body(fresh(door, stream, header), stream=stream)
        (seen,) = told(door, server.post(door.path, body, headers={"X-KVShare": header}))
        return seen

    assert ask("exact")["declined"] == "exact_requested"
    assert ask("auto")["copied_tokens"] > 64
    none, some = ask("0"), ask("budget=0.4")
    assert none["copied_tokens"] > some["copied_tokens"] > 0
    assert none["recomputed_tokens"] < some["recomputed_tokens"]
    assert ask("1")["copied_tokens"] == 0


@every_door
@both_ways
def test_a_bad_header_is_a_400_that_names_it(server: Server, door: Door, stream: bool) -> None:
    body = door.body("some text", stream=stream)
    for bad in ("exakt", "1.5", "-0.1", "nan", "budget=", "exact, auto", "0.1;0.2", ""):
        reply = server.post(door.path, body, headers={"X-KVShare": bad})
        assert reply.status_code == 400, (bad, reply.text)
        message = reply.json()["error"]["message"]
        assert message == (
            "the header X-KVShare must be auto, exact, or a budget in [0, 1] such as 0.3 or "
            f"budget=0.3, got {bad!r}"
        )
    for name, values in (("X-KVShare", ("auto", "exact")), ("X-KVShare-Salt", ("a", "b"))):
        twice = [(name, value) for value in values]
        reply = httpx.post(server.url + door.path, json=body, headers=twice, timeout=60)
        assert reply.status_code == 400, (name, reply.text)
        assert reply.json()["error"]["message"] == f"the header {name} must be there once, got 2"


@every_door
def test_a_header_names_the_tenant(server: Server, door: Door) -> None:
    """Also where a body has no place for a salt; who names none is another."""
    need(server, door)

    def copied(front: str, tenant: str | None, **more: Any) -> int:
        body = door.body(f"{front} {fresh(door, False, 'salt')}", **more)
        headers = {} if tenant is None else {"X-KVShare-Salt": tenant}
        (seen,) = told(door, server.post(door.path, body, headers=headers))
        return int(seen["copied_tokens"])

    mine, other = f"1{door.path}", f"2{door.path}"
    assert copied("One.", mine) == 0
    assert copied("Two.", mine) > 64
    assert copied("Three.", other) == 0
    assert copied("Four.", None) > 64  # of what was cached without one
    if door.path in ("/generate", "/v1/chat/completions"):
        # A client names the other tenant, from within its own.
        assert copied("Five.", mine, cache_salt=other) == 0
        assert copied("Six.", mine, cache_salt=other) > 64


@pytest.mark.parametrize("door", WITH_OPTIONS, ids=lambda door: door.path)
@both_ways
def test_a_body_comes_before_the_header(server: Server, door: Door, stream: bool) -> None:
    exact = {"X-KVShare": "exact"}
    body = door.asking(fresh(door, stream, "body"), {"budget": 0}, stream=stream)
    (seen,) = told(door, server.post(door.path, body, headers=exact))
    assert seen["copied_tokens"] > 64
    body = door.asking(fresh(door, stream, "none"), None, stream=stream)
    (seen,) = told(door, server.post(door.path, body, headers=exact))
    assert seen["declined"] == "exact_requested"


@pytest.mark.parametrize("door", WITH_OPTIONS, ids=lambda door: door.path)
@both_ways
def test_bad_options_are_a_400(server: Server, door: Door, stream: bool) -> None:
    reply = server.post(door.path, door.asking("text", {"budget": 9}, stream=stream))
    if stream and door.path in NATIVE:  # here SGLang says so of all that it refuses
        (event,) = events(reply)
        assert event["error"]["code"] == 400
    else:
        assert reply.status_code == 400
    assert "custom_params.kvshare.budget must be a number in [0, 1], got 9" in reply.text


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example_answers_and_tells_what_it_reused(server: Server, name: str) -> None:
    begin(server)
    done = forked(script, str(EXAMPLES / f"{name}.py"), "--url", server.url)
    assert done.returncode == 0, done.said
    shown = re.findall("".join(rf"\W*{kind} (\d+)" for kind in KINDS), done.said)
    first, *later = (dict(zip(KINDS, map(int, one), strict=True)) for one in shown)
    assert len(later) >= 2, done.said
    assert first["copied"] + first["blended"] == 0 < first["fresh"]
    assert sum(one["copied"] for one in later) > 64, done.said


@every_server
def test_no_option_hurts_the_server(name: str, request: pytest.FixtureRequest) -> None:
    """Odd values through every door: what is bad is refused in words, all else is served."""
    server: Server = request.getfixturevalue(name)
    rng, start = random.Random(7), server.log.stat().st_size
    deep: Any = "exact"
    for _ in range(300):
        deep = [deep]
    tried = [odd.options(rng) for _ in range(60)] + [*odd.numbers()]
    verdicts = collections.Counter[bool]()
    for i, option in enumerate([*tried, deep]):
        door = WITH_OPTIONS[i % len(WITH_OPTIONS)]
        # requests refuses nan and inf; clients that write them are served or told off.
        body = json.dumps(door.asking(f"text {i}", option))
        reply = requests.post(
            server.url + door.path, body, headers={"Content-Type": "application/json"}, timeout=60
        )
        said = odd.refusal(option)
        verdicts[said is None] += 1
        assert reply.status_code == (200 if said is None else 400), (option, reply.text)
        if said is not None:  # some doors round large numbers before they come to us
            said, _, _ = said.partition("got ")
            words = (json.dumps(said, ensure_ascii=False)[1:-1], "json_invalid")  # as nan is
            assert any(one in reply.text for one in words), (option, reply.text)
    assert min(verdicts[True], verdicts[False]) > 10, verdicts
    for header in (
        "9" * 5000,
        "\xff\xfe",
        "0." + "3" * 4000,
        "=" * 100,
        "budget=budget=1",
        "ttl=5",
    ):
        for door in doors_of(server):
            reply = server.post(door.path, door.body("x"), headers={"X-KVShare": header})
            assert reply.status_code in (200, 400), reply.text
            assert len(reply.content) < 2000
    assert len(server.generate([5], new=3)["output_ids"]) == 3
    assert b"Traceback" not in server.log.read_bytes()[start:]


@every_server
def test_no_shape_of_a_request_ends_the_server(
    name: str, request: pytest.FixtureRequest, texts: Texts
) -> None:
    """Each over text that moved, so that it would reuse: served, or refused in words."""
    server: Server = request.getfixturevalue(name)
    moved = texts.passage(200)
    server.generate(moved)
    for wrong, words in odd.FIELDS:
        body: dict[str, Any] = {"input_ids": [*texts.passage(5), *moved, 7]}
        body["sampling_params"] = {"temperature": 0, "max_new_tokens": 2}
        for asked in (wrong, {**wrong, "stream": True}):
            try:
                said = server.post("/generate", {**body, **asked}).text
            except requests.RequestException:  # some faults end a stream of SGLang's, here too
                assert words is None, wrong
            else:
                assert words is None or words in said, (wrong, said)
            assert len(server.generate([5], new=3)["output_ids"]) == 3, wrong
    for wrong, words in odd.PARAMETERS:
        params = {"max_new_tokens": 2, **wrong}  # drawn: top_k counts
        body = {"instances": [{"input_ids": [5, 6]}], "parameters": {"sampling_params": params}}
        reply = server.post(VERTEX, body)
        assert reply.status_code == 400, (wrong, reply.text)
        assert words in reply.text, (wrong, reply.text)
    score = {
        "query": [5, 6, 7],
        "items": [[7]],
        "label_token_ids": [5],
        "embed_override_token_id": 6,
    }
    for path, one in (
        ("/v1/completions", {"prompt": [10**9]}),
        ("/v1/completions", {"prompt": "some", "logprobs": 10**6}),
        ("/v1/completions", {"prompt": "some", "logit_bias": {"99999999": 1}}),
        ("/v1/completions", {"prompt": "some", "logit_bias": {"5": 1e300}, "top_k": 5}),
        ("/v1/completions", {"prompt": "some", "top_k": 2**31}),
        ("/v1/chat/completions", {**chat("some"), "top_k": 2**31, "stream": True}),
        ("/v1/score", {**score, "query_embed_overrides": [[3.0] * 64]}),
        ("/v1/score", {**score, "query_embed_overrides": [[3.0] * 128], "items": [[7], [8]]}),
        ("/v1/chat/completions", {**chat("some"), "logprobs": True, "top_logprobs": 10**6}),
    ):
        server.post(path, {"model": "x", "max_tokens": 2, **one})
        assert len(server.generate([5], new=3)["output_ids"]) == 3, one


def test_batches_and_samples_are_judged_before_any_is_sent(server: Server) -> None:
    text = ["one " + CODE, "two " + CODE]
    each = {"temperature": 0, "max_new_tokens": 3}
    good = [each, {**each, "custom_params": {"kvshare": "exact"}}]
    answers = server.post("/generate", {"text": text, "sampling_params": good}).json()
    first, second = (answer["meta_info"]["kvshare"][0] for answer in answers)
    assert first["declined"] != "exact_requested" == second["declined"]
    headers = {"X-KVShare": "exact"}
    reply = server.post("/generate", {"text": text, "sampling_params": each}, headers=headers)
    for answer in reply.json():
        assert answer["meta_info"]["kvshare"][0]["declined"] == "exact_requested"
    # One among good ones: the batch is refused, and no part of it was computed.
    bad = [each, {**each, "custom_params": {"kvshare": "exakt"}}]
    before = server.log.read_text().count("Prefill batch")
    reply = server.post("/generate", {"text": text, "sampling_params": bad})
    assert reply.status_code == 400
    assert "custom_params.kvshare.mode must be one of auto, exact, got 'exakt'" in reply.text
    assert len(server.generate([5], new=3)["output_ids"]) == 3
    assert server.log.read_text().count("Prefill batch") == before + 1
    for nested in ([[each]], [None, 3], "exact", [{}]):
        reply = server.post("/generate", {"text": text, "sampling_params": nested})
        assert reply.status_code in (200, 400, 422, 500), reply.text  # as without kvshare
    assert len(server.generate([5], new=3)["output_ids"]) == 3
    # Several prompts of Vertex's.
    several = {
        "instances": [{"text": one} for one in text],
        "parameters": {"sampling_params": each},
    }
    for answer in server.post(VERTEX, several, headers=headers).json()["predictions"]:
        assert answer["meta_info"]["kvshare"][0]["declined"] == "exact_requested"
    # A record for each sample of a prompt, in their order.
    for stream in (False, True):
        for door in DOORS[1:3]:
            body = door.body(fresh(door, stream, "samples"), n=3, stream=stream)
            reply = server.post(door.path, body, headers={"X-KVShare": "exact"})
            declined = [record["declined"] for record in told(door, reply)]
            assert declined == ["exact_requested"] * 3


ASKED = {"type": "choice", "instructions": "Which?", "criteria": {"a": "one", "b": "two"}}
NAMES = [{"name": "one"}, {"name": "two"}]
# Doors that answer with scores: what they are asked of a text, where the scores stand, how many
# prompts that is.
SCORES: dict[str, tuple[Callable[[str], dict[str, Any]], str, int]] = {
    "/v1/score": (
        lambda text: {"query": text, "items": ["yes", "no"], "label_token_ids": [5, 6]},
        "scores",
        2,
    ),
    "/v1/decisions": (
        lambda text: {
            "input": text,
            "questions": [{"id": "a", "type": "choice", "question": "Which?", "options": NAMES}],
        },
        "answers",
        1,
    ),
    "/v1/systemone": (
        lambda text: {"model": "x", "state": text, "questions": {"a": ASKED}},
        "answers",
        1,
    ),
}


def declined(server: Server, reason: str) -> float:
    """How many requests the server counted as declined for it."""
    counted = rf'^sglang:kvshare_declined_requests_total{{.*reason="{reason}".*}} (.*)$'
    found = re.findall(
        counted, requests.get(server.url + "/metrics", timeout=60).text, re.MULTILINE
    )
    return sum(map(float, found))


@pytest.fixture
def other_text(server: Server) -> Iterator[None]:
    """What is cached may be anything; afterwards it is ``CODE`` again."""
    yield
    begin(server)


def test_scores_are_exact_and_counted(server: Server, other_text: None) -> None:
    """They have no answer for which anything would be saved, and no place for a record."""
    numbers = re.compile(r"[-\d.]+(?:e[-\d]+)?")
    bodies = {
        path: asked(fresh(Door(path, ()), False, "scored"))
        for path, (asked, _, _) in SCORES.items()
    }

    def scores(path: str, header: str, reason: str) -> tuple[str, list[float]]:
        _, place, prompts = SCORES[path]
        before = declined(server, reason)
        reply = server.post(path, bodies[path], headers={"X-KVShare": header})
        assert reply.status_code == 200, reply.text
        assert declined(server, reason) == before + prompts
        said = json.dumps(reply.json()[place])
        return numbers.sub("", said), [float(number) for number in numbers.findall(said)]

    found = {path: scores(path, "0.3", "prefill_only") for path in SCORES}
    server.flush()
    for path, (words, values) in found.items():
        alone = scores(path, "exact", "exact_requested")
        assert words == alone[0]
        assert values == pytest.approx(alone[1], rel=1e-3)
        bad = server.post(path, bodies[path], headers={"X-KVShare": "exakt"})
        assert bad.status_code == 400
        assert "got 'exakt'" in bad.text


def test_what_was_scored_is_its_tenants(server: Server) -> None:
    """It stays in the cache, for whoever names no salt where the header names none."""
    begin(server)
    passage = " ".join(random.Random(3).sample(CODE.split() * 3, 120))
    asked, _, _ = SCORES["/v1/score"]

    def copied(front: str, headers: dict[str, str]) -> int:
        body = DOORS[0].body(f"{front} {passage}")
        (seen,) = told(DOORS[0], server.post("/generate", body, headers=headers))
        return int(seen["copied_tokens"])

    salted = {"X-KVShare-Salt": "scores"}
    reply = server.post("/v1/score", asked(passage), headers=salted)
    assert reply.status_code == 200, reply.text
    assert copied("A stranger.", {}) == 0
    assert copied("Its owner.", salted) > 64
    begin(server)


def test_a_session_is_exact_and_says_why(server: Server, other_text: None, texts: Texts) -> None:
    """Each turn of one that SGLang holds, over text that was copied and would be again."""
    document = texts.passage(200)
    server.generate(document)
    first = [*texts.passage(5), *document]
    assert server.generate(first)["meta_info"]["kvshare"][0]["copied_tokens"] > 64
    session = server.post("/open_session", {"capacity_of_str_len": 10**6}).json()
    turns = [first, [*texts.passage(4), *document], texts.passage(3)]
    so_far: list[int] = []
    seen: list[tuple[list[int], list[int]]] = []
    params = {"id": session}
    for turn in turns:
        answer = server.generate(turn, session_params=params)
        (record,) = answer["meta_info"]["kvshare"]
        assert record["declined"] == "session"
        assert record["copied_tokens"] == record["blended_tokens"] == 0
        so_far = [*so_far, *turn]
        seen.append((so_far, answer["output_ids"]))
        so_far = [*so_far, *answer["output_ids"]]
        params = {"id": session, "rid": answer["meta_info"]["id"]}
    answer = server.generate([7], session_params=params, custom={"kvshare": "exact"})
    assert answer["meta_info"]["kvshare"][0]["declined"] == "exact_requested"
    body = {"input_ids": [7], "session_params": params}
    bad = server.post("/generate", body, headers={"X-KVShare": "exakt"})
    assert bad.status_code == 400
    bad = server.post("/generate", body | {"sampling_params": {"custom_params": {"kvshare": 7}}})
    assert bad.status_code == 400
    assert server.post("/close_session", {"session_id": session}).status_code == 200
    reply = server.post("/generate", body)
    assert reply.status_code == 400
    assert "does not exist" in reply.text
    server.flush()
    for prompt, output in seen:
        assert server.generate(prompt, custom={"kvshare": "exact"})["output_ids"] == output


GRPC = [(door, name) for door, name in zip(DOORS[1:3], ("Complete", "ChatComplete"), strict=True)]


@pytest.mark.parametrize(("door", "method"), GRPC, ids=[name for _, name in GRPC])
@both_ways
def test_native_grpc_is_a_door_as_http_is(
    server: Server, door: Door, method: str, stream: bool
) -> None:
    port = server.grpc_port  # type: ignore[attr-defined]

    def ask(body: dict[str, Any], **headers: str) -> list[dict[str, Any]]:
        return front_ends.openai(port, method, body, **headers)

    def seen(answers: list[dict[str, Any]]) -> dict[str, Any]:
        (record,) = next(a["usage"]["kvshare"] for a in reversed(answers) if a.get("usage"))
        return dict(record)

    def text(what: str) -> str:
        return fresh(door, stream, f"gRPC {what}")

    assert seen(ask(door.body(text("auto"), stream=stream)))["copied_tokens"] > 64
    by_header = ask(door.body(text("header"), stream=stream), **{"x-kvshare": "exact"})
    assert seen(by_header)["declined"] == "exact_requested"
    salted = ask(door.body(text("salt"), stream=stream), **{"x-kvshare-salt": f"{method}{stream}"})
    assert seen(salted)["copied_tokens"] == 0
    by_body = ask(door.asking(text("body"), "exact", stream=stream))
    assert seen(by_body)["declined"] == "exact_requested"
    for refused in (
        ask(door.asking("text", "exakt", stream=stream)),
        ask(door.body("text", stream=stream), **{"x-kvshare": "exakt"}),
    ):
        (error,) = refused
        assert error["code"] == 400
        assert error["message"].endswith("got 'exakt'")
    rng = random.Random(stream)
    for option in [*[odd.options(rng) for _ in range(20)], *odd.numbers()]:
        answers, said = ask(door.asking("text", option, stream=stream)), odd.refusal(option)
        if said is None:
            assert seen(answers)["declined"] in ("no_match", "exact_requested"), option
        else:
            (error,) = answers
            assert (error["code"], error["message"]) == (400, said), option
    for wrong, _ in odd.PARAMETERS:
        with contextlib.suppress(grpc.RpcError):  # SGLang's own check of the body
            ask({**door.body("text", stream=stream), **wrong})
    assert len(server.generate([5], new=3)["output_ids"]) == 3


def test_native_grpc_without_options_gets_the_servers_default(server: Server) -> None:
    text = fresh(DOORS[0], False, "gRPC text")
    (seen,) = json.loads(front_ends.text(server.grpc_port, text)["kvshare"])  # type: ignore[attr-defined]
    assert seen["copied_tokens"] > 64


@pytest.mark.parametrize("door", DOORS[:3], ids=lambda door: door.path)
@both_ways
def test_behind_the_gateway(server: Server, behind_smg: str, door: Door, stream: bool) -> None:
    """smg hands on what the body says and what the answer tells; it drops our header."""

    def ask(body: dict[str, Any], **headers: str) -> requests.Response:
        return requests.post(behind_smg + door.path, json=body, headers=headers, timeout=60)

    def text(what: str) -> str:
        return fresh(door, stream, f"smg {what}")

    (auto,) = told(door, ask(door.body(text("auto"), stream=stream)))
    assert auto["copied_tokens"] > 64
    (exact,) = told(door, ask(door.asking(text("exact"), "exact", stream=stream)))
    assert exact["declined"] == "exact_requested"
    (dropped,) = told(door, ask(door.body(text("header"), stream=stream), **{"X-KVShare": "exact"}))
    assert dropped["declined"] is None
    # A salt goes through, as the router writes it too.
    salted = door.body(text("salt"), stream=stream, cache_salt=f"edge\0{stream}{door.path}")
    (seen,) = told(door, ask(salted))
    assert seen["copied_tokens"] == 0
    refused = ask(door.asking("text", "exakt", stream=stream))
    assert refused.status_code == 400 or (stream and door.path == "/generate")
    assert "got 'exakt'" in refused.text


@contextlib.contextmanager
def alone(server: Server, which: int) -> Iterator[None]:
    """Every request goes to one of two workers: the other is halted."""
    pids = re.findall(r"Start multi-tokenizer worker process (\d+)", server.log.read_text())
    assert len(pids) == 2, "no worker was started anew"
    halted = int(pids[1 - which])
    os.kill(halted, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(halted, signal.SIGCONT)


@every_door
@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
def test_each_tokenizer_worker_refuses_and_tells(workers: Server, door: Door, which: int) -> None:
    need(workers, door)
    text = f"{which} {fresh(door, False, 'workers')}"

    def asked(body: dict[str, Any], **headers: str) -> dict[str, Any]:
        (seen,) = told(door, workers.post(door.path, body, headers=headers))
        return seen

    with alone(workers, which):
        for stream in (False, True):
            body = door.body(text, stream=stream)
            reply = workers.post(door.path, body, headers={"X-KVShare": "exakt"})
            assert reply.status_code == 400
            # It said nothing: --kvshare-default.
            assert asked(body)["declined"] == "default_exact"
        for header in ("auto", "0.1"):
            assert asked(door.body(header + text), **{"X-KVShare": header})["copied_tokens"] > 64
        if not door.options:
            return
        reply = workers.post(door.path, door.asking(text, "exakt"))
        assert reply.status_code == 400
        assert "one of auto, exact, got 'exakt'" in reply.text
        for option in ("auto", {"budget": 0.1}, {"mode": "auto"}):
            assert asked(door.asking(f"{option} {text}", option))["copied_tokens"] > 64
        for option in (None, {}, {"budget": None}, {"ttl": 5}):
            declined = asked(door.asking(f"{option} {text}", option))["declined"]
            assert declined == "default_exact"
    assert "Traceback" not in workers.log.read_text().split("The server is fired up")[1]
