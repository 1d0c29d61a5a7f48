"""The plan of an export, as people and programs read it."""

import io

import torch
from rich.console import Console

from amaxbridge.export.output.finalizer import Finalizer
from amaxbridge.export.schemes import find_scheme
from amaxbridge.mappings.tensors import TensorSpec
from amaxbridge.scripts.plan_table import plan_rows, plan_table


def bf16(*shape: int) -> TensorSpec:
    return TensorSpec(shape, torch.bfloat16)


def moe(layers: int, experts: int) -> dict[str, TensorSpec]:
    """The rows of every tensor of a model whose first layer is dense."""
    specs = {"model.embed_tokens.weight": bf16(1000, 128), "lm_head.weight": bf16(1000, 128)}
    for layer in (f"model.layers.{number}" for number in range(layers)):
        dense = layer.endswith(".0")
        specs[f"{layer}.self_attn.o_proj.weight"] = bf16(128, 128)
        specs[f"{layer}.input_layernorm.weight"] = bf16(128)
        for block in ("mlp",) if dense else (f"mlp.experts.{expert}" for expert in range(experts)):
            for projection in ("gate_proj", "up_proj"):
                specs[f"{layer}.{block}.{projection}.weight"] = bf16(64, 128)
    return specs


def test_92_thousand_tensors_are_a_few_rows_and_no_byte_is_missing() -> None:
    specs = moe(layers=362, experts=127)
    assert len(specs) > 92_000
    finalizer = Finalizer(specs, find_scheme("nvfp4a16"), None)
    rows = plan_rows(specs, finalizer.output_specs, finalizer.scheme_names)
    assert [(row.name, row.count, row.written_as, row.scheme) for row in rows] == [
        ("lm_head.weight", 1, "BF16", ""),
        ("model.embed_tokens.weight", 1, "BF16", ""),
        ("model.layers.{0-361}.input_layernorm.weight", 362, "BF16", ""),
        ("model.layers.{0}.mlp.gate_proj.weight", 1, "U8 F8_E4M3 F32", "nvfp4a16"),
        ("model.layers.{0}.mlp.up_proj.weight", 1, "U8 F8_E4M3 F32", "nvfp4a16"),
        ("model.layers.{0-361}.self_attn.o_proj.weight", 362, "U8 F8_E4M3 F32", "nvfp4a16"),
        ("model.layers.{1-361}.mlp.experts.{0-126}.gate_proj.weight", 45847, "U8 F8_E4M3 F32", "nvfp4a16"),
        ("model.layers.{1-361}.mlp.experts.{0-126}.up_proj.weight", 45847, "U8 F8_E4M3 F32", "nvfp4a16"),
    ]
    assert sum(row.count for row in rows) == len(specs)
    assert sum(row.bytes_before for row in rows) == sum(spec.nbytes for spec in specs.values())
    assert sum(row.bytes_after for row in rows) == sum(spec.nbytes for spec in finalizer.output_specs.values())


def test_what_is_treated_otherwise_is_a_row_of_its_own() -> None:
    specs = moe(layers=8, experts=2)
    recipe = find_scheme("mxfp8", [r"re:model\.layers\.[257]\.self_attn"])
    finalizer = Finalizer(specs, recipe, None)
    rows = plan_rows(specs, finalizer.output_specs, finalizer.scheme_names)
    names = [(row.name, row.scheme) for row in rows if "o_proj" in row.name]
    assert names == [
        ("model.layers.{0-1,3-4,6}.self_attn.o_proj.weight", "mxfp8"),
        ("model.layers.{2,5,7}.self_attn.o_proj.weight", ""),
    ]
    screen = io.StringIO()
    Console(file=screen, width=160).print(plan_table(rows))
    assert "model.layers.{0-1,3-4,6}.self_attn.o_proj.weight" in screen.getvalue()


def test_what_has_no_source_is_counted_under_its_own_name() -> None:
    """Scales of a key-value cache have no source tensor."""
    scale = TensorSpec((1,), torch.float32)
    weight = {"model.layers.3.self_attn.k_proj.weight": bf16(8, 8)}
    rows = plan_rows(weight, {**weight, "model.layers.3.self_attn.k_scale": scale}, {})
    assert [(row.name, row.read_as, row.written_as, row.bytes_before, row.bytes_after) for row in rows] == [
        ("model.layers.{3}.self_attn.k_proj.weight", "BF16", "BF16", 128, 128),
        ("model.layers.{3}.self_attn.k_scale", "", "F32", 0, 4),
    ]
