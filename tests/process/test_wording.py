"""Untrusted text, made safe for a terminal."""

import json
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from batchcap.process.wording import excerpt, printable, printable_json, printable_lines

ANY_TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=()),
        st.sampled_from("\n\t\r\x1b\x7f\x9b\u200b\u2028\u202e\u2066\ud800\U000e0001\u3000狗"),
    )
)
OBEYED_OR_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def only_prints(text: str) -> bool:
    return {unicodedata.category(char) for char in text}.isdisjoint(OBEYED_OR_HIDDEN)


@given(ANY_TEXT)
def test_printable_text_is_one_line_that_a_terminal_only_prints(text: str) -> None:
    assert only_prints(printable(text))
    assert len(printable(text)) == len(text)
    assert len(excerpt(text)) <= 100


@given(ANY_TEXT)
def test_printable_lines_keep_their_number(text: str) -> None:
    lines = printable_lines(text).split("\n")
    assert all(map(only_prints, lines))
    assert len(lines) == text.count("\n") + 1


@given(ANY_TEXT, st.sampled_from([None, 2]))
def test_json_keeps_its_values(text: str, indent: int | None) -> None:
    # A pair of lone surrogates is one character to every reader of JSON.
    value = json.loads(json.dumps(text))
    safe = printable_json(json.dumps({"a": [value]}, ensure_ascii=False, indent=indent))
    assert all(map(only_prints, safe.split("\n")))
    assert json.loads(safe) == {"a": [value]}


def test_visible_characters_and_blanks_stay() -> None:
    assert printable_lines("# 狗\u3000é\u00a0😀\n\n- *a* `b`") == "# 狗\u3000é\u00a0😀\n\n- *a* `b`"
    assert printable("a\tb\nc\x1b[0m\u202e\ud800") == "a?b?c?[0m??"
