"""A server made of the pure parts, without SGLang and torch: it finds, plans, copies, runs, stores
and evicts as ``runtime`` does. The nodes of its tree are pages; KV is in the hands of a ``Memory``.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.plan import Blend, Range, ReusePlan, Rows, Run
from kvshare_sglang.policy.admit import Decline, goes_whole, pays
from kvshare_sglang.policy.retain import depths_after, fresh_stretches, page_borders
from kvshare_sglang.policy.select.attention_trace import AttentionTrace
from kvshare_sglang.policy.select.base import repair_rows
from kvshare_sglang.radix_fuzzy.chunks import Bounds, Chunk
from kvshare_sglang.radix_fuzzy.fingerprints import SPAN, Tokens
from kvshare_sglang.radix_fuzzy.segments import Segment
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree
from kvshare_sglang.runtime.report import Report
from kvshare_sglang.runtime.request import RequestReuse, Stage, reuse_of

CONFIG = KVShareConfig()
BOUNDS = Bounds(CONFIG.chunk_min, CONFIG.chunk_target, CONFIG.chunk_max)
Mass = Callable[[Tokens], np.ndarray]  # attention to each position of a prompt


class Memory(Protocol):
    """KV by slot."""

    def free(self, slots: np.ndarray) -> None: ...

    def move(self, old: np.ndarray, new: np.ndarray) -> None:
        """The same KV in other slots."""

    def copy(self, req: "Request", sources: np.ndarray, at: np.ndarray) -> None:
        """Copied to the request's positions ``at``."""

    def run(self, req: "Request", rows: Rows, *, first: Rows, half: Rows, weights: int) -> None:
        """``rows`` run in order of position. Those in ``half`` ran their lower layers before, when
        ``first`` did."""


@dataclass(eq=False, repr=False)
class Page:
    """A node of the tree. ``branch``: whose text it is, and in a blended branch which weights made
    it; or what no one can name. ``open``: rows that are copies, None in the plain branch.
    ``depth``: of text computed after it. ``used``: when, in uses of all pages."""

    branch: object
    parent: "Page | None"
    start: int
    tokens: Tokens
    slots: np.ndarray
    weights: int = 0
    open: np.ndarray | None = None
    depth: int = 0
    segment: Segment | None = None
    used: int = 0
    locks: int = 0
    children: "dict[tuple[object, bytes], Page]" = field(default_factory=dict)

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)

    @property
    def is_copy(self) -> bool:
        return self.open is not None and self.segment is None

    def path(self) -> "list[Page]":
        """All pages down to this one, without the root."""
        out, node = [], self
        while node.parent is not None:
            out.append(node)
            node = node.parent
        return out[::-1]


class Choice(NamedTuple):
    """What a trace chose: the plan before it, the rows that had to run, and all that ran."""

    plan: ReusePlan
    required: Rows
    rows: Rows


@dataclass(eq=False, repr=False)
class Request:
    """``slots`` [n] of its tokens: those before ``protected`` are the tree's, but for the private
    ones. ``whole``: its prompt comes in one chunk. ``ran``: by chunk."""

    tenant: int
    tokens: Tokens
    prompt_len: int
    prefix_len: int
    kvshare: RequestReuse
    last: Page
    protected: int
    slots: np.ndarray
    whole: bool
    ran: list[Rows] = field(default_factory=list)
    choice: Choice | None = None


class _Piece(NamedTuple):
    """Pages of a branch; ``chunk``: new text that may be a source and begins at ``new``."""

    start: int
    stop: int
    chunk: Chunk | None = None
    depth: int = 0
    new: int = 0


