"""A family of a user's own: what a file must have, and the one error for each that lacks it."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from amaxbridge.mappings.errors import UnknownArchitectureError, UsageError
from amaxbridge.mappings.families.llama import LLAMA
from amaxbridge.mappings.family_file import find_family, judge, own_family

HEAD = """
from dataclasses import replace
from amaxbridge.mappings.families.llama import LLAMA
from amaxbridge.mappings.weights import ReplicatedMapping
"""
WHOLE = f'{HEAD}\nFAMILY = replace(LLAMA, architectures=("MineForCausalLM",))\n'
CONFIG = {
    "architectures": ["MineForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 131,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}


def written(directory: Path, text: str) -> Path:
    (file := directory / "mine.py").write_text(text)
    return file


def test_a_whole_file(tmp_path: Path) -> None:
    family = find_family(written(tmp_path, WHOLE), CONFIG)
    assert (family.architectures, family.file) == (("MineForCausalLM",), str(tmp_path / "mine.py"))
    assert family.registry.file == family.file
    assert family.registry.megatron_to_hf_lookup("decoder.layers.7.mlp.linear_fc2.weight") is not None
    judge(family, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"], "no bytecode beside it"


def test_a_file_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_mine.py").write_text('NAME = "MineForCausalLM"\n')
    file = written(
        tmp_path, WHOLE.replace('"MineForCausalLM"', "NAME").replace(HEAD, f"{HEAD}from beside_mine import *")
    )
    before = list(sys.path)
    assert own_family(file).architectures == ("MineForCausalLM",)
    assert sys.path == [*before, str(tmp_path)], "last: nothing there takes the place of an installed package"


def test_a_file_is_read_anew_each_time(tmp_path: Path) -> None:
    file = written(tmp_path, WHOLE)
    assert own_family(file).architectures == ("MineForCausalLM",)
    written(tmp_path, WHOLE.replace("Mine", "Other"))
    assert own_family(file).architectures == ("OtherForCausalLM",)


def test_the_family_itself() -> None:
    mine = replace(LLAMA, architectures=("MineForCausalLM",))
    assert find_family(mine, CONFIG).file == "the family given"
    assert find_family(None, {"architectures": ["LlamaForCausalLM"]}) is LLAMA
    with pytest.raises(UnknownArchitectureError, match=r"family=FILE\.py: see docs/custom-models\.md"):
        find_family(None, CONFIG)


BAD = {
    "x = (\n": r"mine\.py, line 1: '\(' was never closed: x = \($",
    f"{HEAD}\nFAMILY = LLAMA(\n": r"mine\.py, line 6: .*never closed",
    "\x00": r"mine\.py.*null bytes",
    "import no_such_module\n": r"mine\.py, line 1: ModuleNotFoundError: No module named 'no_such_module'",
    "\n\nraise SystemExit(3)\n": r"mine\.py, line 3: SystemExit: 3",
    "\n1 / 0\n": r"mine\.py, line 2: ZeroDivisionError: division by zero",
    "FAMILY = 3\n": r"FAMILY is a int, not a ModelFamily; see docs/custom-models\.md",
    "": r"mine\.py sets no FAMILY: name the ModelFamily there so; see",
    WHOLE.replace("FAMILY =", "MINE ="): r"sets no FAMILY: name the ModelFamily there so \(LLAMA, MINE are some\)",
    WHOLE.replace("MineForCausalLM", "LlamaForCausalLM"): r"claims LlamaForCausalLM, whose family is known here",
    WHOLE.replace('("MineForCausalLM",)', '("MineForCausalLM", "Qwen3MoeForCausalLM")'): r"claims Qwen3MoeForCausalLM,",
    WHOLE.replace('("MineForCausalLM",)', '"MineForCausalLM"'): r"architectures is 'MineForCausalLM', not a tuple",
    WHOLE.replace('("MineForCausalLM",)', "()"): r"architectures is \(\), not a tuple",
    WHOLE.replace("),)", "),), mappings=()").replace(",))", ",), mappings=())"): r"mappings of weights; none found",
    WHOLE.replace(",))", ",), mappings=(LLAMA.mappings, 3))"): r"mappings of weights; .*A group is added with a star",
    WHOLE.replace(
        ",))", ',), mappings=(*LLAMA.mappings, ReplicatedMapping("output_layer.weight", "lm_head.weight")))'
    ): r"mine\.py: mappings overlap.*\n.*output_layer\.weight",
    f'{HEAD}\nReplicatedMapping("a.*.weight", "b.weight")\n': r"mine\.py: .*'b\.weight' does not have the wildcards",
    WHOLE.replace(",))", ",), no_such_field=1)"): r"mine\.py, line 6: TypeError: .*no_such_field",
}


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=range(len(BAD)))
def test_a_bad_file_ends_in_one_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_family(written(tmp_path, text), CONFIG)
    assert re.search(message, str(caught.value)), caught.value
    assert str(tmp_path / "mine.py") in str(caught.value)


@pytest.mark.parametrize("name", ["missing.py", "", "mine\0.py", "x" * 400])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"family=.* cannot be read"):
        own_family(f"{tmp_path}/{name}")


def test_a_file_for_another_model(tmp_path: Path) -> None:
    file = written(tmp_path, WHOLE)
    with pytest.raises(
        UsageError, match=r"a family of MineForCausalLM, but config\.json has architectures OtherModel:"
    ):
        find_family(file, {"architectures": ["OtherModel"]})
    with pytest.raises(UsageError, match=r"has architectures \(none\)"):
        find_family(file, {})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("transformer", 'Translation(lambda config: config["no_such"])', r"line 7: KeyError: 'no_such'"),
        ("model", "Translation(lambda config: 1 // 0)", "line 7: ZeroDivisionError"),
        ("layers", "Translation(lambda config: config.no_such)", "line 7: AttributeError"),
        ("transformer", '"no_such.field"', r"has no 'no_such\.field', which"),
    ],
)
def test_a_table_that_fails_is_named_before_work_begins(tmp_path: Path, field: str, value: str, message: str) -> None:
    head = HEAD + "from amaxbridge.mappings.family import Translation"
    table = f'{field}={{**LLAMA.{field}, "x": {value}}}'
    family = own_family(written(tmp_path, WHOLE.replace(HEAD, f"{head}\n").replace(",))", f",), {table})")))
    with pytest.raises(UsageError, match=message):
        judge(family, CONFIG)


def test_what_only_stops_building_does_not_stop_reading(tmp_path: Path) -> None:
    family = own_family(written(tmp_path, WHOLE))
    judge(family, {**CONFIG, "hidden_act": "gelu"})
    with pytest.raises(UsageError, match="hidden_act='gelu'"):
        family.check_buildable({**CONFIG, "hidden_act": "gelu"})
