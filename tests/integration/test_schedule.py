"""``--schedule-policy kvshare`` on SGLang's own scheduler: who goes first, who waits for a twin."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Texts
from lab import Lab, computed, lab, request

CHUNK = 512
SETTINGS = {
    "overlap": {"disable_overlap_schedule": False},
    "page 16": {"page_size": 16},
}


@pytest.fixture(scope="module", params=list(SETTINGS))
def it(request: pytest.FixtureRequest, llama: Path) -> Iterator[Lab]:
    settings = {"schedule_policy": "kvshare", "chunked_prefill_size": CHUNK}
    with lab(llama, kvshare=True, **settings, **SETTINGS[request.param]) as one:
        yield one


def test_eight_with_the_same_new_document_compute_it_once(it: Lab, texts: Texts) -> None:
    document = texts.passage(300)
    script = [
        [
            request(f"r{i}", texts.passage(8 + 3 * i) + document + texts.passage(20), new=2)
            for i in range(8)
        ]
    ]
    answers = it.play(script)
    rows = sorted(computed(answers[f"r{i}"]["kvshare"]) for i in range(8))
    print(rows)
    assert rows[-1] > 300
    assert rows[-2] < 150
    it.ask("probes:check")
