"""Packed experts: packing inverts cutting in every layout, through files; GPT-OSS's layout is transformers' own."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from amaxbridge.export.disk.packed_experts import ExpertPacker, found_in
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.export.disk.shard_layout import plan_layout
from amaxbridge.export.disk.shard_writer import ShardWriter
from amaxbridge.export.disk.staging import StagedDirectory
from amaxbridge.mappings.errors import CheckpointError, MappingError
from amaxbridge.mappings.family import PackedExperts
from amaxbridge.mappings.tensors import TensorSpec

EXPERTS, HIDDEN, FFN = 3, 32, 64
GPT_OSS = PackedExperts(transposed=True, interleaved=True)
SHAPES = {
    "gate_proj.weight": (FFN, HIDDEN),
    "up_proj.weight": (FFN, HIDDEN),
    "down_proj.weight": (HIDDEN, FFN),
    "gate_proj.bias": (FFN,),
    "up_proj.bias": (FFN,),
    "down_proj.bias": (HIDDEN,),
}


def experts() -> list[dict[str, Tensor]]:
    """The tensors of each expert, and one tensor of no expert."""
    tensors = [{f"mlp.experts.{e}.{name}": torch.randn(s) for name, s in SHAPES.items()} for e in range(EXPERTS)]
    return [*tensors, {"mlp.router.weight": torch.randn(EXPERTS, HIDDEN)}]


def specs_of(bundles: list[dict[str, Tensor]]) -> dict[str, TensorSpec]:
    return {name: TensorSpec.of(tensor) for bundle in bundles for name, tensor in bundle.items()}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_written_by_several_and_read_one_by_one(tmp_path: Path, transposed: bool, interleaved: bool) -> None:
    layout, bundles = PackedExperts(transposed, interleaved), experts()
    packer = ExpertPacker(specs_of(bundles), layout)
    planned = plan_layout(packer.specs)
    staged = StagedDirectory(tmp_path / "out")
    staged.open(planned)
    for bundle in reversed(bundles):  # each by a writer of its own, in any order
        writer = ShardWriter(staged.path, planned)
        for name, part, tensor in packer.pack(bundle):
            writer.write(name, tensor, part)
        writer.close()
    staged.commit()
    packed = {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}
    with SafetensorsCheckpoint(tmp_path / "out", found_in(layout)) as checkpoint:
        assert checkpoint.weight_map.keys() == {f"mlp.experts.{name}" for name in packed} | {"mlp.router.weight"}
        for name, tensor in (item for bundle in bundles for item in bundle.items()):
            assert torch.equal(checkpoint.read(name), tensor), name
        with pytest.raises(CheckpointError, match="no tensor"):
            checkpoint.read("mlp.experts.0.gate_proj.scale")


def test_gpt_oss_reads_gate_and_up_from_even_and_odd_columns() -> None:
    expert = experts()[0]
    written = {name: tensor for name, _, tensor in ExpertPacker({}, GPT_OSS).pack(expert)}
    assert torch.equal(written["mlp.experts.gate_up_proj"][:, 0::2], expert["mlp.experts.0.gate_proj.weight"].t())
    assert torch.equal(written["mlp.experts.gate_up_proj"][:, 1::2], expert["mlp.experts.0.up_proj.weight"].t())
    assert torch.equal(written["mlp.experts.gate_up_proj_bias"][1::2], expert["mlp.experts.0.up_proj.bias"])
    assert torch.equal(written["mlp.experts.down_proj"], expert["mlp.experts.0.down_proj.weight"].t())


def test_published_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    expected, published = {}, {}
    for name, (rows, columns) in {"gate_up_proj": (2 * FFN, HIDDEN), "down_proj": (HIDDEN, FFN)}.items():
        blocks = torch.randint(0, 256, (EXPERTS, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(100, 140, (EXPERTS, rows, columns // 32), dtype=torch.uint8)
        published |= {f"mlp.experts.{name}_blocks": blocks, f"mlp.experts.{name}_scales": scales}
        expected[f"mlp.experts.{name}"] = convert_moe_packed_tensors(blocks, scales)
    for directory, tensors in (("published", published), ("expected", expected)):
        (tmp_path / directory).mkdir()
        save_file(tensors, tmp_path / directory / "model.safetensors")
    with (
        SafetensorsCheckpoint(tmp_path / "published", found_in(GPT_OSS)) as found,
        SafetensorsCheckpoint(tmp_path / "expected", found_in(GPT_OSS)) as plain,
    ):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            name = f"mlp.experts.2.{projection}.weight"
            assert found.read(name).dtype == torch.bfloat16
            assert torch.equal(found.read(name), plain.read(name)), name


def test_a_missing_expert_is_refused() -> None:
    first, _, last, router = experts()
    with pytest.raises(MappingError, match=r"mlp\.experts\.gate_up_proj cannot be packed from experts \[0, 2\]"):
        ExpertPacker(specs_of([first, last, router]), GPT_OSS)


def test_without_a_layout_nothing_is_packed() -> None:
    specs = specs_of(experts())
    assert ExpertPacker(specs, None).specs == specs
