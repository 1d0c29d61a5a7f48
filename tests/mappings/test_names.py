"""Wildcards: laws of match and resolve, translation by kind, overlap."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amaxbridge.mappings.canonical import canonical
from amaxbridge.mappings.names import NamePattern, natural_key, overlap, pattern

WORDS = st.sampled_from(["layers", "mlp", "experts", "weight", "a_b", "q"])
ATOMS = st.one_of(WORDS, st.just("*"), st.just("**"))
PATTERNS = st.lists(ATOMS, min_size=1, max_size=6).map(".".join)
NUMBERS = st.integers(0, 10**4).map(str)
PATHS = st.lists(WORDS, min_size=1, max_size=3).map(".".join)


@given(PATTERNS, st.data())
def test_what_resolves_matches(text: str, data: st.DataObject) -> None:
    made = pattern(text)
    captures = [data.draw(NUMBERS if wildcard == "*" else PATHS) for wildcard in made.wildcards]
    name = made.resolve(captures)
    matched = made.match(name)
    assert matched is not None
    assert made.resolve(matched) == name
    if "**" not in made.wildcards:
        assert matched == tuple(captures)


@st.composite
def generalized(draw: st.DrawFn, name: str) -> str:
    """A pattern that matches the name: wildcards in place of some numbers, and of one path."""
    atoms = ["*" if atom.isdigit() and draw(st.booleans()) else atom for atom in name.split(".")]
    begin = draw(st.integers(0, len(atoms)))
    end = draw(st.integers(begin, len(atoms)))
    return ".".join([*atoms[:begin], *["**"] * (begin < end), *atoms[end:]])


@given(PATTERNS, st.data())
def test_a_name_that_matches_two_patterns_means_they_overlap(one: str, data: st.DataObject) -> None:
    name = pattern(one).resolve([data.draw(NUMBERS if w == "*" else PATHS) for w in pattern(one).wildcards])
    other = data.draw(generalized(name))
    assert pattern(other).match(name) is not None
    assert overlap(one, other)
    assert overlap(other, one)


@given(PATTERNS, PATTERNS, st.data())
def test_patterns_that_do_not_overlap_share_no_name(one: str, other: str, data: st.DataObject) -> None:
    if not overlap(one, other):
        name = pattern(one).resolve([data.draw(NUMBERS if w == "*" else PATHS) for w in pattern(one).wildcards])
        assert pattern(other).match(name) is None
    assert overlap(one, one)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("a.*.b", "a.3.b", True),
        ("a.*.b", "a.x.b", False),
        ("**.b", "a.*.b", True),
        ("**.c", "a.*.b", False),
        ("w*", "w1*", True),
        ("w*", "w", False),
        ("layers.*.x", "layers.*.y", False),
        ("**.x.*", "a.**", True),
    ],
)
def test_overlap(one: str, other: str, expected: bool) -> None:
    assert overlap(one, other) is expected
    assert overlap(other, one) is expected


def test_star_is_a_number_and_not_a_path() -> None:
    made = NamePattern("layers.*.weight")
    assert made.match("layers.12.weight") == ("12",)
    assert made.match("layers.x.weight") is None
    assert made.match("layers.1.2.weight") is None
    assert made.match("layers.1.weight.more") is None


def test_captures_are_translated_by_kind_not_by_position() -> None:
    """Megatron-Bridge fills `**` first, wherever it stands; a path would land in a layer number."""
    source, target = pattern("decoder.layers.*.**.weight"), pattern("model.**.layers.*.weight")
    captures = source.match("decoder.layers.3.mlp.up.weight")
    assert captures == ("3", "mlp.up")
    assert source.translate(captures, target) == "model.mlp.up.layers.3.weight"


def test_resolving_with_fewer_captures_keeps_the_expert_wildcard() -> None:
    assert pattern("layers.*.experts.*.w").resolve(["7"]) == "layers.7.experts.*.w"


def test_natural_order() -> None:
    names = ["layers.10.a", "layers.2.b", "layers.2.a", "embed"]
    assert sorted(names, key=natural_key) == ["embed", "layers.2.a", "layers.2.b", "layers.10.a"]


@pytest.mark.parametrize(
    ("spelled", "wanted"),
    [
        ("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.0.input_layernorm.weight"),
        ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "decoder.layers.0.pre_mlp_layernorm.weight"),
        (
            "decoder.layers.4.mlp.experts.local_experts.17.linear_fc1.weight",
            "decoder.layers.4.mlp.experts.linear_fc1.weight17",
        ),
        (
            "decoder.layers.4.mlp.experts.local_experts.17.linear_fc2.input_quantizer",
            "decoder.layers.4.mlp.experts.linear_fc2.input_quantizer.17",
        ),
        ("decoder.layers.4.mlp.linear_fc2.weight", "decoder.layers.4.mlp.linear_fc2.weight"),
    ],
)
def test_one_spelling(spelled: str, wanted: str) -> None:
    assert canonical(spelled) == wanted
    assert canonical(wanted) == wanted


def test_spellings_stay_apart() -> None:
    names = [canonical(f"mlp.experts.local_experts.{i}.linear_fc{j}.weight") for i in range(12) for j in (1, 2)]
    assert all(one != other for one, other in combinations(names, 2))
