"""Model-free PTQ: right whatever the files look like, with a quantizer state or without, taken up when interrupted."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from amaxbridge.export import (
    build_microscale_inverse_weight_maps,
    model_free_ptq,
    process_file,
    process_file_microscale_scheme,
    split_fused_moe_experts,
    validate_file,
)
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.nvfp4 import tensor_amax
from amaxbridge.export.schemes import SCHEMES, Groups, SchemeGroup
from amaxbridge.mappings.fused_groups import groups_among
from tests.support.checkpoints import (
    HIDDEN,
    MOE,
    cuts_inside_groups,
    dense_model,
    moe_model,
    state_of,
    tensors_of,
    write_checkpoint,
)
from tests.support.hard_weights import of_module
from tests.support.in_memory import expected, same

DATA_FREE = [name for name, scheme in SCHEMES.items() if not scheme.needs_input_amax]
CALIBRATED = ("nvfp4", "fp8")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = dense_model()
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "in", tensors, cuts=cuts_inside_groups(tensors))


@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize("cut", [False, True], ids=["one file", "groups cut"])
def test_every_scheme_without_data(name: str, cut: bool, tmp_path: Path) -> None:
    tensors = dense_model()
    source = write_checkpoint(tmp_path / "in", tensors, cuts=cuts_inside_groups(tensors) if cut else ())
    report = model_free_ptq(source, tmp_path / "out", name, max_workers=3)
    same(tensors_of(tmp_path / "out"), expected(tensors, name))
    assert len(report.quantized) == 14
    assert sorted(report.left) == ["lm_head", "model.embed_tokens"]
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_quantizer_state_gives_static_activations(name: str, dense: Path, tmp_path: Path) -> None:
    """Full W4A4 and static FP8 without a sample of data: what training calibrated is enough."""
    tensors = dense_model()
    model_free_ptq(dense, tmp_path / "out", name, quant_state=state_of(tensors, name), max_workers=2)
    found = tensors_of(tmp_path / "out")
    same(found, expected(tensors, name, state_of(tensors, name)))
    suffix = "input_global_scale" if name == "nvfp4" else "input_scale"
    for group in groups_among(module for module in state_of(tensors, name).formats):
        assert len({found[f"{member}.{suffix}"].item() for member in group.members}) == 1, group


def test_per_channel_amax_of_a_state(dense: Path, tmp_path: Path) -> None:
    tensors = dense_model()
    amax = {
        f"{name.removesuffix('.weight')}.weight_quantizer._amax": tensor.float().abs().amax(1, keepdim=True) * 0.8
        for name, tensor in tensors.items()
        if name.endswith("_proj.weight")
    }
    formats = {name.removesuffix(".weight_quantizer._amax"): "fp8_channel" for name in amax}
    model_free_ptq(dense, tmp_path / "out", "auto", quant_state=QuantState(amax, formats))
    scale = tensors_of(tmp_path / "out")["model.layers.1.mlp.up_proj.weight_scale"]
    assert torch.equal(scale, amax["model.layers.1.mlp.up_proj.weight_quantizer._amax"] / 448)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["nvfp4a16", "fp8_block"])
def test_experts_packed_or_not(name: str, packed: bool, tmp_path: Path) -> None:
    tensors = moe_model(packed=packed)
    source = write_checkpoint(tmp_path / "in", tensors, cuts=cuts_inside_groups(tensors), config=MOE)
    model_free_ptq(source, tmp_path / "out", name, max_workers=2)
    split = split_fused_moe_experts(tensors)
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in split
    recipe = Groups.of(SCHEMES[name], ["re:.*mlp\\.gate$", "lm_head"])
    same(tensors_of(tmp_path / "out"), expected(split, recipe))


def test_packed_experts_that_are_ignored_stay_packed(tmp_path: Path) -> None:
    tensors = moe_model(packed=True)
    source = write_checkpoint(tmp_path / "in", tensors, config=MOE)
    model_free_ptq(source, tmp_path / "out", "fp8_dynamic", ["re:.*experts.*"])
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found["model.layers.0.mlp.experts.down_proj"], tensors["model.layers.0.mlp.experts.down_proj"])


def test_several_schemes_the_first_that_targets_wins(dense: Path, tmp_path: Path) -> None:
    groups = (SchemeGroup(SCHEMES["fp8_dynamic"], ("re:.*self_attn.*",)), SchemeGroup(SCHEMES["nvfp4a16"]))
    model_free_ptq(dense, tmp_path / "out", Groups(groups))
    found = tensors_of(tmp_path / "out")
    assert found["model.layers.0.self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn
    assert found["model.layers.0.mlp.down_proj.weight_packed"].dtype == torch.uint8


def test_tensors_larger_than_what_is_in_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are read in many parts: the amax is measured over all parts first."""
    monkeypatch.setattr("amaxbridge.export.disk.safetensors_file.PART_BYTES", 5 * HIDDEN * 2)
    tensors = dense_model()
    source = write_checkpoint(tmp_path / "in", tensors, cuts=cuts_inside_groups(tensors))
    for name in ("nvfp4a16", "fp8_block", "w4a16_asym"):
        model_free_ptq(source, tmp_path / name, name, max_workers=2)
        same(tensors_of(tmp_path / name), expected(tensors, name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """Other dtypes, fp16 included, whose small amax overflow in llm-compressor."""
    tensors = dense_model(1, dtype)
    source = write_checkpoint(tmp_path / "in", tensors)
    model_free_ptq(source, tmp_path / "out", "nvfp4a16")
    found = tensors_of(tmp_path / "out")
    same(found, expected(tensors, "nvfp4a16"))
    scale = found["model.layers.0.mlp.down_proj.weight_global_scale"]
    amax = tensor_amax([tensors["model.layers.0.mlp.down_proj.weight"]], arithmetic=Arithmetic.MODELOPT)
    assert scale.item() == pytest.approx(2688 / amax.item(), rel=1e-3)


def test_zeros_and_subnormals(tmp_path: Path) -> None:
    tensors = dense_model(1)
    tensors["model.layers.0.mlp.gate_proj.weight"].zero_()
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()
    tensors["model.layers.0.self_attn.q_proj.weight"][:, :32] = 0
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(1e-40)
    source = write_checkpoint(tmp_path / "in", tensors)
    for name in DATA_FREE:
        model_free_ptq(source, tmp_path / name, name)
        found = tensors_of(tmp_path / name)
        same(found, expected(tensors, name))
        scales = [tensor.float() for key, tensor in found.items() if "scale" in key and "mx" not in name]
        assert all(scale.isfinite().all() and (scale > 0).all() for scale in scales)


def test_towers_routers_and_norms_are_left_alone(tmp_path: Path) -> None:
    """They stay unquantized by default and are listed; so do norms with two dims."""
    left = ["visual.blocks.0.attn.qkv", "model.layers.0.mlp.shared_expert_gate", "model.norm1", "mtp.layers.0.q_proj"]
    tensors = dense_model(1) | {f"{name}.weight": torch.ones(16, 16).bfloat16() for name in left}
    tensors |= {"conv1.weight": torch.ones(4, 1, 4).bfloat16(), "model.layers.0.scale": torch.ones(()).bfloat16()}
    source = write_checkpoint(tmp_path / "in", tensors)
    report = model_free_ptq(source, tmp_path / "out", "fp8_dynamic", architecture="guess")
    assert set(left) < set(report.left)
    found = tensors_of(tmp_path / "out")
    assert all(torch.equal(found[f"{name}.weight"], tensors[f"{name}.weight"]) for name in left)
    head = Groups((SchemeGroup(SCHEMES["fp8_dynamic"], ("lm_head",)),))
    named = model_free_ptq(source, tmp_path / "named", head, architecture="guess")
    assert named.quantized == {"lm_head": "fp8_dynamic"}


def test_a_tied_head_is_ignored_by_name(tmp_path: Path) -> None:
    tensors = dense_model(1)
    del tensors["lm_head.weight"]
    config = {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
    model_free_ptq(write_checkpoint(tmp_path / "in", tensors, config=config), tmp_path / "out", "fp8_dynamic")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"]["ignore"] == ["lm_head"]


class TestParts:
    """The founding functions, one by one."""

    def test_inverse_weight_maps(self, dense: Path) -> None:
        """Partners go to the file of q or gate; every tensor is read once; what is given stays as it is."""
        index = json.loads((dense / "model.safetensors.index.json").read_text())["weight_map"]
        files = {path.name: str(path) for path in dense.iterdir()}
        converters: list[Any] = []
        maps = build_microscale_inverse_weight_maps(index, files, converters)
        assert converters == []
        assert sorted(maps) == sorted(set(index.values()))
        read = [name for wanted in maps.values() for names in wanted.values() for name in names]
        assert sorted(read) == sorted(index)
        query = index["model.layers.0.self_attn.q_proj.weight"]
        key = index["model.layers.0.self_attn.k_proj.weight"]
        assert query != key
        assert "model.layers.0.self_attn.k_proj.weight" in maps[query][files[key]]

    def test_process_file(self, dense: Path, tmp_path: Path) -> None:
        index = json.loads((dense / "model.safetensors.index.json").read_text())["weight_map"]
        maps = build_microscale_inverse_weight_maps(index, {path.name: str(path) for path in dense.iterdir()}, ())
        found, total = {}, 0
        for name, wanted in maps.items():
            validate_file(wanted, tmp_path / name, "nvfp4a16", (), "cpu")
            size, weight_map = process_file_microscale_scheme(wanted, tmp_path / name, "nvfp4a16", (), "cpu")
            assert set(weight_map.values()) <= {name}
            found |= load_file(tmp_path / name) if wanted else {}
            total += size
        assert total == sum(tensor.nbytes for tensor in found.values())
        same(found, expected(dense_model(), "nvfp4a16"))

    def test_all_of_a_file(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "in", dense_model(1)) / "model.safetensors"
        process_file({str(source): None}, tmp_path / "out.safetensors", "w8a8", ["re:.*down_proj$"])
        assert load_file(tmp_path / "out.safetensors")["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.safetensors"]

    def test_an_incomplete_group_is_quantized(self, tmp_path: Path) -> None:
        """The group's first module lies in another file, or the architecture has none."""
        save_file({"m.up_proj.weight": torch.ones(16, 32).bfloat16()}, tmp_path / "in.safetensors")
        wanted = {str(tmp_path / "in.safetensors"): ["m.up_proj.weight"]}
        assert process_file(wanted, tmp_path / "out.safetensors", "nvfp4a16")[1].keys() == {
            f"m.up_proj.{name}" for name in ("weight_packed", "weight_scale", "weight_global_scale")
        }


def test_a_converter_comes_first(tmp_path: Path) -> None:
    """DeepSeek's FP8 blocks, dequantized by compressed-tensors' converter; weights and scales in different files."""
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

    tensors = dense_model(1)
    blocks = expected(tensors, "fp8_block")
    stored = {name.replace("weight_scale", "weight_scale_inv"): tensor for name, tensor in blocks.items()}
    cuts = [name for name in stored if name.endswith("weight_scale_inv")][::3]
    config = {"architectures": ["Qwen3ForCausalLM"], "quantization_config": {"quant_method": "fp8"}}
    source = write_checkpoint(tmp_path / "in", stored, cuts=cuts, config=config)
    model_free_ptq(source, tmp_path / "out", "nvfp4a16", converter=FP8BlockDequantizer(targets=["re:.*_proj$"]))
    plain = {
        name: SCHEMES["fp8_block"].dequantize(of_module(name.removesuffix(".weight"), blocks))
        if "_proj" in name
        else tensor
        for name, tensor in tensors.items()
    }
    same(tensors_of(tmp_path / "out"), expected(plain, "nvfp4a16"))


@pytest.mark.parametrize("served", CALIBRATED)
@pytest.mark.parametrize("model", [dense_model, moe_model])
def test_a_served_checkpoint_is_quantized_anew(model: Any, served: str, tmp_path: Path) -> None:
    """Its input scales are dropped."""
    tensors, scheme = model(1), SCHEMES[served]
    write_checkpoint(tmp_path / "in", tensors, cuts=cuts_inside_groups(tensors), config=MOE)
    model_free_ptq(tmp_path / "in", tmp_path / "served", served, quant_state=state_of(tensors, scheme.format))
    stored = tensors_of(tmp_path / "served")
    assert any(".input_" in name for name in stored)
    model_free_ptq(tmp_path / "served", tmp_path / "out", "mxfp8", converter="compressed_tensors")
    plain = {
        name: scheme.dequantize(of_module(name.removesuffix(".weight"), stored)) if "_proj" in name else tensor
        for name, tensor in tensors.items()
    }
    same(tensors_of(tmp_path / "out"), expected(plain, "mxfp8"))


class TestResume:
    """An interrupted run leaves what it wrote, and the next one makes only the rest."""

    @pytest.fixture
    def interrupted(self, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A run that ended before its eighth bundle; what it has written is synced."""
        from amaxbridge.export.disk.shard_writer import ShardWriter

        note, calls = ShardWriter.done, 0

        def done(writer: ShardWriter, bundle: str) -> None:
            nonlocal calls
            calls += 1
            if calls == 8:
                raise KeyboardInterrupt
            note(writer, bundle)

        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "done", done)
            with pytest.raises(KeyboardInterrupt):
                model_free_ptq(dense, tmp_path / "out", "nvfp4a16")
        assert not (tmp_path / "out").exists()
        assert (tmp_path / "out.partial").is_dir()
        return tmp_path / "out"

    def test_goes_on(self, interrupted: Path, dense: Path) -> None:
        assert model_free_ptq(dense, interrupted, "nvfp4a16").resumed == 7
        same(tensors_of(interrupted), expected(dense_model(), "nvfp4a16"))
        assert sorted(path.name for path in interrupted.parent.iterdir()) == ["out"]
        assert not list(interrupted.glob(".*"))

    def test_another_scheme_begins_anew(self, interrupted: Path, dense: Path) -> None:
        assert model_free_ptq(dense, interrupted, "fp8_dynamic").resumed == 0
        same(tensors_of(interrupted), expected(dense_model(), "fp8_dynamic"))

    def test_another_amax_begins_anew(self, interrupted: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        state = state_of(dense_model(), "nvfp4")
        amax = {**state.amax, "model.layers.0.mlp.down_proj.input_quantizer._amax": torch.tensor(99.0)}
        more = QuantState(amax, state.formats)
        for calibrated in (state, more):
            monkeypatch.setattr("amaxbridge.export.disk.staging.StagedDirectory.commit", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                model_free_ptq(dense, interrupted, "nvfp4", quant_state=calibrated)
            monkeypatch.undo()
        assert model_free_ptq(dense, interrupted, "nvfp4", quant_state=state).resumed == 0
        same(tensors_of(interrupted), expected(dense_model(), "nvfp4", state))

    def test_a_source_that_was_written_anew_begins_anew(self, interrupted: Path, dense: Path, tmp_path: Path) -> None:
        shutil.copytree(dense, tmp_path / "in")
        os.utime(tmp_path / "in" / "model-00001-of-00005.safetensors")
        assert model_free_ptq(tmp_path / "in", interrupted, "nvfp4a16").resumed == 0

    def test_a_torn_line_of_the_journal_does_not_count(self, interrupted: Path, dense: Path) -> None:
        journal = interrupted.with_name("out.partial") / ".done-0-of-1"
        journal.write_text(journal.read_text()[:-4])
        assert model_free_ptq(dense, interrupted, "nvfp4a16").resumed == 6
        same(tensors_of(interrupted), expected(dense_model(), "nvfp4a16"))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
