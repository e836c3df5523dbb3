"""What a simulated worker holds: real text under the real index, or documents that are counted."""

from collections import OrderedDict
from collections.abc import Sequence

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.plan import ReusePlan, Run
from kvshare_sglang.policy.admit import pays
from kvshare_sglang.policy.retain import fresh_stretches
from kvshare_sglang.policy.select.attention_trace import AttentionTrace
from kvshare_sglang.policy.select.base import NEW
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.sim.life import Life, going_on
from kvshare_sglang.sim.matcher import KVShare, Piece, Text
from kvshare_sglang.sim.radix import by_frequency, lru
from kvshare_sglang.sim.serving import Job, Work


class Nothing:
    """A matcher that finds nothing: SGLang without the plug-in."""

    copies_tokens = False

    def __init__(self) -> None:
        self._ids = 0

    def insert(self, text: Text) -> int:
        self._ids += 1
        return self._ids

    def trim(self, segment: int, stop: int) -> None:
        pass

    def match(self, space: object, prompt: Tokens, *, start: int, max_depth: int) -> Sequence[Run]:
        return ()

    def pieces(self, space: object, tokens: Tokens, *, depth: int) -> list[list[Piece]]:
        return []

    def remember(self, note: object, segment: int) -> None:
        pass


class TextCache:
    """A server's cache under SGLang's tree and the plug-in's own index, selector and admission;
    without ``reuse`` under SGLang's tree alone. At most ``capacity`` tokens.

    It stands for a server whose requests do not go on from what reused: a prompt that continues
    one copies it again, where the server has it as a prefix. Answers are not stored, and a prompt
    that finds no room is not.
    """

    def __init__(
        self, *, capacity: int, reuse: bool = True, config: KVShareConfig | None = None
    ) -> None:
        config = config or KVShareConfig()
        self.config = config
        self._life = Life(
            KVShare(config) if reuse else Nothing(),
            capacity=capacity,
            max_depth=config.source_depth,
            policy=by_frequency if reuse else lru,
            config=config,
        )
        self._selector = AttentionTrace(config.seam)
        self._changes = 0

    @property
    def held(self) -> int:
        return self._life.resident

    def prefix(self, job: Job) -> int:
        assert job.prompt is not None
        # The last token is always computed.
        return self._life.tree.prefix_len(job.space, job.prompt[:-1])

    def look(self, job: Job) -> Work:
        plan = self._planned(job)
        rows = self._rows(plan)
        return Work(plan.prefix_len, plan.prompt_len - plan.prefix_len - rows, rows)

    def _rows(self, plan: ReusePlan) -> int:
        if not plan.copies:
            return plan.prompt_len - plan.prefix_len
        return self._selector.most_rows(plan, budget=self.config.budget)

    def _planned(self, job: Job) -> ReusePlan:
        """The plan of a job as things stand; looked up again only where the cache has changed."""
        if job.note is not None and job.note[:2] == (id(self), self._changes):
            found: ReusePlan = job.note[2]
            return found
        assert job.prompt is not None
        prefix, n = self.prefix(job), job.tokens
        runs = self._life.matcher.match(
            job.space, job.prompt, start=prefix, max_depth=self.config.source_depth
        )
        plan = self._selector.plan(runs, prompt_len=n, prefix_len=prefix, budget=self.config.budget)
        if pays(plan, self.config, rows=self._rows(plan)):
            plan = ReusePlan(n, prefix, (), ())
        job.note = (id(self), self._changes, plan)
        return plan

    def take(self, job: Job) -> Work:
        work, plan = self.look(job), self._planned(job)
        tree = self._life.tree
        tree.now += 1
        assert job.prompt is not None
        tree.walk(job.space, job.prompt[:-1])
        going = going_on(plan.runs, plan.prompt_len)
        for copy in plan.copies:
            self._life.touch(copy, going=going)
        job.note = (id(self), -1, plan)  # what it was let in with stays, whatever changes
        return work

    def leave(self, job: Job) -> None:
        plan: ReusePlan = job.note[2]
        assert job.prompt is not None
        job.note = None
        self._changes += 1
        tree = self._life.tree
        if not tree.make_room(job.tokens - self.prefix(job), set()):
            return
        if not plan.copies:
            tree.store(job.space, job.prompt)
            return
        tree.store(job.space, job.prompt[: plan.exact_len])
        for stretch in fresh_stretches(plan, job.tokens, max_depth=self.config.source_depth):
            self._life.store_stretch(job.space, job.prompt, stretch)


class DocumentCache:
    """Documents by number, the least recently used go first: for a million requests.

    What stands in the same order from the start is a prefix hit; a document that is held but stood
    elsewhere is copied, where there is ``reuse``, and ``budget`` says what of it runs again. One
    place of each is kept, where SGLang alone keeps as many as fit. O(documents of a job).
    """

    def __init__(self, *, capacity: int, reuse: bool = True, budget: float = 0.15) -> None:
        self.capacity, self.reuse, self.budget = capacity, reuse, budget
        self.held = 0
        self._tokens: OrderedDict[int, int] = OrderedDict()
        self._before: dict[int, int] = {}  # by document: hash of what stood before it when stored

    def prefix(self, job: Job) -> int:
        exact, before = 0, 0
        for number, tokens in job.documents:
            if self._before.get(number) != before:
                break
            exact, before = exact + tokens, hash((before, number))
        return exact

    def look(self, job: Job) -> Work:
        exact = self.prefix(job)
        rest, at, found, new = job.tokens - exact, 0, 0, 0
        behind = 0  # new text that copies stand behind
        for number, tokens in job.documents:
            at += tokens
            if at <= exact or not self.reuse:
                continue
            if number in self._tokens:
                found, behind = found + tokens, new
            else:
                new += tokens
        again = min(found, int(self.budget * (found + NEW * behind)))
        return Work(exact, found - again, rest - found + again)

    def take(self, job: Job) -> Work:
        for number, _ in job.documents:
            if number in self._tokens:
                self._tokens.move_to_end(number)
        return self.look(job)

    def leave(self, job: Job) -> None:
        before = 0
        for number, tokens in job.documents:
            # With reuse a copy is left to its source; without, the new place replaces the old one.
            if number not in self._tokens:
                self.held += tokens
                self._tokens[number], self._before[number] = tokens, before
            elif not self.reuse:
                self._before[number] = before
            before = hash((before, number))
        while self.held > self.capacity:
            number, tokens = self._tokens.popitem(last=False)
            del self._before[number]
            self.held -= tokens
