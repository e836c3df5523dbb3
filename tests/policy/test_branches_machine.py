"""The laws of blended branches in any history, on the pure parts: no SGLang, no torch.

The oracle knows of each slot which rows were copied there or ran there, and of SGLang which texts
it served; nothing of runs, plans and trees.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from plain_server import CONFIG, Page, Request, Server

from kvshare_sglang.plan import Rows

KINDS = ("exact", "blended", "copied", "recomputed", "fresh")
WHOLE = 1 << 20  # a chunk that holds every prompt
QUESTION = 64  # rows at the end of a prompt that may run twice, if it comes in chunks
TENANTS = (1, 1, 2)  # of the conversations; the last one begins with the text of the first
# KV of a token that follows some text: whose, by which weights, copied from elsewhere or not, and
# whether it is what full prefill computes.
KV = np.dtype(
    [("text", "i8"), ("token", "i8"), ("tenant", "i8"), ("weights", "i8"), ("copy", "?"),
     ("exact", "?")]
)  # fmt: skip


def names(tokens: Iterable[int], before: int) -> list[int]:
    """A number for each beginning of a text that follows the text ``before``, or is a tenant's."""
    return [before := hash((before, token)) for token in tokens]


def of_prompt(req: Request) -> np.ndarray:
    return np.array(names(req.tokens.tolist(), req.tenant))


class Oracle:
    """What each slot holds."""

    def __init__(self, num: int) -> None:
        self.kv = np.zeros(num, KV)

    def free(self, slots: np.ndarray) -> None:
        self.kv[slots] = 0

    def move(self, old: np.ndarray, new: np.ndarray) -> None:
        self.kv[new] = self.kv[old]

    def copy(self, req: Request, sources: np.ndarray, at: np.ndarray) -> None:
        mine = self.kv[sources]
        mine["text"], mine["copy"], mine["exact"] = of_prompt(req)[at], True, False
        self.kv[req.slots[at]] = mine

    def run(self, req: Request, rows: Rows, *, first: Rows, half: Rows, weights: int) -> None:
        """KV is exact if all before it is, or runs now; of a row in ``half`` the lower layers saw
        what was before it when ``first`` ran."""
        at, num = rows.positions, rows.stop
        there = self.kv["exact"][req.slots[:num]]
        below = np.logical_and.accumulate(there | first.mask(num))
        clean = np.where(half.mask(num), below, there | rows.mask(num))
        mine = np.zeros(len(at), KV)
        mine["text"], mine["token"], mine["tenant"] = of_prompt(req)[at], req.tokens[at], req.tenant
        mine["weights"] = weights if weights == req.kvshare.weights else -1  # of two
        mine["exact"] = np.logical_and.accumulate(clean)[at]
        if num < req.prompt_len:  # the last row of a chunk runs in any case, and stays open
            mine["copy"][-1] = self.kv["copy"][req.slots[num - 1]]
        self.kv[req.slots[at]] = mine


class Stock:
    """SGLang on the same requests: the pages of all texts that it served, by what ends there."""

    def __init__(self, page: int) -> None:
        self.page, self.pages = page, set()

    def ends(self, tenant: int, tokens: np.ndarray) -> list[int]:
        return names(tokens.tolist(), tenant)[self.page - 1 :: self.page]

    def served(self, req: Request) -> None:
        self.pages.update(self.ends(req.tenant, req.tokens))

    def rows(self, tenant: int, prompt: np.ndarray) -> int:
        """How many rows run: those behind the longest prefix."""
        ends = self.ends(tenant, prompt[:-1])
        hit = next((i for i, end in enumerate(ends) if end not in self.pages), len(ends))
        return len(prompt) - hit * self.page


def allowed(rows: int) -> float:
    """What a turn may cost that costs SGLang so many rows."""
    return rows if rows < 4 else max(1.25 * rows, rows + 15)


