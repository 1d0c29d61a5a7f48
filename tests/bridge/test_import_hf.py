"""A served checkpoint goes back into Megatron, for any topology, and comes out again as it was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.export import model_free_ptq
from amaxbridge.export.amax.fused_group_amax import GroupAmax
from amaxbridge.export.output.config_and_index import quantization_config
from amaxbridge.export.schemes import SCHEMES, Groups, Scheme, named_scheme
from amaxbridge.export.schemes.scheme import arguments, quantize_tensors
from amaxbridge.mappings.fused_groups import groups_among
from amaxbridge.mappings.names import module_of
from tests.support import quantized_sources as held
from tests.support.checkpoints import tensors_in
from tests.support.comparing import same_files, same_tensors
from tests.support.launcher import Launcher, LiveRanks
from tests.support.paths import ROOT, WORKERS
from tests.support.tiny_models import config, randomize

IMPORT = ROOT / "scripts" / "import_hf.py"


def bring_in(launch: Launcher, source: Path, checkpoint: Path, **sizes: int) -> str:
    """Runs `amaxbridge import` at a topology, in as many processes as it needs."""
    processes = sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("ep", 1)
    words = [f"parallel.{axis}={size}" for axis, size in sizes.items()]
    return launch(IMPORT, f"hf={source}", f"output={checkpoint}", *words, processes=processes)


def assert_exports(
    checkpoint: Path, source: Path, out: Path, *, scheme: str = "nvfp4", shard_bytes: int = 30_000
) -> None:
    """Asserts that a checkpoint exports, byte for byte, the directory that was imported."""
    bridge = AutoBridge.from_hf_pretrained(source)
    bridge.convert_checkpoint(checkpoint, out, scheme=scheme, max_shard_bytes=shard_bytes)
    same_files(out, source)


def logits_at(launch: Launcher, source: Path, checkpoint: Path, *topologies: dict[str, int]) -> list[torch.Tensor]:
    """Loads the checkpoint at topologies of two processes in turn; exports where there are two pipeline stages."""
    out = checkpoint.parent
    steps = [
        {"hf": str(source), "sizes": sizes, "load": str(checkpoint), "out": str(out / str(number))}
        for number, sizes in enumerate(topologies)
    ]
    launch(WORKERS / "live_import.py", json.dumps(steps), processes=2)
    return [torch.load(out / f"{number}.pt") for number in range(len(steps)) if (out / f"{number}.pt").exists()]


def test_dense(launch: Launcher, live: LiveRanks, tmp_path: Path) -> None:
    """Imported at TP=2: it holds the source, computes the same at TP=1, and cuts into two pipeline stages."""
    source, checkpoint = live.at(tp=2) / "nvfp4", tmp_path / "checkpoint"
    assert "modules quantized as nvfp4" in bring_in(launch, source, checkpoint, tp=2)
    assert_exports(checkpoint, source, tmp_path / "exported")
    two, one = logits_at(launch, source, checkpoint, {"tp": 2}, {"tp": 1}, {"tp": 1, "pp": 2})
    assert (two - one).norm() < 1e-5 * one.norm()
    same_files(tmp_path / "2", source)


def test_experts(launch: Launcher, live_moe: LiveRanks, tmp_path: Path) -> None:
    """Imported at EP=2, loaded at EP=1."""
    source, checkpoint = live_moe.at(processes=2, tp=1, ep=2) / "nvfp4", tmp_path / "checkpoint"
    bring_in(launch, source, checkpoint, ep=2)
    assert_exports(checkpoint, source, tmp_path / "exported", shard_bytes=60_000)
    two, one = logits_at(launch, source, checkpoint, {"tp": 1, "ep": 2}, {"tp": 1})
    assert (two - one).norm() < 1e-5 * one.norm()


def quantized(source: Path, scheme: Scheme, directory: Path) -> Path:
    """The source in a scheme, as training with amax of its weights, and of 3.3 for inputs, would leave it."""
    directory.mkdir()
    tensors = tensors_in(source)
    linears = [module_of(name) for name in tensors if name.endswith("_proj.weight")]
    weights = {module: tensors.pop(f"{module}.weight") for module in linears}
    for group in groups_among(weights):
        members = {member: weights[member] for member in group.members}
        tensors |= dict(quantize_tensors(scheme, members, GroupAmax(None, torch.tensor(3.3))))
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_config(dict.fromkeys(weights, scheme), ["lm_head"])
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A tiny random Qwen3 whose rows, columns and heads are made of blocks of 128."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    import transformers

    made = config("Qwen3ForCausalLM", **sizes, head_dim=128, tie_word_embeddings=False)()
    model = transformers.AutoModelForCausalLM.from_config(made)
    randomize(model)
    model.bfloat16().save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def test_other_formats(launch: Launcher, qwen3: Path, wide: Path, tmp_path: Path) -> None:
    """Each format's quantizers have the settings that the export knows it by, and the amax that give its scales."""
    names = ("nvfp4a16", "fp8", "fp8_dynamic", "w8a8", "mxfp4", "mxfp8")
    sources = {name: quantized(qwen3, SCHEMES[name], tmp_path / name) for name in names}
    sources |= {name: quantized(wide, SCHEMES[name], tmp_path / name) for name in ("fp8_block", "w4a16")}
    for size in (32, 64):
        sources[f"w4a16_{size}"] = quantized(wide, named_scheme("w4a16", size), tmp_path / f"w4a16_{size}")
    steps = [
        {"sizes": {"tp": 1}, "hf": str(source), "import": str(tmp_path / f"{name}_checkpoint")}
        for name, source in sources.items()
    ]
    launch(WORKERS / "live_import.py", json.dumps(steps))
    for name, source in sources.items():
        bridge = AutoBridge.from_hf_pretrained(source)
        bridge.convert_checkpoint(tmp_path / f"{name}_checkpoint", tmp_path / f"{name}_out", scheme="auto")
        same_tensors(tmp_path / f"{name}_out", source)


