"""Fixtures: tiny models, and labs that live for a test module."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab
from tiny_models import VOCAB, add_tokenizer, make_model

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.sglang)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def llama(models: Path) -> Path:
    return make_model(models, "llama")


@pytest.fixture(scope="session")
def model(llama: Path) -> Path:
    """The same with a tokenizer: what a server takes."""
    add_tokenizer(llama)
    return llama


@pytest.fixture(scope="module")
def kv_lab(llama: Path) -> Iterator[Lab]:
    """kvshare in SGLang's plainest setting."""
    it = Lab(llama, kvshare=True)
    it.ask("probes:force_plans")
    yield it
    it.close()


@pytest.fixture(scope="module")
def plain_lab(llama: Path) -> Iterator[Lab]:
    """The same server without kvshare."""
    it = Lab(llama)
    yield it
    it.close()


class Texts:
    """Seeded random texts: passages never share a span unless they are the same passage."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def passage(self, length: int) -> list[int]:
        return [self.rng.randrange(2, VOCAB) for _ in range(length)]

    def rows(self, length: int, *, start: int = 0) -> list[tuple[int, int]]:
        """Ascending, disjoint ranges in ``[start, length)``; the last token is among them."""
        cuts = sorted(self.rng.sample(range(start, length), min(8, length - start)))
        ranges = list(zip(cuts[::2], cuts[1::2], strict=True))
        last = (length - self.rng.randrange(1, 9), length)
        return [*(r for r in ranges if r[1] < last[0]), last]


@pytest.fixture
def texts(request: pytest.FixtureRequest) -> Texts:
    """Seeded by the test's own name, so that no test depends on another."""
    return Texts(sum(request.node.nodeid.encode()))
