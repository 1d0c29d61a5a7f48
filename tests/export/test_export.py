"""Layout, writer, fused scales and finalizer: from Hugging Face tensors to files, no Megatron involved."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from amaxbridge.export.amax.fused_group_amax import MissingAmax, share_amax
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.disk.packed_experts import split_fused_moe_experts
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.export.disk.shard_layout import plan_layout
from amaxbridge.export.disk.shard_writer import ShardWriter
from amaxbridge.export.disk.staging import StagedDirectory, check_output
from amaxbridge.export.output.config_and_index import Companions, config_json, index_json
from amaxbridge.export.output.finalizer import Bundle, Finalizer
from amaxbridge.export.schemes import SCHEMES, find_scheme
from amaxbridge.mappings.errors import AmaxError, CheckpointError, MappingError, OutputExistsError, UsageError
from amaxbridge.mappings.tensors import TensorSpec
from tests.support.hard_weights import of_module

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn, torch.int64]


def specs_of(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}


def write(target: Path, tensors: dict[str, Tensor], max_shard_bytes: int = 10**9, writers: int = 1) -> None:
    layout = plan_layout(specs_of(tensors), max_shard_bytes)
    staged = StagedDirectory(target)
    staged.open(layout)
    shares = [ShardWriter(staged.path, layout) for _ in range(writers)]
    for index, (name, tensor) in enumerate(tensors.items()):
        shares[index % writers].write(name, tensor)
    for share in shares:
        share.close()
    index = index_json(layout)
    if index:
        staged.write_file("model.safetensors.index.json", index)
    staged.commit()


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=12),
    max_bytes=st.integers(1, 200),
    data=st.data(),
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], max_bytes: int, data: st.DataObject
) -> None:
    """Any shapes (scalars and empty tensors too), any dtypes, any shard size, several writers on one file."""
    target = tmp_path_factory.mktemp("written") / "out"
    tensors = {
        f"layers.{index}.weight": torch.randint(0, 100, shape).to(data.draw(st.sampled_from(DTYPES)))
        for index, shape in enumerate(shapes)
    }
    write(target, tensors, max_bytes, writers=3)
    with SafetensorsCheckpoint(target) as checkpoint:
        assert set(checkpoint.weight_map) == set(tensors)
        for name, tensor in tensors.items():
            found = checkpoint.read(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(
                found.view(torch.uint8) if found.ndim else found, tensor.view(torch.uint8) if tensor.ndim else tensor
            )
    for file in target.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_layout_keeps_natural_order_and_the_limit() -> None:
    specs = {f"layers.{index}.w": TensorSpec((10,), torch.uint8) for index in range(12)}
    layout = plan_layout(specs, max_shard_bytes=40)
    assert [list(shard.specs) for shard in layout.shards] == [
        [f"layers.{index}.w" for index in range(start, start + 4)] for start in (0, 4, 8)
    ]
    assert layout.shards[1].file_name == "model-00002-of-00003.safetensors"
    index = json.loads(index_json(layout) or b"")
    assert index["metadata"]["total_size"] == 120
    assert index["weight_map"]["layers.11.w"] == "model-00003-of-00003.safetensors"


def test_nothing_appears_at_the_target_before_commit(tmp_path: Path) -> None:
    layout = plan_layout({"w": TensorSpec((4,), torch.uint8)})
    staged = StagedDirectory(tmp_path / "out")
    staged.open(layout)
    assert not (tmp_path / "out").exists()
    staged.discard()
    assert list(tmp_path.iterdir()) == []


def test_overwriting_replaces_the_directory_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(OutputExistsError, match="overwrite=True"):
        check_output(target, overwrite=False)
    check_output(target, overwrite=True)
    write(target, {"w": torch.ones(3)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in target.iterdir()) == ["model.safetensors"]


def test_a_tensor_that_was_not_planned_is_refused(tmp_path: Path) -> None:
    layout = plan_layout({"w": TensorSpec((4,), torch.uint8)})
    staged = StagedDirectory(tmp_path / "out")
    staged.open(layout)
    with pytest.raises(ValueError, match=r"w: planned \[4\] uint8, given \[4\] float32 at row 0"):
        ShardWriter(staged.path, layout).write("w", torch.ones(4))


def test_config_and_carried_files(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json", "x.py"):
        (tmp_path / name).write_text("{}")
    assert list(Companions.of(tmp_path).files) == ["tokenizer.json", "x.py"]
    config = json.loads(config_json({"a": 1, "quantization_config": {"old": 1}}, {"quant_method": "new"}))
    assert config == {"a": 1, "quantization_config": {"quant_method": "new"}}
    assert json.loads(config_json({"a": 1, "quantization_config": {}}, None)) == {"a": 1}


class TestReading:
    """A directory that is not whole is named before anything is read from it."""

    def test_missing_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "gone.safetensors"}}')
        with pytest.raises(CheckpointError, match=r"gone\.safetensors"), SafetensorsCheckpoint(tmp_path) as checkpoint:
            checkpoint.read("w")

    def test_no_index(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
        with pytest.raises(CheckpointError, match="2 safetensors files"), SafetensorsCheckpoint(tmp_path) as checkpoint:
            checkpoint.read("a")

    def test_truncated_file(self, tmp_path: Path) -> None:
        save_file({"w": torch.ones(100)}, tmp_path / "model.safetensors")
        data = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(data[:-8])
        with pytest.raises(CheckpointError, match="cannot be read"), SafetensorsCheckpoint(tmp_path) as checkpoint:
            checkpoint.read("w")

    def test_missing_tensor(self, tmp_path: Path) -> None:
        save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="no tensor v"), SafetensorsCheckpoint(tmp_path) as checkpoint:
            checkpoint.read("v")


def state_for(modules: dict[str, tuple[float, float]]) -> QuantState:
    amax = {}
    for module, (weight, inputs) in modules.items():
        amax[f"{module}.weight_quantizer._amax"] = torch.tensor(weight)
        amax[f"{module}.input_quantizer._amax"] = torch.tensor(inputs)
    return QuantState(amax, dict.fromkeys(modules, "nvfp4"))


def test_a_group_shares_the_largest_amax() -> None:
    state = state_for({"l.q_proj": (1, 9), "l.k_proj": (3, 8), "l.v_proj": (2, 7), "l.o_proj": (5, 6)})
    shared = share_amax(state, state.formats, state.formats).by_module
    found = {module: tuple(float(value) for value in amax[:2] if value is not None) for module, amax in shared.items()}
    assert found == {
        "l.q_proj": (3, 9),
        "l.k_proj": (3, 9),
        "l.v_proj": (3, 9),
        "l.o_proj": (5, 6),
    }


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_an_amax_that_makes_no_scale_is_named(value: float) -> None:
    state = state_for({"l.q_proj": (1, 1), "l.k_proj": (1, value)})
    with pytest.raises(AmaxError, match=r"1 amax .*\n  l\.k_proj\.input_quantizer\._amax"):
        share_amax(state, state.formats, state.formats)
    assert share_amax(state, state.formats, ()).by_module["l.k_proj"].input is None


def test_every_missing_amax_is_named_at_once() -> None:
    state = QuantState({}, {"a": "nvfp4", "b": "nvfp4"})
    with pytest.raises(AmaxError, match="4 amax are missing") as raised:
        share_amax(state, state.formats, state.formats)
    assert str(raised.value).count(": missing") == 4


_GENERATOR = torch.Generator().manual_seed(29)


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_GENERATOR)


MODEL = {
    "model.embed_tokens.weight": _drawn(8, 32),
    "model.layers.0.q_proj.weight": _drawn(8, 32).bfloat16(),
    "model.layers.0.k_proj.weight": _drawn(8, 32).bfloat16(),
    "model.layers.0.norm.weight": _drawn(32),
    "lm_head.weight": _drawn(8, 32),
}
GOOD = {"model.layers.0.q_proj": (1.0, 2.0), "model.layers.0.k_proj": (3.0, 4.0)}


def test_finalizer_writes_what_it_planned() -> None:
    finalizer = Finalizer(specs_of(MODEL), find_scheme("nvfp4"), state_for(GOOD))
    written = dict(finalizer.finalize(Bundle.of(MODEL)))
    assert specs_of(written) == finalizer.output_specs
    assert finalizer.quantized == list(GOOD)
    assert finalizer.ignore == ["lm_head"]
    for kind, amax in (("weight_global_scale", 3.0), ("input_global_scale", 4.0)):
        scales = {written[f"{module}.{kind}"].item() for module in GOOD}
        assert len(scales) == 1, "one fused group, one global scale"
        assert scales.pop() == pytest.approx(2688 / amax, rel=3e-7), "a divisor"


def test_without_a_scheme_everything_stays() -> None:
    finalizer = Finalizer(specs_of(MODEL), None, QuantState())
    assert dict(finalizer.finalize(Bundle.of(MODEL))) == MODEL
    assert finalizer.quantization_config is None


def test_dequantized_weights_are_close() -> None:
    scheme = SCHEMES["nvfp4"]
    finalizer = Finalizer(specs_of(MODEL), find_scheme("nvfp4"), state_for(GOOD))
    name = "model.layers.0.q_proj"
    found = scheme.dequantize(of_module(name, dict(finalizer.finalize(Bundle.of(MODEL))))).float()
    original = MODEL[f"{name}.weight"].float().clamp(-3, 3)
    assert float((found - original).norm() / original.norm()) < 0.15


class TestFinalizerRefuses:
    def test_a_group_quantized_in_part(self) -> None:
        with pytest.raises(MappingError, match=r"q_proj as nvfp4; .*k_proj not"):
            Finalizer(specs_of(MODEL), find_scheme("nvfp4"), state_for({"model.layers.0.q_proj": (1, 1)}))

    def test_a_model_without_quantizers(self) -> None:
        with pytest.raises(UsageError, match="scheme=nvfp4 finds no module with quantizers"):
            Finalizer(specs_of(MODEL), find_scheme("nvfp4"), QuantState())

    def test_quantizers_of_another_format(self) -> None:
        state = state_for(GOOD)
        other = QuantState(state.amax, {**state.formats, "model.layers.0.q_proj": "fp8"})
        with pytest.raises(
            UsageError, match=r"needs nvfp4 quantizers, but the model has:\n  model.layers.0.q_proj: fp8"
        ):
            Finalizer(specs_of(MODEL), find_scheme("nvfp4"), other)

    def test_columns_that_make_no_blocks(self) -> None:
        model = {"m.down_proj.weight": torch.randn(4, 24)}
        with pytest.raises(MappingError, match=r"m\.down_proj\.weight: .*divisible by 16, not \[4, 24\]"):
            Finalizer(specs_of(model), find_scheme("nvfp4"), state_for({"m.down_proj": (1, 1)}))

    def test_an_unknown_scheme(self) -> None:
        with pytest.raises(UsageError, match=r"unknown scheme 'nvfp5'; known: nvfp4, .*, auto, none"):
            find_scheme("nvfp5")


def test_files_are_as_safetensors_writes_them(tmp_path: Path) -> None:
    """The safetensors library reads the same tensors from our files."""
    tensors = {"a.weight": torch.randn(3, 5), "b.weight": torch.arange(6, dtype=torch.uint8)}
    write(tmp_path / "out", tensors)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


class TestMissingAmax:
    """The policies on a group of two modules, one of which has no usable amax."""

    def state(self, bad: str) -> QuantState:
        state = state_for(GOOD)
        return QuantState({name: value for name, value in state.amax.items() if not name.endswith(bad)}, state.formats)

    def test_from_the_weights_of_the_whole_group(self) -> None:
        state = self.state("k_proj.weight_quantizer._amax")
        finalizer = Finalizer(specs_of(MODEL), find_scheme("nvfp4"), state, missing=MissingAmax.FROM_WEIGHTS)
        assert finalizer.filled == {"model.layers.0.k_proj.weight_quantizer._amax": "the weights"}
        written = dict(finalizer.finalize(Bundle.of(MODEL)))
        amax = max(MODEL[f"{module}.weight"].float().abs().max().item() for module in GOOD)
        for module in GOOD:
            assert written[f"{module}.weight_global_scale"].item() == pytest.approx(2688 / amax, rel=3e-7)

    def test_from_the_rest_of_the_group(self) -> None:
        state = self.state("k_proj.input_quantizer._amax")
        finalizer = Finalizer(specs_of(MODEL), find_scheme("nvfp4"), state, missing=MissingAmax.GROUP_MAX)
        assert finalizer.filled == {
            "model.layers.0.k_proj.input_quantizer._amax": "the largest of its fused group",
        }
        written = dict(finalizer.finalize(Bundle.of(MODEL)))
        assert written["model.layers.0.k_proj.input_global_scale"].item() == pytest.approx(2688 / 2.0, rel=3e-7)

    @pytest.mark.parametrize(("bad", "policy"), [("_proj.input_quantizer._amax", p) for p in MissingAmax])
    def test_what_no_policy_can_fill_is_refused(self, bad: str, policy: MissingAmax) -> None:
        with pytest.raises(AmaxError, match="2 amax are missing"):
            Finalizer(specs_of(MODEL), find_scheme("nvfp4"), self.state(bad), missing=policy)


def test_state_that_the_scheme_has_no_place_for_is_refused() -> None:
    """Output quantizers and input scales are never dropped in silence."""
    state = state_for(GOOD)
    for name, message in (
        ("q_proj.output_quantizer._amax", "no place for 1 quantizer values"),
        ("q_proj.input_quantizer._pre_quant_scale", "multiply inputs by a vector .*, which no engine does"),
    ):
        more = QuantState({**state.amax, f"model.layers.0.{name}": torch.tensor(1.0)}, state.formats)
        with pytest.raises(UsageError, match=rf"{message}:\n  model\.layers\.0\.{name}"):
            Finalizer(specs_of(MODEL), find_scheme("nvfp4"), more)


def test_quantizers_of_weights_that_stay_plain_are_refused() -> None:
    """An input quantizer alone, dynamic or not, and the quantizer of a weight that is no matrix."""
    state = replace(state_for(GOOD), inputs=None)
    inputs = dict.fromkeys(state.formats, "e2m1 in blocks of 16 with e4m3 scales")
    for name in ("lm_head", "norm"):
        specs = specs_of({**MODEL, "norm.weight": torch.ones(4)})
        with pytest.raises(UsageError, match=rf"1 quantizers round what scheme=nvfp4 writes .*\n  {name}: inputs int8"):
            Finalizer(specs, find_scheme("nvfp4"), replace(state, inputs={**inputs, name: "int8 per token"}))


def test_other_inputs_than_in_training_are_refused() -> None:
    state = state_for(GOOD)
    for inputs, message in (
        ({}, "not quantized"),
        (dict.fromkeys(state.formats, "e4m3 per tensor"), "e4m3 per tensor"),
    ):
        with pytest.raises(
            UsageError, match=rf"has other inputs than .* in training:\n  .*: {message}, nvfp4 has e2m1"
        ):
            Finalizer(specs_of(MODEL), find_scheme("nvfp4"), replace(state, inputs=inputs))


def test_an_input_scale_is_folded_into_a_plain_weight() -> None:
    scale = torch.arange(1.0, 33.0)
    mixed = {**MODEL, "model.layers.0.q_proj.input_quantizer._pre_quant_scale": scale}
    written = dict(Finalizer(specs_of(mixed), None, QuantState()).finalize(Bundle.of(mixed)))
    assert written.keys() == MODEL.keys()
    name = "model.layers.0.q_proj.weight"
    assert torch.equal(written[name], (MODEL[name].float() * scale).bfloat16())


def test_packed_experts_are_read_one_by_one(tmp_path: Path) -> None:
    gate_up, down = torch.randn(3, 8, 4), torch.randn(3, 4, 4)
    save_file({"mlp.experts.gate_up_proj": gate_up, "mlp.experts.down_proj": down}, tmp_path / "model.safetensors")
    split = split_fused_moe_experts({"mlp.experts.gate_up_proj": gate_up, "mlp.experts.down_proj": down, "n": down})
    assert len(split) == 10
    with SafetensorsCheckpoint(tmp_path) as checkpoint:
        for name, tensor in split.items():
            if name != "n":
                assert torch.equal(checkpoint.read(name), tensor), name
    assert torch.equal(split["mlp.experts.2.up_proj.weight"], gate_up[2, 4:])
    with pytest.raises(ValueError, match=r"gate_up_proj: \[3, 7, 4\] does not divide"):
        split_fused_moe_experts({"mlp.experts.gate_up_proj": gate_up[:, :7]})
