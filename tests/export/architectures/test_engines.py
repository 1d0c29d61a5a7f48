"""Names in engines: our matching against the engines' own matchers, and facts that the tables must hold."""

import json
from collections import Counter
from functools import cache
from itertools import product
from typing import Any

import pytest
from compressed_tensors.utils.match import is_match, match_targets
from torch import nn

from amaxbridge.export.architectures.engine_tables import Build, table_of
from amaxbridge.export.architectures.engines import (
    ENGINES,
    SGLANG,
    TRANSFORMERS,
    VLLM,
    Engine,
    Layer,
    as_named_by,
    read_layer,
)
from amaxbridge.export.quant_config import QuantConfig, read_quant_config
from amaxbridge.export.schemes import SCHEMES, modelopt_schemes
from tests.engines.matchers import IGNORES, LAYERS, TARGETS, recorded_cases
from tests.engines.merged_experts import projections
from tests.support.paths import GOLDEN, ROOT

FUSING = pytest.mark.parametrize("engine", [VLLM, SGLANG], ids=lambda engine: engine.key)


@cache
def recorded() -> Any:
    """The answers of the engines' own matchers, in the order of `recorded_cases`."""
    return json.loads((GOLDEN / "engine_matchers.json").read_text())


def config_of(targets: Any, ignore: Any) -> QuantConfig:
    group = SCHEMES["nvfp4a16"].config_group
    groups = {f"group_{at}": {**group, "targets": list(each)} for at, each in enumerate(targets)}
    return read_quant_config({"config_groups": groups, "ignore": list(ignore), "format": group["format"]})


def answer(engine: Engine, layer: Layer, config: QuantConfig) -> int | str:
    found = read_layer(engine, layer, config)
    if found.conflict:
        return "refused"
    if found.group is not None:
        return found.group
    return "ignored" if found.why.startswith("ignored") else "none"


@FUSING
def test_targets_and_ignore_are_read_as_the_engine_reads_them(engine: Engine) -> None:
    seen: Counter[Any] = Counter()
    for case, right in zip(recorded_cases()["layers"], recorded()[engine.key]["layers"], strict=True):
        packed = {name: tuple(members) for name, members in case["packed"].items()}
        members = Build(packed=packed).members_of(case["layer"])
        found = answer(engine, Layer(case["layer"], members), config_of(case["targets"], case["ignore"]))
        assert found == right, case
        seen[right] += 1
    assert sum(seen.values()) > 1000 and {0, 1, "ignored", "none", "refused"} <= seen.keys()


@FUSING
def test_names_are_renamed_as_the_engine_renames_them(engine: Engine) -> None:
    changed = 0
    for case, right in zip(recorded_cases()["renames"], recorded()[engine.key]["renames"], strict=True):
        renames = tuple((step, one, other) for step, one, other in case["renames"])
        assert Build(renames, first_only=engine is SGLANG).renamed(case["name"]) == right, case
        changed += right != case["name"]
    assert changed > 10


def test_transformers_reads_as_compressed_tensors_matches() -> None:
    seen: Counter[Any] = Counter()
    linear = nn.Linear(1, 1)
    for layer, ignore, targets in product(LAYERS, IGNORES, TARGETS):
        every = [target for group in targets for target in group]
        right: int | str = "none"
        if is_match(layer, linear, ignore):
            right = "ignored"
        elif matched := match_targets(layer, linear, every):
            right = next(at for at, group in enumerate(targets) if matched[0] in group)
        assert answer(TRANSFORMERS, Layer(layer, (layer,)), config_of(targets, ignore)) == right, (
            layer,
            ignore,
            targets,
        )
        seen[right] += 1
    assert {0, 1, "ignored", "none"} <= seen.keys()


# The tables


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.key)
def test_a_table_knows_every_scheme(engine: Engine) -> None:
    table = table_of(engine.key)
    assert set(table.schemes) == {*SCHEMES, *(scheme.served_as for scheme in modelopt_schemes())}
    for scheme, parts in table.schemes.items():
        assert {"linear", "experts"} <= parts.keys() and all(parts.values()), scheme
    assert table.version.count(".") == 2


SERVED = {
    ("sglang", "mxfp4", "linear"): False, ("sglang", "w8a8", "experts"): False, ("sglang", "w4a16", "experts"): True,
    ("sglang", "fp8_block", "head"): False, ("sglang", "fp8_dynamic", "head"): True,
    ("transformers", "w4a16_asym", "linear"): False, ("transformers", "nvfp4", "experts"): False,
    ("transformers", "nvfp4a16", "experts"): False, ("transformers", "fp8_dynamic", "experts"): True,
    ("vllm", "mxfp8", "linear"): True, ("vllm", "w4a16_asym", "experts"): True,
}  # fmt: skip