def attention(kind: str, tokens: np.ndarray) -> np.ndarray:
    """To each position of a prompt; the same for the same prompt."""
    num = len(tokens)
    mass = np.random.default_rng(tokens[-20:].tolist()).random(num)
    far = {"even": np.zeros(num), "early": np.arange(num), "recent": num - np.arange(num)}[kind]
    return mass**4 * np.exp(-far / 10)


LOSSES = ("leaves", "leaves", "a copy", "a copy", "a copy", "sources", "sources", "weights", "all")
conversations = st.integers(0, 2)
waits = st.sampled_from((99, 99, 99, 99, 0, 1, 3))  # so many chunks run, then it waits


class Branches(RuleBasedStateMachine):
    """Three conversations of two tenants. While a request waits, before a chunk of its prompt or
    before it ends, others come."""

    @initialize(
        page=st.sampled_from((1, 16)),
        chunk=st.sampled_from((WHOLE, 64, 16)),
        budget=st.sampled_from((0.15, 0.3)),
        kind=st.sampled_from(("early", "early", "even", "recent")),
        carries=st.booleans(),
        num_slots=st.sampled_from((1 << 13, 1 << 13, 1200)),
    )
    def begin(self, page, chunk, budget, kind, carries, num_slots):
        self.oracle = Oracle(num_slots)
        self.server = Server(
            self.oracle, lambda tokens: attention(kind, tokens),
            num_slots=num_slots, page=page, chunk=chunk, budget=budget, carries=carries,
        )  # fmt: skip
        self.rng = np.random.default_rng(1)
        self.told = 0  # tokens of prompts, of requests that are over
        self.open: dict[Page, np.ndarray] = {}  # rows of a branch, a step ago
        self.forget()
        texts = [self.words(200), self.words(300)]
        self.said = [texts[0], texts[1], texts[0]]
        self.asked = list(self.said)
        for i in range(3):
            self.ask(i, self.said[i])

    def forget(self):
        """``alone``: each request so far has found all that those before it left."""
        self.stock, self.alone = Stock(self.server.page), not self.server.running
        self.evicted = self.server.evicted
        self.would: dict[Request, int] = {}  # rows that a request would run in SGLang

    @property
    def fits(self):
        return self.server.evicted == self.evicted

    def words(self, num):
        return self.rng.integers(10, 30_000, num).astype(np.int32)

    # ---- requests -----------------------------------------------------------------------

    def ask(self, i, prompt, *, wait=99):
        """The conversation goes on with the answer, unless that has to wait."""
        self.said[i] = self.asked[i] = prompt
        (req,) = self.serve(i, wait=wait) or [None]
        if req is not None and req not in self.server.running:
            self.said[i] = np.concatenate([req.tokens, self.words(1)])

    def serve(self, i, *, wait, exact=False, num=1):
        """Requests over the same prompt, side by side."""
        self.alone &= wait == 99 and num == 1 and not exact and not self.server.running
        mine = [self.come(TENANTS[i], self.asked[i], exact) for _ in range(num)]
        mine = [req for req in mine if req is not None]
        for _ in range(wait):
            for req in mine:
                if req in self.server.running:
                    self.go_on_with(req)
        return mine

    def come(self, tenant, prompt, exact):
        would = self.stock.rows(tenant, prompt)
        req = self.server.come(tenant, prompt, exact=exact)
        if req is None:
            return None
        self.would[req] = would
        kv, plan, today = self.oracle.kv, req.kvshare.plan, self.server.weights
        # A prefix hit is exact, and behind that of today's weights; a tenant's own is its name.
        split = plan.blend.start if plan and plan.blend else req.prefix_len
        hit = kv[req.slots[: req.prefix_len]]
        assert hit["exact"][:split].all()
        assert split == req.prefix_len or not exact
        assert (hit["weights"][split:] == today).all()
        stop = 0
        for run in plan.runs if plan else ():
            start, stop = stop, stop + run.length
            source = kv[req.kvshare.src_slots[start:stop]]
            assert (source["token"] == prompt[run.dst_start : run.dst_stop]).all()
            assert (source["tenant"] == tenant).all()
            assert (source["weights"] == today).all()
            assert run.depth or source["exact"].all()
        return req

    def go_on_with(self, req):
        if req.kvshare.done == req.prompt_len:
            self.told += req.prompt_len
            self.server.end(req, self.words(6))
            if req.kvshare.weights == self.server.weights:
                self.stock.served(req)
            return
        copied, held = req.kvshare.record["copied_tokens"], bool(req.kvshare.locked)
        self.server.step(req)
        self.check_record(req)
        # Whose sources were taken back computes the rest.
        assert held or req.kvshare.record["copied_tokens"] <= copied
        if req.kvshare.done == req.prompt_len:
            self.check_choice(req)
            self.check_repair(req)
            self.check_cost(req)

    def check_record(self, req):
        """What is told of a prompt is what ran, and adds up to it, after each chunk."""
        record, done = req.kvshare.record, req.kvshare.done
        told = {kind: record[f"{kind}_tokens"] for kind in KINDS}
        assert min(told.values()) >= 0
        assert sum(told.values()) == done
        ran = np.any([rows.mask(done) for rows in req.ran], axis=0)
        assert told["copied"] == np.count_nonzero(~ran[req.prefix_len :])
        assert told["exact"] + told["blended"] == np.count_nonzero(~ran[: req.prefix_len])

    def check_choice(self, req):
        """A budget buys its share of the reused rows and of twice the new ones before the last of
        them; of open rows before it a turn repairs 18% of its new text, which counts as 84 rows at
        least."""
        if req.choice is None:
            return
        plan, required, rows = req.choice
        chosen = rows - required
        hit, new = chosen.clip(0, plan.prefix_len), plan.fresh_rows
        repaired = int(0.18 * max(new.num, 84) + 1e-9) if new.num >= 4 else 0
        assert hit.num <= repaired
        assert not hit or not hit - plan.blend.open
        bought = self.server.budget * (plan.reused + 2 * new.clip(0, plan.reused_rows.stop).num)
        assert chosen.num <= bought + repaired
        if plan.runs and req.whole:  # else it would not pay; a repair comes on top
            saved = req.kvshare.record["copied_tokens"] + repaired
            uncached = req.prompt_len - req.prefix_len
            assert saved >= max(CONFIG.min_reuse, CONFIG.min_share * uncached)

    def check_repair(self, req):
        """What ran again is a copy in the tree no more, where nobody else reads the old row; of a
        longer page another row may be a copy here only, so that the old page stays."""
        alone = len(self.server.running) == 1 and req.kvshare.weights == self.server.weights
        if req.choice is not None and alone and self.server.page == 1:
            path = [page.slots for page in req.last.path()]
            slots = np.concatenate([np.empty(0, int), *path])
            ran = req.choice.rows.clip(0, len(slots)).positions
            assert not self.oracle.kv["copy"][slots[ran]].any()

    def check_cost(self, req):
        """The same prompt again costs what it costs in SGLang, any other a quarter more or 15 rows
        more; in chunks also the end of each, and the question twice."""
        would = self.would.get(req)
        if not self.fits or would is None or req.kvshare.plan is None:
            return
        ran = sum(rows.num for rows in req.ran)
        assert ran <= would or would > self.server.page
        assert ran <= allowed(would) + (0 if req.whole else QUESTION + len(req.ran))

    # ---- conversations ------------------------------------------------------------------

    @rule(i=conversations, num=st.integers(1, 90), wait=waits)
    def turn(self, i, num, wait):
        self.ask(i, np.concatenate([self.said[i], self.words(num)]), wait=wait)

    @rule(i=conversations, at=st.integers(0, 100), num=st.integers(0, 4), wait=waits)
    def edit(self, i, at, num, wait):
        """Near or far, two words become ``num``."""
        text = self.said[i]
        cut = at * (len(text) - 2) // 100
        self.ask(i, np.concatenate([text[:cut], self.words(num), text[cut + 2 :]]), wait=wait)

    @rule(
        i=conversations, old=st.integers(0, 40), num=st.integers(1, 60), first=st.integers(32, 50),
        more=st.sampled_from((0, 70, 120)), wait=waits,
    )  # fmt: skip
    def replace_the_front(self, i, old, num, first, more, wait):
        """Where there is ``more`` new text, only the ``first`` words behind the front go before."""
        text = self.said[i][old:]
        parts = [self.words(num), text[:first], self.words(more), text[first:]]
        self.ask(i, np.concatenate(parts), wait=wait)

    @rule(i=conversations, other=conversations, num=st.integers(40, 200), wait=waits)
    def quote(self, i, other, num, wait):
        parts = [self.said[i], self.words(9), self.said[other][-num:], self.words(20)]
        self.ask(i, np.concatenate(parts)[-600:], wait=wait)

    @rule(
        i=conversations, exact=st.sampled_from((False, False, True)),
        num=st.sampled_from((1, 1, 3)), wait=waits,
    )  # fmt: skip
    def again(self, i, exact, num, wait):
        """The same prompt, or samples of it."""
        self.serve(i, wait=wait, exact=exact, num=num)

    @precondition(lambda self: self.server.running)
    @rule(which=st.integers(0, 9), chunks=st.integers(1, 9))
    def go_on(self, which, chunks):
        req = self.server.running[which % len(self.server.running)]
        for _ in range(chunks):
            if req in self.server.running:
                self.go_on_with(req)

    @precondition(lambda self: self.server.running)
    @rule(which=st.integers(0, 9))
    def abort(self, which):
        req = self.server.running[which % len(self.server.running)]
        self.told += max(req.kvshare.done, req.prefix_len)
        self.server.release(req)

    @rule(what=st.sampled_from(LOSSES), num=st.integers(1, 400))
    def lose(self, what, num):
        server = self.server
        server.tree.check()
        copies = [page for page in server.pages if page.is_copy and not page.locks]
        if what == "leaves":
            server.evict(len(server.slots) + num)
        elif what == "a copy" and copies:
            server.cut_out(copies[num % len(copies)])
        elif what == "sources" and server.give_back_sources():
            self.would.clear()  # who waits computes what it would have copied
        elif what == "weights":
            server.new_weights()
            self.forget()
            self.alone = False  # what the old ones left is still there
        elif what == "all":
            while server.running:
                self.go_on_with(server.running[0])
            server.evict(server.num_slots) if num % 2 else server.flush()
            self.forget()
            assert len(server.slots) == server.num_slots
            assert server.tree.num_segments == server.tree.num_tokens == len(server.pages) == 0

    # ---- what always holds --------------------------------------------------------------

    @invariant()
    def each_token_is_counted_once(self):
        assert sum(self.server.report.tokens[kind] for kind in KINDS) == self.told

    @invariant()
    def the_tree_is_lawful(self):
        pages, held = self.held()
        slots = np.concatenate([np.empty(0, int), *(page.slots for page in pages)])
        there, size = self.oracle.kv[slots], self.server.page
        # A slot is of one text, and none is lost; memory is what SGLang would hold.
        assert len(pages) == len(self.server.pages)
        assert there["text"].tolist() == held
        assert there["token"].tolist() == [token for page in pages for token in page.tokens]
        every = np.sort(np.concatenate([slots, *self.elsewhere()]))
        assert np.array_equal(every, np.arange(self.server.num_slots))
        assert not self.alone or not self.fits or len(pages) <= len(self.stock.pages)
        # Plain text is exact. Of a branch all copies are open, and the same weights made it.
        plain = np.repeat(np.array([page.open is None for page in pages], bool), size)
        assert there["exact"][plain].all()
        closed = np.zeros(size, bool)
        now = {page: closed if page.open is None else page.open for page in pages}
        is_open = np.concatenate([closed[:0], *now.values()])
        assert (is_open == there["copy"])[~plain].all()
        weights = np.repeat([page.weights for page in pages], size)
        assert (there["weights"] == weights)[~plain].all()
        assert [page.depth > 0 for page in pages] == [page.open is not None for page in pages]
        # No copy is a source, nor what would be too deep.
        first = [page.stop if page.segment is None else page.segment.start for page in pages]
        at = np.concatenate([np.empty(0, int), *(np.arange(p.start, p.stop) for p in pages)])
        assert not there["copy"][at >= np.repeat(first, size)].any()
        assert {page.segment.depth for page in pages if page.segment} <= {0, CONFIG.source_depth}
        # A repaired row is never open again.
        was_open = [self.open.get(page, mask) for page, mask in now.items()]
        assert not (is_open & ~np.concatenate([closed[:0], *was_open])).any()
        self.open = now

    def held(self) -> tuple[list[Page], list[int]]:
        """The pages of the tree, and the names of all that they must hold; where a text was cut out
        of a branch, its beginning is not known."""
        top = self.server.root.children
        stack = [(page, key[0][0] if isinstance(key[0], tuple) else 0) for key, page in top.items()]
        pages, out = [], []
        while stack:
            page, before = stack.pop()
            mine = names(page.tokens.tolist(), before)
            if not before:
                mine = self.oracle.kv["text"][page.slots].tolist()
            pages.append(page)
            out += mine
            stack += [(child, mine[-1]) for child in page.children.values()]
        return pages, out

    def elsewhere(self) -> Iterator[list[int]]:
        """Slots that the tree does not own; what requests read is of their text."""
        yield self.server.slots
        for req in self.server.running:
            yield req.slots[req.protected :]
            yield req.slots[req.kvshare.private.positions]
            yield [] if req.kvshare.spare is None else req.kvshare.spare
            done = max(req.kvshare.done, req.prefix_len)
            assert (self.oracle.kv["text"][req.slots[:done]] == of_prompt(req)[:done]).all()

    @invariant()
    def index_and_locks_follow_the_tree(self):
        server = self.server
        sources = [page for page in server.pages if page.segment is not None]
        first = {page.segment: page.segment.payload[0] for page in sources}
        others = sum(segment.start - start for segment, start in first.items())
        assert server.tree.num_tokens == server.page * len(sources) - others
        assert server.tree.num_segments == len(first)
        held = [page for req in server.running for _, page in req.kvshare.locked]
        assert server.tree.num_pins == len(held)
        held += [req.last for req in server.running]
        locks = Counter(page for last in held for page in last.path())
        assert {page: page.locks for page in server.pages if page.locks} == locks


Branches.TestCase.settings = settings(stateful_step_count=25)
test_any_history_keeps_the_laws_of_branches = Branches.TestCase


@pytest.mark.parametrize(("chunk", "carries"), [(WHOLE, True), (WHOLE, False), (64, False)])
def test_new_text_behind_copies_that_all_ran_again_is_exact_only_if_it_ran_with_them(
    chunk: int, carries: bool
) -> None:
    """Not where its lower layers ran before, nor where it came in an earlier chunk."""
    it = Branches()
    it.begin(page=1, chunk=chunk, budget=0.15, kind="early", carries=carries, num_slots=1 << 13)
    it.replace_the_front(i=1, old=9, num=7, first=40, more=120, wait=99)
    it.the_tree_is_lawful()
    exact = it.server.longest(TENANTS[1], it.asked[1], blended=False).stop
    assert exact >= 7 + 40
    assert (exact > 7 + 40 + 120) == (chunk == WHOLE and not carries)
