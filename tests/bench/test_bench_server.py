"""A bench serves a model as its users would; only weights that it made itself need no care."""

import json

import pytest

from kvshare_sglang.bench import models
from kvshare_sglang.bench.models import READER
from kvshare_sglang.bench.server import ServerSpec

FLAG, DEFAULT = "--kvshare-calibration", "--kvshare-default"


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_HOME", tmp_path / "cache" / "models")
    shape = tmp_path / "tiny.json"
    shape.write_text(json.dumps({"max_position_embeddings": 64, "vocab_size": 300}))
    return models.make(shape, weights=False).path


def command(model, *args):
    return ServerSpec("it", model, args=args).command(1)


def test_random_weights_that_were_made_here_are_served_as_a_model_whose_answers_hold(made):
    said = command(made, "--kvshare")
    assert said[said.index(FLAG) + 1] == "off"


def test_any_other_model_gets_its_care_and_its_requests_reuse(made, tmp_path):
    for model in (READER, tmp_path / made.name, made.with_name("smollm2-135m-instruct")):
        said = command(model, "--kvshare")
        assert FLAG not in said
        assert said[said.index(DEFAULT) + 1] == "auto"


def test_what_is_asked_for_stands_and_a_plain_server_is_told_nothing(made):
    assert command(made, "--kvshare", FLAG, "auto").count(FLAG) == 1
    for asked in ((DEFAULT, "exact"), (f"{DEFAULT}=exact",)):
        assert command(READER, "--kvshare", *asked)[-len(asked) :] == list(asked)
    said = command(made, "--kvshare", f"{FLAG}=auto")
    assert said[-1] == f"{FLAG}=auto"
    assert FLAG not in said
    assert said[said.index(DEFAULT) + 1] == "auto"  # care is looked at, not the exact path
    assert not {FLAG, DEFAULT} & set(command(made))