def test_blocks_that_ranks_divide(launch: Launcher, wide: Path, tmp_path: Path) -> None:
    """Imported at TP=2, the checkpoint holds the amax of every rank's blocks."""
    schemes = {"fp8_block": SCHEMES["fp8_block"], "w4a16": named_scheme("w4a16", 64), "w8a8": SCHEMES["w8a8"]}
    sources = {name: quantized(wide, scheme, tmp_path / name) for name, scheme in schemes.items()}
    steps = [
        {"sizes": {"tp": 2}, "hf": str(source), "import": str(tmp_path / f"{name}_checkpoint")}
        for name, source in sources.items()
    ]
    launch(WORKERS / "live_import.py", json.dumps(steps), processes=2)
    for name, source in sources.items():
        bridge = AutoBridge.from_hf_pretrained(source)
        bridge.convert_checkpoint(tmp_path / f"{name}_checkpoint", tmp_path / f"{name}_out", scheme="auto")
        same_tensors(tmp_path / f"{name}_out", source)


def test_formats_of_other_programs(launch: Launcher, wide: Path, tmp_path: Path) -> None:
    """GPTQ's codes and FP8 blocks go through training's quantizers; AWQ with zero points, which it lacks, is plain."""
    kinds = {"gptq": held.gptq, "fp8": held.blocks_of_fp8, "awq": held.awq}
    declared = {
        "gptq": {"bits": 4, "group_size": 64, "checkpoint_format": "gptq"}, "fp8": {"weight_block_size": [128, 128]},
        "awq": {"bits": 4, "group_size": 64, "version": "gemm"},
    }  # fmt: skip
    plain, steps = tensors_in(wide), []
    for name, hold in kinds.items():
        (source := tmp_path / name).mkdir()
        stored = dict[str, torch.Tensor]()
        for key, tensor in plain.items():
            options = {"symmetric": True} if name == "gptq" else {}
            parts = dict(hold(tensor, **options).tensors) if key.endswith("_proj.weight") else {"weight": tensor}
            if name == "gptq" and "scales" in parts:
                parts["scales"] = parts["scales"].bfloat16().half()  # which training's arithmetic makes again
            stored |= {key.removesuffix("weight") + local: each.contiguous() for local, each in parts.items()}
        save_file(stored, source / "model.safetensors")
        said = json.loads((wide / "config.json").read_text())
        said["quantization_config"] = {"quant_method": name, **declared[name]}
        (source / "config.json").write_text(json.dumps(said))
        steps.append({"sizes": {"tp": 1}, "hf": str(source), "import": str(tmp_path / f"{name}_checkpoint")})
    launch(WORKERS / "live_import.py", json.dumps(steps[:2]))
    assert "14 quantized modules are now unquantized" in bring_in(launch, tmp_path / "awq", tmp_path / "awq_checkpoint")
    schemes = {"gptq": named_scheme("w4a16", 64), "fp8": SCHEMES["fp8_block"], "awq": None}
    for name, scheme in schemes.items():
        recipe = "none" if scheme is None else Groups.of(scheme)
        model_free_ptq(tmp_path / name, tmp_path / f"{name}_kept", recipe)
        bridge = AutoBridge.from_hf_pretrained(tmp_path / name)
        bridge.convert_checkpoint(tmp_path / f"{name}_checkpoint", tmp_path / f"{name}_out", scheme=recipe)
        kept, found = tensors_in(tmp_path / f"{name}_kept"), tensors_in(tmp_path / f"{name}_out")
        assert kept.keys() == found.keys()
        for key, tensor in kept.items():  # scales of GPTQ are fp16, and bf16 after training
            assert torch.equal(found[key], tensor.to(found[key].dtype)), key


