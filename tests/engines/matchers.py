"""What the engines' own matchers answer: `should_ignore_layer`, `find_matched_target` and `WeightsMapper`.

The functions are compiled from the engine's source and run in a process of their own, beside the compressed-tensors
that the engine pins. The answers are recorded in tests/golden/engine_matchers.json, with which a test compares ours.
"""

import json
import logging
import re
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.engines.dispatch import MAPPERS, MATCHERS, Names, functions, names_for

LAYERS = (
    "model.layers.1.self_attn.qkv_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.gate_up_proj",
    "model.layers.1.mlp.down_proj", "model.layers.1.mlp.gate", "model.layers.10.mlp.gate_up_proj",
    "model.layers.1.self_attn.fused_qkv_a_proj", "model.layers.1.mlp.experts.0.gate_proj",
    "language_model.model.layers.1.self_attn.qkv_proj", "lm_head", "language_model.lm_head",
)  # fmt: skip
IGNORES: tuple[tuple[str, ...], ...] = (
    (), ("lm_head",), ("model.layers.1.mlp.gate",), ("mlp.gate",), ("model.layers.1.mlp.gate_proj",), ("gate_proj",),
    ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"), ("model.layers.1.mlp.gate_up_proj",),
    ("gate_up_proj",), (r"re:.*up_proj$",), (r"re:.*\.up_proj$",), (r"re:.*gate",), (r"re:model\.layers\.1",),
    (r"re:.*self_attn",), ("Linear",), (r"re:.*\.(q|k|v)_proj$",), (r"re:.*\.q_proj$",),
    ("model.layers.1.mlp.experts.0",), ("model.layers.1.self_attn",), (r"re:.*lm_head",),
)  # fmt: skip
TARGETS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("Linear",),), ((r"re:.*up_proj$",), ("Linear",)), ((r"re:.*\.up_proj$",), (r"re:.*",)),
    ((r"re:.*self_attn\..*",), (r"re:.*mlp\..*",)), ((r"re:.*\.q_proj$",), (r"re:.*\.(k|v)_proj$", "Linear")),
    (("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"),),
    (("lm_head", "Linear"),), ((r"re:.*lm_head",),), (("qkv_proj",),), ((r"re:.*_proj$",),),
)  # fmt: skip
PACKED: tuple[dict[str, list[str]], ...] = (
    {},
    {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]},
    {"fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"], "qkv_proj": ["q_proj", "k_proj", "v_proj"]},
)
RENAMES: tuple[list[list[str]], ...] = (
    [["prefix", "model.language_model.", "language_model.model."], ["prefix", "lm_head.", "language_model.lm_head."]],
    [["substr", ".self_attn.", "."], ["substr", "mamba", "mamba.mamba"]],
    [["substr", "attention.dense", "attention.o_proj"], ["suffix", ".router.gate.weight", ".gate.weight"]],
    [["prefix", "model.", ""], ["prefix", "", "model."]],
)
NAMES = (
    "model.language_model.layers.0.self_attn.q_proj", "lm_head", "lm_head.weight",
    "model.layers.3.mamba.in_proj.weight", "model.layers.3.attention.dense", "model.layers.3.mlp.router.gate.weight",
    "layers.0.q_proj", "Linear",
    r"re:model\.layers.*self_attn\..*",
)  # fmt: skip


def recorded_cases() -> dict[str, Any]:
    """All combinations of layers, ignores, targets and packed mappings; targets but the first with two ignores only."""
    cases = [
        {"layer": layer, "ignore": list(ignore), "targets": [list(each) for each in targets], "packed": packed}
        for layer, ignore, targets, packed in product(LAYERS, IGNORES, TARGETS, PACKED)
        if targets is TARGETS[0] or ignore in (IGNORES[0], IGNORES[1])
    ]
    return {"layers": cases, "renames": [{"name": name, "renames": each} for name in NAMES for each in RENAMES]}


def answers(engine: str, sources: Path, given: dict[str, Any]) -> dict[str, list[Any]]:
    """For each case: the number of the group, `ignored`, `none`, or `refused`; for each rename the new name."""
    names = names_for(100)
    names |= {"re": re, "fnmatch": lambda *_: False, "MappingProxyType": dict, "logger": SimpleNamespace()}
    for file in MATCHERS[engine]:
        names |= functions(sources / file, lambda name: True, names)
    return {
        "layers": [_layer(engine, names, case) for case in given["layers"]],
        "renames": [_renamed(engine, sources, case) for case in given["renames"]],
    }


def _layer(engine: str, names: Names, case: dict[str, Any]) -> int | str:
    is_head = case["layer"].endswith("lm_head")
    module = type("ParallelLMHead" if is_head else "QKVParallelLinear", (), {})()
    numbered = {target: at for at, group in reversed(list(enumerate(case["targets"]))) for target in group}
    targets = [target for group in case["targets"] for target in group]
    try:
        if names["should_ignore_layer"](case["layer"], case["ignore"], case["packed"]):
            return "ignored"
        if engine == "sglang" and is_head:  # the head is matched by name only, as `get_lm_head_scheme` does
            matches = names["check_equal_or_regex_match"]
            found = next((each for each in targets if matches(case["layer"], [each])), None)
        else:
            found = names["find_matched_target"](case["layer"], module, targets, case["packed"])
    except ValueError as error:
        return "none" if "Unable to find" in str(error) else "refused"
    return "none" if found is None else numbered[found]


def _renamed(engine: str, sources: Path, case: dict[str, Any]) -> str:
    names = Names({"logger": SimpleNamespace(warning_once=lambda *_: None)})
    methods = functions(sources / MAPPERS[engine], lambda name: "map_name" in name, names)
    mapper = type("Mapper", (), methods)()
    mapper.orig_to_new_renaming, mapper.orig_to_new_stacked = [], {}
    for step in ("regex", "substr", "prefix", "suffix"):
        rules = {one: other for kind, one, other in case["renames"] if kind == step}
        setattr(mapper, f"orig_to_new_{step}", rules)
    made: str = mapper._map_name(case["name"])
    return made


def main() -> None:
    """Prints the answers, as JSON."""
    logging.disable()
    engine, sources = sys.argv[1:]
    print(json.dumps(answers(engine, Path(sources), json.load(sys.stdin))))


if __name__ == "__main__":
    main()
