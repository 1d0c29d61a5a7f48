"""Layers under ModelOpt's configs: our reading against the engines' own, and what we write against our reading."""

import json
from collections import Counter
from functools import cache
from typing import Any

import pytest

from amaxbridge.export.architectures.engine_tables import GENERIC, Build
from amaxbridge.export.architectures.engines import SGLANG, TRANSFORMERS, VLLM, Engine, Layer, as_named_by
from amaxbridge.export.architectures.modelopt_matchers import excluded_entries, read_in_modelopt
from amaxbridge.export.quant_config import QuantConfig, read_quant_config
from tests.engines.modelopt_matchers import recorded_cases
from tests.support.paths import GOLDEN

READING = pytest.mark.parametrize("engine", [VLLM, SGLANG], ids=lambda engine: engine.key)
ONE = "NVFP4"


@cache
def recorded() -> Any:
    return json.loads((GOLDEN / "modelopt_matchers.json").read_text())


def config_of(excluded: list[str], algorithms: dict[str, str] | None = None) -> QuantConfig:
    return _config_of(tuple(excluded), tuple((algorithms or {}).items()))


@cache
def _config_of(excluded: tuple[str, ...], algorithms: tuple[tuple[str, str], ...]) -> QuantConfig:
    said: dict[str, Any] = {"quant_algo": ONE}
    if algorithms:
        layers = {name: {"quant_algo": algorithm} for name, algorithm in algorithms}
        said = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    return read_quant_config({"quant_method": "modelopt", "exclude_modules": list(excluded), **said}).checked()


def answer(engine: Engine, layer: Layer, config: QuantConfig) -> str:
    found = read_in_modelopt(engine, layer, config)
    assert found is not None
    if found.conflict:
        return "refused"
    if found.group is None:
        return "ignored" if found.why.startswith("ignored") else "none"
    scheme = config.groups[found.group].scheme
    assert scheme is not None
    return scheme.stored_as


@READING
def test_layers_are_read_as_the_engine_reads_them(engine: Engine) -> None:
    seen: Counter[str] = Counter()
    for case, right in zip(recorded_cases(), recorded()[engine.key]["layers"], strict=True):
        packed = {name: tuple(members) for name, members in case["packed"].items()}
        layer = Layer(case["layer"], Build(packed=packed).members_of(case["layer"]))
        found = answer(engine, layer, config_of(case["excluded"], case["algorithms"]))
        assert found == (ONE if right == "ONE" else right), case
        seen[right] += 1
    assert sum(seen.values()) > 1000
    assert {"ONE", "NVFP4", "FP8", "ignored", "none", "refused"} <= seen.keys()


def test_other_engines_have_no_reader() -> None:
    assert read_in_modelopt(TRANSFORMERS, Layer.named("lm_head"), config_of([])) is None


def layer_of(module: str) -> Layer:
    """The layer of an engine that a module is part of."""
    if ".experts." in module:
        path = module.partition(".experts.")[0] + ".experts"
        return Layer(path, (path,))
    name = GENERIC.fused(module)
    return Layer(name, GENERIC.members_of(name))


def of_layer(number: int, *names: str) -> list[str]:
    return [f"model.layers.{number}.{name}" for name in names]


GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
EXPERTS = tuple(f"mlp.experts.{expert}.{name}_proj" for expert in range(2) for name in ("gate", "up", "down"))
QKV = tuple(f"self_attn.{each}_proj" for each in "qkv")
KEPT: dict[str, tuple[list[str], list[str], list[str]]] = {  # quantized, unquantized, entries
    "a router beside a dense gate": (
        of_layer(1, *GATE_UP), of_layer(1, "mlp.gate"), ["model.layers.1.mlp.gat[e]"],
    ),
    "a name that others begin with": (
        of_layer(0, "mlp.fc1", "mlp.fc2"), ["fc", "lm_head"], ["f[c]", "lm_head"],
    ),
    "a layer with one digit more": (
        of_layer(11, *GATE_UP, *QKV), of_layer(1, *GATE_UP, *QKV), sorted(of_layer(1, *GATE_UP, *QKV)),
    ),
    "experts of one layer": (
        of_layer(2, *EXPERTS), of_layer(1, *EXPERTS, "mlp.gate"),
        ["model.layers.1.mlp.experts*", "model.layers.1.mlp.gate"],
    ),
    "routed experts, and not shared ones": (
        of_layer(1, "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"), of_layer(1, *EXPERTS),
        ["model.layers.1.mlp.experts*"],
    ),
    "shared experts, and not routed ones": (
        of_layer(1, *EXPERTS), of_layer(1, "mlp.shared_expert.down_proj", "mlp.shared_expert_gate"),
        of_layer(1, "mlp.shared_expert.down_proj", "mlp.shared_expert_gate"),
    ),
    "one projection of a name that ends another": (
        of_layer(1, "mixer.in_proj_x"), of_layer(1, "mixer.in_proj"), ["model.layers.1.mixer.in_pro[j]"],
    ),
}  # fmt: skip


@READING
@pytest.mark.parametrize("case", KEPT)
def test_what_is_written_excludes_these_modules_and_no_other(case: str, engine: Engine) -> None:
    quantized, unquantized, entries = KEPT[case]
    assert excluded_entries(unquantized, quantized) == entries
    in_tower = Build((("prefix", "model.", "language_model.model."), ("prefix", "lm_head", "language_model.lm_head")))
    for build in (GENERIC, in_tower):
        config = as_named_by(engine, build, config_of(entries))
        read = {module: answer(engine, _renamed(build, layer_of(module)), config) for module in quantized + unquantized}
        assert read == dict.fromkeys(quantized, ONE) | dict.fromkeys(unquantized, "ignored")
    config = config_of(entries)
    assert [config.scheme_of(module) is not None for module in quantized] == [True] * len(quantized)
    assert [config.scheme_of(module) for module in unquantized] == [None] * len(unquantized)


def _renamed(build: Build, layer: Layer) -> Layer:
    return Layer(build.renamed(layer.name), tuple(map(build.renamed, layer.members)))