class Server:
    """``chunk``: tokens of a prompt that run at a time. ``carries``: new text of a traced prompt
    runs its lower layers once."""

    def __init__(
        self, memory: Memory, mass: Mass, *, num_slots: int, page: int, chunk: int, budget: float,
        carries: bool,
    ) -> None:  # fmt: skip
        self.memory, self.mass, self.num_slots = memory, mass, num_slots
        self.page, self.chunk, self.budget, self.carries = page, chunk, budget, carries
        self.selector, self.report = AttentionTrace(CONFIG.seam, CONFIG.stretch), Report()
        self.weights = self.clock = self.evicted = 0
        self.running: list[Request] = []
        self.flush()

    def flush(self) -> None:
        self.tree = FuzzyTree(secret=7, later=True)
        self.slots = list(range(self.num_slots))  # that are free
        self.memory.free(np.array(self.slots))
        self.pages: dict[Page, None] = {}
        self.root = Page(None, None, 0, np.empty(0, np.int32), np.empty(0, int))

    def new_weights(self) -> None:
        """Nothing is flushed."""
        self.give_back_sources()
        self.weights += 1

    # ---- the tree: runtime/cache/radix.py, copies.py, eviction.py, sources.py -----------------

    def _alloc(self, num: int) -> np.ndarray:
        return np.array([self.slots.pop() for _ in range(num)], int)

    def _free(self, slots: np.ndarray) -> None:
        self.memory.free(slots)
        self.slots += slots.tolist()

    def evict(self, num: int) -> bool:
        """Leaves go, what was used longest ago first, until ``num`` slots are free."""
        heap = [(page.used, page) for page in self.pages if _may_go(page)]
        heapq.heapify(heap)
        while heap and len(self.slots) < num:
            _, page = heapq.heappop(heap)
            self._delete(page)
            above = page.parent
            if above is not None and above is not self.root and _may_go(above):
                heapq.heappush(heap, (above.used, above))
        return len(self.slots) >= num

    def cut_out(self, page: Page) -> None:
        """A copy goes; what hangs on it stays a source and is no prefix any more."""
        for (_, tokens), child in page.children.items():
            child.branch, child.parent = object(), self.root
            self.root.children[child.branch, tokens] = child
        page.children.clear()
        self._delete(page)

    def _delete(self, page: Page) -> None:
        assert page.parent is not None
        del page.parent.children[page.branch, page.tokens.tobytes()], self.pages[page]
        self._free(page.slots)
        self.evicted += 1
        if page.segment is not None:
            assert page.segment.payload[1].pop() is page
            self.tree.trim(page.segment.id, max(page.start, page.segment.start))

    def _add(self, above: Page, branch: object, req: Request, start: int, **of: Any) -> Page:
        here = slice(start, start + self.page)
        tokens, slots = req.tokens[here], req.slots[here].copy()
        page = Page(branch, above, start, tokens, slots, req.kvshare.weights, **of)
        above.children[branch, tokens.tobytes()] = page
        self.pages[page] = None
        self._use([page])
        return page

    def _use(self, pages: list[Page]) -> None:
        for page in pages:
            self.clock += 1
            page.used = self.clock

    def _next(self, node: Page, branch: object, tokens: Tokens) -> Page | None:
        return node.children.get((branch, tokens[node.stop : node.stop + self.page].tobytes()))

    def _walk(self, node: Page, branch: object, tokens: Tokens) -> Page:
        while (child := self._next(node, branch, tokens)) is not None:
            node = child
        return node

    def longest(self, tenant: int, tokens: Tokens, *, blended: bool) -> Page:
        """Where the longest prefix ends: in the plain branch, or a blended one that covers more."""
        node = best = self._walk(self.root, (tenant, None), tokens)
        for above in (*node.path()[::-1], self.root) if blended else ():
            other = self._walk(above, (tenant, self.weights), tokens)
            best = other if other.stop > best.stop else best
        return best

    def _lock(self, page: Page, by: int) -> None:
        for one in page.path():
            one.locks += by

    def _lock_sources(self, state: RequestReuse) -> None:
        slots: list[int] = []
        for run in state.plan.runs if state.plan else ():
            for segment, start, stop in self.tree.pieces(run):
                first, pages = segment.payload
                places = [divmod(at - first, self.page) for at in range(start, stop)]
                slots += [pages[i].slots[j] for i, j in places]
                holder = pages[places[-1][0]]
            state.locked.append((self.tree.pin(run), holder))
            self._lock(holder, 1)
        state.src_slots = np.array(slots, int)

    def _unlock_sources(self, state: RequestReuse) -> None:
        for pin, page in state.locked:
            self.tree.unpin(pin)
            self._lock(page, -1)
        state.locked.clear()

    def give_back_sources(self) -> bool:
        """Memory is short, or there are new weights: who has not copied all computes the rest."""
        holders = [req.kvshare for req in self.running if req.kvshare.locked]
        for state in holders:
            self._unlock_sources(state)
            state.stop_copying(Decline.NO_ROOM)
        return bool(holders)

    # ---- a request comes: runtime/scheduler.py -----------------------------------------------

    def come(self, tenant: int, prompt: Tokens, *, exact: bool = False) -> Request | None:
        """Find, plan, lock; None where memory is short."""
        num, budget = len(prompt), self.budget
        last = self.longest(tenant, prompt[:-1], blended=not exact)
        state = RequestReuse(self.report, budget=budget, weights=self.weights)
        blend = self._blend_of(last)
        if exact:
            state.decline = Decline.EXACT_REQUESTED
        else:
            state.selector = self.selector
            runs = self.tree.match(
                (tenant, self.weights), prompt, start=last.stop,
                max_depth=CONFIG.source_depth, tolerance=CONFIG.edit_tolerance,
            )  # fmt: skip
            plan = self.selector.plan(runs, prompt_len=num, prefix_len=last.stop, budget=budget)
            rows = self.selector.most_rows(plan, budget=budget)
            declined = pays(plan, CONFIG, rows=rows, found=bool(runs))
            if declined is None:
                state.plan = plan.behind(blend)
            elif blend is None:
                state.decline = declined
            else:
                state.plan = plan.nothing().behind(blend)
        self._lock(last, 1)
        self._lock_sources(state)
        if not self._has_room(state, num - last.stop):
            self._lock(last, -1)
            return None
        state.admit(prefix_len=last.stop)
        self._use(last.path())
        shared = [page.slots for page in last.path()]
        slots = np.concatenate([*shared, self._alloc(num - last.stop)])
        req = Request(
            tenant, prompt, num, last.stop, state, last, last.stop, slots, self._whole(state, num)
        )
        self.running.append(req)
        return req

    def _blend_of(self, last: Page) -> Blend | None:
        masks = [page.open for page in last.path() if page.open is not None]
        if not masks:
            return None
        start = last.stop - self.page * len(masks)
        mask = np.concatenate([np.zeros(start, bool), *masks])
        return Blend(start, Rows.where(mask), last.depth)

    def _has_room(self, state: RequestReuse, new: int) -> bool:
        """For ``new`` tokens, if need be without sources; slots for a repair are set aside."""
        if not self.evict(new) and state.plan is not None:
            self._unlock_sources(state)
            state.plan = state.plan.nothing() if state.plan.blend else None
            state.selector, state.decline = None, Decline.NO_ROOM
        if not self.evict(new):
            return False
        if state.plan is not None and state.selector is not None and not 1 < self.page >= new:
            spare = repair_rows(state.plan, budget=self.budget) * self.page
            if spare and self.evict(new + spare):
                state.spare = self._alloc(spare)
        return True

    def _whole(self, state: RequestReuse, num: int) -> bool:
        if state.plan is None:
            return False
        tokens = num - state.plan.prefix_len
        most = min(self.selector.most_rows(state.plan, budget=self.budget), tokens)
        cost = (-(-each // self.page) * self.page for each in (tokens, most))
        return goes_whole(*cost, room=self.chunk, chunk=self.chunk)

    # ---- a chunk of its prompt runs: runtime/prefill.py, attention_trace.py, repair.py --------

    def step(self, req: Request) -> None:
        """Copy, choose, run the next chunk, and keep what will not change any more."""
        state, plan = req.kvshare, req.kvshare.plan
        start = max(state.done, req.prefix_len)
        stop = req.prompt_len if req.whole else min(start + self.chunk, req.prompt_len)
        chunk = Range(start, stop)
        traced = (
            plan is not None and state.selector is not None and stop == req.prompt_len
            and (bool(plan.runs) or state.spare is not None)
        )  # fmt: skip
        first = half = Rows()
        rows = Rows([chunk])
        if plan is not None:
            self._copy(req, plan.runs if traced else plan.copies, chunk)
            if not traced:
                rows = plan.compute.clip(*chunk) | Rows([(stop - 1, stop)])
        if state.advance(stop) or plan is None:
            self._unlock_sources(state)
        if traced:
            assert plan is not None
            most_open = 0 if state.spare is None else len(state.spare) // self.page
            trace = self.selector.trace(plan, budget=self.budget, start=start, most_open=most_open)
            first = trace.rows
            while not trace.done:
                trace.feed(self.mass(req.tokens))
            rows = self.selector.rows(plan, trace, start)
            req.choice = Choice(plan, self.selector.required(plan, start), rows)
            self._own_slots(req, rows.clip(0, start))
            half = trace.carried() if self.carries else Rows()
            ran = plan.compute.clip(plan.prefix_len, start)
            early = Rows()
            if plan.copies:
                early = ran.clip(plan.copies[0].dst_start, start) - rows
            settled = plan.recompute(rows | ran, early=early, carried=half)
            state.settle(settled, watch=False, otherwise=Decline.TOO_LITTLE)
            if rows.num > self.chunk:  # then they run in parts, all from the bottom
                half = Rows()
        state.ran(chunk, rows, plan)
        self.memory.run(req, rows, first=first, half=half, weights=self.weights)
        req.ran.append(rows)
        self._keep(req)

    def _copy(self, req: Request, copies: tuple[Run, ...], chunk: Range) -> None:
        plan = req.kvshare.plan
        assert plan is not None
        rows = Rows.of_runs(copies).clip(*chunk)
        sources = req.kvshare.src_slots[rows.places_in(plan.reused_rows)]
        self.memory.copy(req, sources, rows.positions)

    def _own_slots(self, req: Request, rows: Rows) -> None:
        """Rows that the tree owns run in slots of the request's own."""
        state = req.kvshare
        shared = rows.clip(0, req.protected) - state.private
        if not shared:
            return
        pages = np.unique(shared.positions // self.page)
        at = (pages[:, None] * self.page + np.arange(self.page)).ravel()
        new, state.spare = state.spare[: len(at)], state.spare[len(at) :]
        self.memory.move(req.slots[at], new)
        req.slots[at] = new
        state.private |= Rows.at(at)

    # ---- what it leaves: runtime/cache/retain.py, branches.py --------------------------------

    def _keep(self, req: Request) -> None:
        """Between its chunks, and once its prompt is through."""
        state = req.kvshare
        if state.stage is Stage.COPIED:
            self._give_back_spare(state)
        if reuse_of(req) is None:
            last = self._store_exact(req, state.done)
        elif state.stage is Stage.COPIED:
            last = self._store(req, state.done, ended=False)
        elif state.plan.blend:
            return
        else:
            last = self._store_exact(req, min(state.plan.exact_len, state.done))
        self._move_lock(req, last)

    def _move_lock(self, req: Request, last: Page) -> None:
        self._lock(req.last, -1)
        self._lock(last, 1)
        req.last = last

    def _store(self, req: Request, stop: int, *, ended: bool) -> Page:
        plan = req.kvshare.plan
        assert plan is not None
        old = req.kvshare.weights != self.weights
        if old and req.protected > plan.exact_len:
            return req.last
        above = self._store_exact(req, min(plan.exact_len, stop))
        if old or not plan.inexact:
            return above
        return self._store_blended(req, plan, above, stop // self.page * self.page, ended=ended)

    def _store_exact(self, req: Request, stop: int) -> Page:
        """Put the exact part in the plain branch, and take over what is there already."""
        stop = stop // self.page * self.page
        node, branch, new = self.root, (req.tenant, None), []
        while node.stop < stop:
            here = slice(node.stop, node.stop + self.page)
            child = self._next(node, branch, req.tokens)
            if child is None:
                child = self._add(node, branch, req, node.stop)
                new.append(child)
            elif here.start >= req.protected:
                self._free(req.slots[here])
                req.slots[here] = child.slots
            node = child
        if new:
            above, space = new[0].parent, (req.tenant, req.kvshare.weights)
            mine = above.segment is not None and above.segment.namespace == space
            self._insert(new, space, new[0].start, above.segment if mine else None, 0, None)
        req.protected = max(req.protected, stop)
        return node

    def _insert(
        self, pages: list[Page], space: object, start: int, above: Segment | None, depth: int,
        before: Tokens | None,
    ) -> None:  # fmt: skip
        """New pages are one text of the fuzzy tree, from ``start``, in the first of them, on."""
        text = np.concatenate([page.tokens for page in pages])[start - pages[0].start :]
        segment = self.tree.insert(
            space, text, start=start, parent=above and above.id, depth=depth, before=before,
            payload=(pages[0].start, pages),
        )  # fmt: skip
        for page in pages:
            page.segment = segment

    def _store_blended(
        self, req: Request, plan: ReusePlan, node: Page, stop: int, *, ended: bool
    ) -> Page:
        """Hang the rest there; of what hangs there already keep, page by page, whose is nearer to
        full prefill."""
        if stop <= node.stop:
            req.kvshare.private = Rows()
            return node
        branch = req.tenant, self.weights
        was_private = req.kvshare.private.mask(stop)
        own, open_rows = was_private | (np.arange(stop) >= req.protected), plan.open.mask(stop)
        private, locked = np.zeros(stop, bool), set(req.last.path())
        while node.stop < stop and (child := self._next(node, branch, req.tokens)) is not None:
            here = slice(child.start, child.stop)
            closes, opens = child.open & ~open_rows[here], open_rows[here] & ~child.open
            others = child.locks > (child in locked)
            if not own[child.start]:
                pass
            elif closes.any() and not opens.any() and not others:
                self._free(child.slots)
                child.slots, child.open = req.slots[here].copy(), open_rows[here]
            elif not ended and (was_private[child.start] or closes.any()):
                private[here] = True
            else:
                self._free(req.slots[here])
                req.slots[here] = child.slots
            self._use([child])
            node = child
        pieces = self._pieces(req, plan, node.stop, stop)
        depths = depths_after(plan, (piece.stop for piece in pieces))
        for piece, depth in zip(pieces, depths, strict=True):
            above, new = node, []
            for start in range(piece.start, piece.stop, self.page):
                mine = open_rows[start : start + self.page]
                node = self._add(node, branch, req, start, open=mine, depth=depth)
                new.append(node)
            if piece.chunk is not None:
                space = req.tenant, req.kvshare.weights
                segment = above.segment
                goes_on = (
                    segment is not None and piece.new == piece.start
                    and (segment.namespace, segment.depth) == (space, piece.depth)
                )  # fmt: skip
                before = req.tokens[: piece.new]
                self._insert(
                    new, space, piece.new, segment if goes_on else None, piece.depth, before
                )
                self.tree.remember_chunk(piece.chunk, new[0].segment)
        req.kvshare.private = Rows.where(private)
        req.protected = stop
        return node

    def _pieces(self, req: Request, plan: ReusePlan, start: int, stop: int) -> list[_Piece]:
        """New text that may be a source, in chunks, and what lies between them."""
        space, at, out = (req.tenant, self.weights), start, []
        for stretch in fresh_stretches(plan, stop, max_depth=CONFIG.source_depth):
            first = max(stretch.start, start)
            if first >= stretch.stop:
                continue
            text = req.tokens[first : stretch.stop]
            for chunks in self.tree.new_chunks(space, text, depth=stretch.depth, bounds=BOUNDS):
                ranges = [Range(chunk.start, chunk.stop) for chunk in chunks]
                border, borders = page_borders(first, ranges, page=self.page)
                border = max(border, at)
                new = max(first + chunks[0].start, border)
                if borders[-1] - new < max(SPAN, self.page):
                    continue
                out += [_Piece(at, border)] if at < border else []
                at = border
                for chunk, border in zip(chunks, borders, strict=True):
                    if border > at:
                        out.append(_Piece(at, border, chunk, stretch.depth, max(new, at)))
                        at = border
        return out + ([_Piece(at, stop)] if at < stop else [])

    def _give_back_spare(self, state: RequestReuse) -> None:
        if state.spare is not None:
            self._free(state.spare)
        state.spare = None

    def end(self, req: Request, answer: Tokens) -> None:
        """The last token of an answer has no KV. Where memory is short the answer ends."""
        if len(answer) > 1 and self.evict(len(answer) - 1):
            num = len(req.tokens)
            req.tokens = np.concatenate([req.tokens, answer[:-1]])
            req.slots = np.concatenate([req.slots, self._alloc(len(answer) - 1)])
            rows = Rows([(num, len(req.tokens))])
            self.memory.run(req, rows, first=Rows(), half=Rows(), weights=self.weights)
        if reuse_of(req) is None:
            self._store_exact(req, len(req.tokens))
        else:
            self._store(req, len(req.tokens), ended=True)
        self.release(req)

    def release(self, req: Request) -> None:
        """It ended, or was aborted."""
        state = req.kvshare
        self._free(req.slots[req.protected :])
        self._free(req.slots[state.private.positions])
        self._give_back_spare(state)
        self._unlock_sources(state)
        self._lock(req.last, -1)
        state.release()
        self.running.remove(req)


def _may_go(page: Page) -> bool:
    return not page.children and not page.locks