def test_plain_weights_through_a_virtual_pipeline(launch: Launcher, qwen3_moe_mixed: Path, tmp_path: Path) -> None:
    bring_in(launch, qwen3_moe_mixed, tmp_path / "checkpoint", pp=2, vpp=2)
    bridge = AutoBridge.from_hf_pretrained(qwen3_moe_mixed)
    bridge.convert_checkpoint(tmp_path / "checkpoint", tmp_path / "out", scheme="none")
    same_tensors(tmp_path / "out", qwen3_moe_mixed)


def with_cache_scales(source: Path, directory: Path, scheme: dict[str, object]) -> Path:
    """The source with another scale for the keys and for the values of each layer."""
    shutil.copytree(source, directory)
    tensors = load_file(source / "model.safetensors")
    for layer in range(2):
        for number, letter in enumerate("kv"):
            tensors[f"model.layers.{layer}.self_attn.{letter}_scale"] = torch.tensor([0.0123 + layer + 0.1 * number])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((source / "config.json").read_text())
    quantization = {"quant_method": "compressed-tensors", **written.get("quantization_config", {})}
    written["quantization_config"] = quantization | {"kv_cache_scheme": scheme}
    (directory / "config.json").write_text(json.dumps(written))
    return directory


def test_a_key_value_cache(launch: Launcher, qwen3: Path, tmp_path: Path) -> None:
    """Cache scales become the amax of cache quantizers, change the forward pass, and are exported again."""
    nvfp4 = quantized(qwen3, SCHEMES["nvfp4"], tmp_path / "nvfp4")
    source = with_cache_scales(nvfp4, tmp_path / "in", arguments(8, "float", "tensor"))
    checkpoint, plain = tmp_path / "checkpoint", tmp_path / "plain"
    assert "stay behind" not in bring_in(launch, source, checkpoint, tp=2)
    bring_in(launch, nvfp4, plain)
    AutoBridge.from_hf_pretrained(source).convert_checkpoint(checkpoint, tmp_path / "out", scheme="auto")
    same_tensors(tmp_path / "out", source)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["kv_cache_scheme"] == arguments(8, "float", "tensor")
    two, one = logits_at(launch, source, checkpoint, {"tp": 2}, {"tp": 1}, {"tp": 1, "pp": 2})
    assert (two - one).norm() < 1e-5 * one.norm()
    same_tensors(tmp_path / "2", source)
    (without,) = logits_at(launch, nvfp4, plain, {"tp": 1})
    assert (without - one).norm() > 1e-3 * one.norm()


def test_cache_scales_that_stay_behind_are_said(launch: Launcher, qwen3: Path, tmp_path: Path) -> None:
    with_cache_scales(qwen3, tmp_path / "in", arguments(8, "int", "tensor"))
    printed = bring_in(launch, tmp_path / "in", tmp_path / "checkpoint")
    assert "4 scales of a key-value cache stay behind" in printed
    assert "model.layers.0.self_attn.k_scale" in printed
