"""Data files are pages: no line is too long, rows stand apart, and the text says the same."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from galvatron.core.compact import WIDTH, compact

WORDS = st.text(alphabet="abc.", min_size=1, max_size=12)
VALUES = st.recursive(
    st.booleans() | st.integers(0, 9999) | WORDS,
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(WORDS, inner, max_size=12),
    max_leaves=60,
)


@settings(derandomize=True)
@given(st.dictionaries(WORDS, VALUES, min_size=1, max_size=6))
def test_text_says_the_same_in_lines_that_fit(data: dict[str, object]) -> None:
    text = compact(data)
    assert json.loads(text) == data
    assert text.endswith("}\n")
    assert max(map(len, text.splitlines())) <= WIDTH


def test_rows_stand_apart_below_each_other() -> None:
    rows = [{"name": "a" * 30, "shape": [1, 2]}, {"name": "b" * 30, "shape": [3]}]
    assert compact({"size": 1, "rows": rows}) == (
        '{"size": 1,\n'
        f' "rows": [{{"name": "{"a" * 30}", "shape": [1, 2]}},\n'
        f'          {{"name": "{"b" * 30}", "shape": [3]}}]}}\n'
    )
