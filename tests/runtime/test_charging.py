"""Admission by rows, on SGLang's own PrefillAdder over a pool and a tree of nothing."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.plan import ReusePlan, Run
from kvshare_sglang.policy.admit import MOST_CHUNKS
from kvshare_sglang.policy.select.base import Selector
from kvshare_sglang.policy.select.dhd import Dhd
from kvshare_sglang.policy.select.window import Window
from kvshare_sglang.runtime import charging, versions
from kvshare_sglang.runtime.report import Report
from kvshare_sglang.runtime.request import RequestReuse

CHUNK = 128
POOL = 1 << 20
MOST_TOKENS = 16384  # --max-prefill-tokens
WINDOW = Window(0, 0)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What SGLang publishes when a server starts."""
    from sglang.srt.managers import schedule_policy

    said = SimpleNamespace(chunk=CHUNK, mixed=False)
    monkeypatch.setattr(versions, "chunk_size", lambda: said.chunk)
    monkeypatch.setattr(versions, "mixes_decodes", lambda: said.mixed)
    features = SimpleNamespace(enable_encoder_swa_bounded_replay=False)
    monkeypatch.setattr(
        schedule_policy, "get_exec", lambda: SimpleNamespace(features=features), raising=False
    )
    return said


class Pool:
    """An allocator of ``POOL`` free tokens."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size

    def available_size(self) -> int:
        return POOL

    def create_prefill_budget(self, tree: Any, **kw: Any) -> Any:
        from sglang.srt.mem_cache.prefill_budget import PrefillBudget

        return PrefillBudget(self, tree, **kw)

    def request_slot_reserve(self, **kw: Any) -> int:
        return 0


class Tree:
    """A cache without a node to lock or evict."""

    disable = False

    def evictable_size(self) -> int:
        return 0

    def supports_mamba(self) -> bool:
        return False

    supports_prefix_sharing = supports_mamba

    def lock(self, node: Any) -> None: ...

    unlock = discard_storage_prefetch_accounting = lock

    def finish_storage_prefetch_admission(self, handle: Any, **kw: Any) -> None: ...


class Request:
    """As much of a ``Req`` as admission reads. It copies ``copied`` of its tokens, from the
    second on; ``by_token``: it wants its hidden states."""

    input_embeds = multimodal_inputs = session = beam_group = lora_id = None
    host_hit_length = swa_host_hit_length = auxiliary_swa_host_hit_length = storage_hit_length = 0
    return_logprob = is_prefill_only = retracted_stain = False
    origin_input_ids = output_ids = ()
    last_node = cache_request_handle = lock = None
    prefix_len = extend_end = 0

    def __init__(self, tokens: int, copied: int = 0, *, by_token: bool = False) -> None:
        self.full_untruncated_fill_ids = range(tokens)
        self.copied, self.return_hidden_states = copied, by_token
        self.sampling_params = SimpleNamespace(max_new_tokens=1, ignore_eos=False)
        self.kv = SimpleNamespace(holds_mamba=False, req_pool_idx=None)

    @property
    def rows(self) -> int:
        return len(self.full_untruncated_fill_ids) - self.copied

    @property
    def extend_len(self) -> int:
        return self.extend_end - self.prefix_len

    def needs_host_load_back(self) -> bool:
        return False

    def fulfilled_storage_hit_len(self, prefix_len: int) -> int:
        return 0

    def state(self, selector: Selector = WINDOW) -> RequestReuse:
        total = len(self.full_untruncated_fill_ids)
        runs = (Run(1, 0, 1, self.copied),) if self.copied else ()
        plan = ReusePlan(total, 0, runs, runs) if runs else None
        return RequestReuse(Report(), plan=plan, selector=selector)


def adder_of(*, page: int = 1, chunk: int | None = CHUNK, running: tuple[Request, ...] = ()) -> Any:
    from sglang.srt.managers.schedule_policy import PrefillAdder

    batch = SimpleNamespace(reqs=list(running), batch_size=lambda: len(running))
    return PrefillAdder(page, Tree(), Pool(page), batch, 1.0, MOST_TOKENS, chunk)


def add(adder: Any, req: Request, state: RequestReuse | None, *, has_chunked: bool = False) -> Any:
    """What the hook does; ``state`` None: stock SGLang."""
    if state is not None and charging.must_wait(adder, req, state):
        return versions.full_batch()
    within = charging.by_rows(adder, req, state) if state else contextlib.nullcontext()
    with within:
        return adder.add_one_req(req, has_chunked, None)


def goes_on(answer: Any) -> bool:
    return answer.name == "CONTINUE"


def budgets(adder: Any) -> tuple[int, int, float]:
    return adder.rem_chunk_tokens, adder.rem_input_tokens, adder.rem_total_tokens


def in_pages(tokens: int, page: int) -> int:
    return -(-tokens // page) * page


@pytest.mark.parametrize("page", [1, 16])
def test_a_prompt_is_charged_its_rows_and_all_its_memory(page: int) -> None:
    adder = adder_of(page=page)
    req = Request(600, 563)
    chunk, tokens, memory = budgets(adder)
    assert goes_on(add(adder, req, req.state()))
    assert (req.extend_len, adder.new_chunked_req) == (600, None)
    rows = in_pages(37, page)
    # Memory: the prompt in pages, the page that an allocation may cost, and the token to decode.
    taken = in_pages(600, page) + page + 1
    assert budgets(adder) == (chunk - rows, tokens - rows, memory - taken)


def test_rows_fill_the_chunk_to_the_last_one() -> None:
    adder = adder_of()
    for rows in (100, 28):
        req = Request(600, 600 - rows)
        answer = add(adder, req, req.state())
        assert req.extend_len == 600
    assert adder.rem_chunk_tokens == 0
    assert not goes_on(answer)


def test_what_only_its_neighbours_keep_from_coming_whole_waits() -> None:
    adder = adder_of()
    first, second = Request(600, 500), Request(600, 571)
    add(adder, first, first.state())
    before = budgets(adder)
    assert not goes_on(add(adder, second, second.state()))
    assert (adder.can_run_list, budgets(adder)) == ([first], before)
    empty = adder_of()
    add(empty, second, second.state())
    assert second.extend_len == 600


def test_more_rows_than_a_chunk_are_cut_as_ever() -> None:
    adder = adder_of()
    small, big = Request(100), Request(600, 600 - 129)
    for req in (small, big):
        add(adder, req, req.state())
    assert (big.extend_len, adder.new_chunked_req) == (28, big)
    assert budgets(adder)[:2] == (0, MOST_TOKENS - 128)


def test_ten_prompts_share_a_batch_where_two_did(settings: SimpleNamespace) -> None:
    settings.chunk = 4096
    counts = []
    for reuse in (False, True):
        adder = adder_of(chunk=4096)
        for _ in range(20):
            req = Request(3000, 2600)
            if not goes_on(add(adder, req, req.state() if reuse else None)):
                break
        counts.append(len(adder.can_run_list))
    assert counts == [2, 10]


def test_the_tokens_of_a_batch_are_bounded_however_few_run() -> None:
    adder = adder_of()
    for _ in range(20):
        req = Request(1000, 999)
        if not goes_on(add(adder, req, req.state())):
            break
    held = sum(req.extend_len for req in adder.can_run_list)
    assert MOST_CHUNKS * CHUNK - 1000 < held <= MOST_CHUNKS * CHUNK


@pytest.mark.parametrize("why", ["not let in", "no plan", "dhd", "no chunks", "a mixed-in decode"])
def test_nothing_is_raised_where(why: str, settings: SimpleNamespace) -> None:
    wants = Request(20, by_token=True)
    running = (wants,) if why == "a mixed-in decode" else ()
    settings.mixed = why == "a mixed-in decode"
    if why == "no chunks":
        settings.chunk = None
    adder = adder_of(chunk=settings.chunk, running=running)
    stock = adder_of(chunk=settings.chunk, running=running)
    reqs = [Request(600, 560)]
    if why == "not let in":
        adder.prefill_max_requests = stock.prefill_max_requests = 0
    for req in reqs:
        state = req.state(Dhd(0, 0, 1.0) if why == "dhd" else WINDOW)
        if why == "no plan":
            state.plan = None
        add(adder, req, state)
    mine = [req.extend_len for req in adder.can_run_list]
    for req in reqs:
        req.extend_end = 0
        add(stock, req, None)
    assert budgets(adder) == budgets(stock)
    assert mine == [req.extend_len for req in stock.can_run_list]


def test_a_request_by_token_waits_for_a_batch_that_may_run_every_row() -> None:
    adder = adder_of()
    first, wants = Request(600, 590), Request(20, by_token=True)
    add(adder, first, first.state())
    before = budgets(adder)
    assert not goes_on(add(adder, wants, wants.state()))
    assert (adder.can_run_list, budgets(adder)) == ([first], before)
    alone = adder_of()
    assert goes_on(add(alone, wants, wants.state()))
    # Beside it all tokens are charged: what fits so shares the batch, what would be cut waits.
    for later in (Request(50, 30), Request(600, 590)):
        add(alone, later, later.state())
    assert [req.extend_len for req in alone.can_run_list] == [20, 50]
    assert alone.rem_chunk_tokens == CHUNK - 70


@st.composite
def queues(draw: Any) -> list[Request]:
    """Prompts of all lengths, most of which copy some or nearly all of their tokens."""
    out = []
    for _ in range(draw(st.integers(1, 12))):
        tokens = draw(st.one_of(st.integers(1, 200), st.integers(200, 3000)))
        kind = draw(st.sampled_from(("plain", "most", "some", "by token")))
        few = draw(st.integers(1, 60))
        copied = {"most": tokens - few, "some": draw(st.integers(0, tokens - 1))}.get(kind, 0)
        out.append(Request(tokens, max(copied, 0), by_token=kind == "by token"))
    return out


def batches(queue: list[Request], *, page: int, reuse: bool) -> list[list[tuple[Request, int]]]:
    """What SGLang's scheduler makes of the queue: by batch the requests and their tokens."""
    out, waiting, chunked = [], list(queue), None
    while waiting or chunked:
        adder = adder_of(page=page)
        if chunked is not None:
            chunked.prefix_len = chunked.extend_end
            chunked = adder.add_chunked_req(chunked)
        for req in list(waiting):
            if adder.budget_state().name == "OTHER":
                break
            # Whoever goes on in chunks is charged them: only what comes whole is raised.
            answer = add(
                adder, req, req.state() if reuse else None, has_chunked=chunked is not None
            )
            if adder.can_run_list[-1:] == [req]:
                waiting.remove(req)
            if not goes_on(answer):
                break
        chunked = adder.new_chunked_req or chunked
        assert adder.can_run_list, "the queue stands still"
        assert adder.rem_total_tokens == POOL - taken(adder, page)
        out.append([(req, req.extend_len) for req in adder.can_run_list])
    return out


