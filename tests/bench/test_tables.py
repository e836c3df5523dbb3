"""Tables are put between the markers of a page, and nowhere else."""

import pytest

from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.tables import markdown, write

PAGE = """before
<!-- one -->
| old |
<!-- /one -->
between
<!-- two --><!-- /two -->
after
"""


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def test_what_is_between_the_markers_is_replaced_and_the_rest_stays(page):
    for _ in range(2):
        write(page, "one", markdown(("a", "b"), [("x", "1")]))
        write(page, "two", ["text"])
    assert (
        page.read_text()
        == """before
<!-- one -->
| a | b |
| --- | ---: |
| x | 1 |
<!-- /one -->
between
<!-- two -->
text
<!-- /two -->
after
"""
    )


@pytest.mark.parametrize(
    ("change", "held"),
    [
        (("<!-- one -->", ""), "it holds <!-- /one -->"),
        (("<!-- /one -->", "<!-- /one --><!-- one -->"), "<!-- one -->, <!-- /one -->, <!-- one"),
        (("<!-- one -->\n| old |\n<!-- /one -->", ""), "it holds no such marker"),
        (("<!-- one -->\n| old |\n<!-- /one -->", "<!-- /one --><!-- one -->"), "it holds"),
    ],
)
def test_a_page_without_one_pair_of_markers_is_left_alone(page, change, held):
    page.write_text(text := PAGE.replace(*change))
    with pytest.raises(ScriptError, match=held):
        write(page, "one", ["new"])
    assert page.read_text() == text


def test_a_page_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ScriptError, match=r"none\.md cannot be read: No such file"):
        write(tmp_path / "none.md", "one", [])
