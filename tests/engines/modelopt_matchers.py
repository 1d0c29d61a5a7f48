"""What the engines' own readers of ModelOpt's configs answer: what is excluded, and the algorithm of the rest.

The functions are compiled from the engine's source, as in `matchers`. The answers are recorded in
tests/golden/modelopt_matchers.json, with which a test compares ours.
"""

import ast
import json
import logging
import re
import sys
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

from tests.engines.dispatch import functions, names_for
from tests.engines.matchers import PACKED

_ROOM = "layers/quantization"
FILES = {
    "vllm": (f"vllm/model_executor/{_ROOM}/utils/quant_utils.py", f"vllm/model_executor/{_ROOM}/modelopt.py"),
    "sglang": (f"sglang/srt/{_ROOM}/utils.py", f"sglang/srt/{_ROOM}/modelopt_quant.py"),
}
_WANTED = (
    "is_layer_skipped", "is_layer_excluded", "_resolve_quant_algo", "_quantized_layer_prefix_candidates",
    "_module_path_match", "_compile_exclusion_pattern",
)  # fmt: skip
LAYERS = (
    "model.layers.1.self_attn.qkv_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.gate_up_proj",
    "model.layers.1.mlp.down_proj", "model.layers.1.mlp.gate", "model.layers.1.mlp.experts",
    "model.layers.1.mlp.shared_experts.down_proj", "model.layers.11.mlp.gate_up_proj",
    "model.layers.1.self_attn.fused_qkv_a_proj", "model.layers.1.self_attn.kv_b_proj",
    "language_model.model.layers.1.mlp.gate_up_proj", "lm_head", "language_model.lm_head",
)  # fmt: skip
EXCLUDED: tuple[tuple[str, ...], ...] = (
    (), ("lm_head",), ("model.layers.1.mlp.gate",), ("model.layers.1.mlp.gat[e]",), ("*.mlp.gate",), ("mlp.gate",),
    ("gate",), ("model.layers.1.mlp.gate_proj",), ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"),
    ("model.layers.1.mlp.gate_up_proj",), ("model.layers.1.mlp.gate_up_pro[j]",), ("model.layers.1.mlp.experts*",),
    ("model.layers.1.mlp.experts", "model.layers.1.mlp.experts.*"), ("model.layers.1.mlp.experts.0.up_proj",),
    ("model.layers.1.mlp*",), ("model.layers.1*",), ("model.layers.1.*",), ("model.layers.1.self_attn",),
    ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"),
    ("model.layers.1.self_attn.q_proj",), ("model.layers.0.self_attn.kv_b_proj",),
    ("model.layers.0.self_attn.q_a_proj",), ("model.layers.1.mlp.shared_experts.down_proj",), ("*lm_head*",),
)  # fmt: skip
ALGORITHMS: tuple[dict[str, str], ...] = (
    {},
    {"model.layers.1.mlp.gate_proj": "NVFP4", "model.layers.1.mlp.up_proj": "NVFP4", "lm_head": "FP8"},
    {"model.layers.1.mlp.gate_proj": "NVFP4", "model.layers.1.mlp.up_proj": "FP8"},
    {"model.layers.1.self_attn.q_proj": "FP8", "model.layers.1.mlp.down_proj": "NVFP4"},
    {"model.layers.1.mlp.experts.0.up_proj": "NVFP4", "model.layers.1.mlp.experts.0.down_proj": "NVFP4"},
    {"model.layers.1.mlp.experts": "NVFP4", "model.layers.1.mlp.shared_experts.down_proj": "FP8"},
    {"model.language_model.layers.1.mlp.gate_proj": "FP8", "model.language_model.layers.1.mlp.up_proj": "FP8"},
)


def recorded_cases() -> list[dict[str, Any]]:
    """All layers with all lists and packed mappings; algorithms but the first with two lists only."""
    return [
        {"layer": layer, "excluded": list(excluded), "packed": packed, "algorithms": algorithms}
        for layer, excluded, packed, algorithms in product(LAYERS, EXCLUDED, PACKED, ALGORITHMS)
        if not algorithms or excluded in EXCLUDED[:2]
    ]


def answers(engine: str, sources: Path, given: list[dict[str, Any]]) -> list[str]:
    """For each case: the algorithm, `ONE` if there is one for all, `ignored`, `none`, or `refused`."""
    names = names_for(100)
    names |= {"re": re, "fnmatch": fnmatch, "MappingProxyType": MappingProxyType, "logger": SimpleNamespace()}
    for file in FILES[engine]:
        names |= _constants(sources / file)
        names |= functions(sources / file, _WANTED.__contains__, names)
    methods = {name: names[name] for name in ("is_layer_excluded", "_resolve_quant_algo", _WANTED[3])}
    config_class = type("Config", (), methods)
    return [_answer(engine, names, config_class(), case) for case in given]


def _constants(file: Path) -> dict[str, Any]:
    """The tables of literals of a file, which its functions use."""
    found = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Dict):
            try:
                found[node.target.id] = ast.literal_eval(node.value)
            except ValueError:  # not of literals
                continue
    return found


def _answer(engine: str, names: Any, config: Any, case: dict[str, Any]) -> str:
    """`get_quant_method` of the engine's config, whose classes of layers are not compiled."""
    layer, config.exclude_modules, config.packed_modules_mapping = case["layer"], case["excluded"], case["packed"]
    config.quantized_layers = {name: {"quant_algo": algorithm} for name, algorithm in case["algorithms"].items()}
    try:
        excluded = config.is_layer_excluded(layer)
        if engine == "sglang" and not layer.endswith(".experts"):
            excluded = names["is_layer_skipped"](layer, case["excluded"], case["packed"]) or excluded
        if excluded:
            return "ignored"
        return config._resolve_quant_algo(layer) or "none" if case["algorithms"] else "ONE"
    except ValueError:
        return "refused"


def main() -> None:
    """Prints the answers, as JSON."""
    logging.disable()
    engine, sources = sys.argv[1:]
    print(json.dumps(answers(engine, Path(sources), json.load(sys.stdin))))


if __name__ == "__main__":
    main()
