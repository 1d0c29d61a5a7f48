"""Patterns are matched as `re` matches them, in time that a hostile pattern cannot stretch."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amaxbridge.export.schemes.linear_pattern import LinearPattern, UnsupportedPattern
from amaxbridge.export.schemes.targets import is_sound, means

_ATOMS = (
    "a", "b", "é", "0", ".", r"\.", r"\d", r"\w", r"\s", r"\D", "[ab]", "[^a]", "[a-z0-9]", r"\b", r"\B", "^", "$",
    r"\A", r"\Z",
)  # fmt: skip
_AROUND = (
    "(?:{})", "({})*", "({})+?", "({})?", "({}){{1,3}}", "({}){{2}}", "(?={})", "(?!{})", "(?<={})", "(?<!{})",
    "(?i:{})", "(?s:{})", "(?a:{})",
)  # fmt: skip
PATTERNS = st.recursive(
    st.sampled_from(_ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(st.sampled_from(_AROUND), inner).map(lambda pair: pair[0].format(pair[1])),
    ),
    max_leaves=8,
)
HOSTILE = (
    r"(a+)+$",
    r"(a|a)*b",
    r"(a|aa)+$",
    r"(x+x+)+y",
    r".*.*.*.*.*.*.*.*z",
    r"(.*a){20}b",
    r"(?:(?:a?){30}){30}c",
    r"(\w+\.?)*-",
)
ENGINES = (
    r".*self_attn.*", r".*mlp\.gate$", r"^(?!.*experts).*_proj$", r"model\.layers\.\d+\.mlp\.(gate|up)_proj$",
    r"(?i).*LM_HEAD", r"vision_(tower|model).*", r".*layers\.(?:0|1|2)\..*",
)  # fmt: skip
NAMES = (
    "model.layers.10.self_attn.q_proj", "model.layers.2.mlp.gate", "model.layers.2.mlp.gate_proj", "lm_head",
    "model.layers.3.mlp.experts.7.up_proj", "vision_tower.encoder.layers.0.mlp.fc1", "",
)  # fmt: skip


@settings(max_examples=400, derandomize=True, database=None)
@given(PATTERNS, st.text("abAÉé0.\n_ -", max_size=9))
def test_a_pattern_matches_what_re_matches(pattern: str, name: str) -> None:
    try:
        expected = re.compile(pattern)
    except re.error:
        with pytest.raises(UnsupportedPattern):
            LinearPattern(pattern)
        return
    for few_ways in (0, 20_000):
        assert LinearPattern(pattern, few_ways=few_ways).matches(name) is (expected.match(name) is not None)


@pytest.mark.parametrize("pattern", ENGINES)
def test_patterns_of_engines_match_what_re_matches(pattern: str) -> None:
    linear = LinearPattern(pattern, few_ways=0)
    for name in NAMES:
        assert linear.matches(name) is means(f"re:{pattern}", name) is (re.match(pattern, name) is not None)


@pytest.mark.parametrize("pattern", HOSTILE)
def test_no_pattern_takes_long(pattern: str) -> None:
    """`re` would take longer than the universe is old."""
    begin = time.process_time()
    assert not means(f"re:{pattern}", "a" * 900 + "!")
    assert not means(f"re:{pattern}", "x" * 30 + "!")
    assert time.process_time() - begin < 2


@pytest.mark.parametrize(
    "pattern",
    [
        "(", "a**", r"(a)\1", "(?(1)a|b)(a)", "(?>a*)b", "a*+b", "(a{999}){999}", "(" * 5000, "a" * 20_000, r"\p{L}",
        "a{99999999999}",
    ],
)  # fmt: skip
def test_what_has_no_bounded_answer_is_refused(pattern: str) -> None:
    begin = time.process_time()
    with pytest.raises(UnsupportedPattern):
        LinearPattern(pattern)
    assert not is_sound(f"re:{pattern}") and not means(f"re:{pattern}", "a")
    assert time.process_time() - begin < 2