def taken(adder: Any, page: int) -> int:
    """The memory of all tokens, and of one to decode where the prompt ends in this batch."""
    return sum(
        in_pages(req.extend_len, page)
        + page
        + (req.extend_end == len(req.full_untruncated_fill_ids))
        for req in adder.can_run_list
    )


@given(queues(), st.sampled_from((1, 16)))
def test_what_fits_a_chunk_by_rows_comes_whole_whoever_is_there(
    queue: list[Request], page: int
) -> None:
    """And the rows of a batch fit the chunk; its tokens are bounded."""
    for batch in batches(queue, page=page, reuse=True):
        rows = 0
        for req, tokens in batch:
            is_whole = tokens == len(req.full_untruncated_fill_ids)
            if req.copied:
                assert is_whole or in_pages(req.rows, page) > CHUNK
            # What comes in parts is taken to run all.
            rows += req.rows if is_whole else tokens
        assert rows <= CHUNK
        held = sum(tokens for _, tokens in batch)
        assert held <= MOST_CHUNKS * CHUNK
        if any(req.return_hidden_states for req, _ in batch):
            assert held <= CHUNK


@given(queues(), st.sampled_from((1, 16)))
def test_requests_that_copy_nothing_are_let_in_as_ever(queue: list[Request], page: int) -> None:
    plain = [
        Request(len(req.full_untruncated_fill_ids), by_token=req.return_hidden_states)
        for req in queue
    ]
    found = []
    for reuse in (True, False):
        for req in plain:
            req.prefix_len = req.extend_end = 0
        made = batches(plain, page=page, reuse=reuse)
        found.append([[(id(req), tokens) for req, tokens in batch] for batch in made])
    assert found[0] == found[1]