def test_what_is_served() -> None:
    """Facts of the field that the tables must hold."""
    for (engine, scheme, part), served in SERVED.items():
        assert (table_of(engine).refusal(scheme, part) is None) == served, (engine, scheme, part)


def test_the_page_says_what_the_tables_say() -> None:
    page = (ROOT / "docs" / "engines.md").read_text()
    assert all(f"{name} {table_of(name.lower()).version}" in page for name in ("vLLM", "SGLang", "transformers"))
    for scheme in SCHEMES:
        parts = [(engine.key, part) for engine in ENGINES for part in ("linear", "experts")]
        marks = ["no" if table_of(engine).refusal(scheme, part) else "yes" for engine, part in parts]
        assert f"| `{scheme}` | {' | '.join(marks)} |" in page


ARCHITECTURES = {
    "vllm": {"LlamaForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM",
             "Gemma3ForConditionalGeneration", "NemotronHForCausalLM", "MixtralForCausalLM"},
    "sglang": {"LlamaForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM"},
}  # fmt: skip


@FUSING
def test_architectures_are_known(engine: Engine) -> None:
    builds = table_of(engine.key).builds
    assert ARCHITECTURES[engine.key] <= builds.keys() and len(builds) > 200


@pytest.mark.parametrize(
    ("engine", "architecture", "module", "layer", "unquantized"),
    [
        ("vllm", "LlamaForCausalLM", "model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.qkv_proj", False),
        ("vllm", "GlmMoeDsaForCausalLM", "model.layers.3.self_attn.indexer.wk",
         "model.layers.3.self_attn.indexer.wk_weights_proj", True),
        ("vllm", "GlmMoeDsaForCausalLM", "model.layers.3.self_attn.indexer.wq_b",
         "model.layers.3.self_attn.indexer.wq_b", False),
        ("sglang", "DeepseekV32ForCausalLM", "model.layers.3.self_attn.indexer.weights_proj",
         "model.layers.3.self_attn.indexer.weights_proj", True),
        ("vllm", "JambaForCausalLM", "model.layers.0.mamba.in_proj", "model.layers.0.mamba.in_proj", True),
        ("vllm", "JambaForCausalLM", "model.layers.0.self_attn.k_proj", "model.layers.0.qkv_proj", False),
        ("vllm", "MambaForCausalLM", "backbone.layers.0.mixer.x_proj", "backbone.layers.0.mixer.x_proj", True),
        ("vllm", "Gemma3ForConditionalGeneration", "model.language_model.layers.0.mlp.up_proj",
         "language_model.model.layers.0.mlp.gate_up_proj", False),
        ("vllm", "MixtralForCausalLM", "model.layers.0.block_sparse_moe.gate",
         "model.layers.0.block_sparse_moe.gate", True),
    ],
)  # fmt: skip
def test_modules_of_files_are_layers_of_engines(
    engine: str, architecture: str, module: str, layer: str, unquantized: bool
) -> None:
    build = table_of(engine).build_of({"architectures": [architecture]})
    assert build is not None
    path = build.fused(build.path_of(module))
    assert path == layer
    assert build.builds_unquantized(path) == unquantized


def test_names_of_files_in_ignore_are_those_of_the_engine() -> None:
    """Gemma 3 with images: the tower's name in the files is not its name in vLLM."""
    build = table_of("vllm").build_of({"architectures": ["Gemma3ForConditionalGeneration"]})
    assert build is not None
    tower = "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    siblings = [tower.replace("q_proj", each) for each in ("q_proj", "k_proj", "v_proj")]
    config = as_named_by(VLLM, build, config_of([["Linear"]], siblings))
    name = build.fused(build.path_of(tower))
    assert name == "vision_tower.vision_model.encoder.layers.0.self_attn.qkv_proj"
    assert answer(VLLM, Layer(name, build.members_of(name)), config) == "ignored"


@pytest.mark.parametrize(
    ("architecture", "taken"),
    [
        ("Qwen3MoeForCausalLM", ["down_proj", "gate_proj", "up_proj"]),
        ("MixtralForCausalLM", ["w1", "w2", "w3"]),
        ("Llama4ForCausalLM", ["down_proj", "gate_proj", "up_proj"]),
        ("GraniteMoeForCausalLM", []),
        ("GptOssForCausalLM", []),
    ],
)
def test_single_experts_that_transformers_takes(architecture: str, taken: list[str]) -> None:
    """Asked of transformers again, and in the table."""
    assert projections(architecture) == taken == TRANSFORMERS.facts.merges[architecture]
