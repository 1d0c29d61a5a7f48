"""DeepSeek-V3 on real Megatron ranks: latent attention, shared experts, router biases, multi-token prediction."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from amaxbridge.mappings.canonical import canonical
from amaxbridge.mappings.errors import MappingError, UsageError
from amaxbridge.mappings.families import family_of
from amaxbridge.mappings.fused_groups import groups_among
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.weights import LatentDownMapping
from tests.support.checkpoints import tensors_in
from tests.support.comparing import compare_logits, label, same_files, same_tensors
from tests.support.launcher import Launcher, LiveRanks
from tests.support.paths import ROOT

TOPOLOGIES: list[dict[str, int]] = [
    {"tp": 2},
    {"processes": 2, "tp": 1, "ep": 2},
    {"processes": 4, "tp": 2, "ep": 2},
]
MTP_TOPOLOGIES: list[dict[str, int]] = [{"processes": 2, "tp": 2, "ep": 2, "etp": 1}, {"processes": 2, "pp": 2}]
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
FAMILY = family_of(CONFIG)


@pytest.mark.parametrize("sizes", TOPOLOGIES, ids=label)
def test_every_topology_writes_the_same_bytes(live_mla: LiveRanks, sizes: dict[str, int]) -> None:
    """The down projections are Megatron's own layers, so Megatron decides how they are cut."""
    compare_exports(live_mla, sizes)


@pytest.mark.parametrize("sizes", MTP_TOPOLOGIES, ids=label)
def test_mtp_layers_travel_both_ways(live_mtp: LiveRanks, sizes: dict[str, int]) -> None:
    """Hugging Face's files hold a copy of the embedding and of the output layer for each MTP layer."""
    compare_exports(live_mtp, sizes)
    layers = {name.split(".")[2] for name in tensors_in(live_mtp.at() / "plain") if name.startswith("model.layers")}
    assert layers == {"0", "1", "2", "3"}


def compare_exports(live: LiveRanks, sizes: dict[str, int]) -> None:
    one, other = live.at(), live.at(**sizes)
    same_tensors(one / "plain", live.hf)
    same_files(one / "plain", other / "plain")
    same_files(one / "nvfp4", other / "nvfp4")
    same_files(one / "nvfp4_mtp", other / "nvfp4_mtp")
    same_files(other / "nvfp4_mtp", other / "mirrored")


def test_fused_groups_share_their_global_scales(live_mla: LiveRanks) -> None:
    tensors = tensors_in(live_mla.at(tp=2) / "nvfp4")
    for kind in ("weight_global_scale", "input_global_scale"):
        groups = groups_among([name.removesuffix(f".{kind}") for name in tensors if name.endswith(kind)])
        latent = [group for group in groups if group.primary.endswith("q_a_proj")]
        assert [len(group.members) for group in latent] == [2, 2, 2]
        shared = [group for group in groups if "shared_experts.gate_proj" in group.primary]
        assert [len(group.members) for group in shared] == [2, 2]
        for group in groups:
            assert len({tensors[f"{member}.{kind}"].item() for member in group.members}) == 1, group


def ignored_in(exported: Path) -> set[str]:
    return set(json.loads((exported / "config.json").read_text())["quantization_config"]["ignore"])


def test_router_biases_stay_fp32_and_what_is_not_quantized_is_ignored(live_mtp: LiveRanks) -> None:
    exported = live_mtp.at(processes=2, pp=2) / "nvfp4_mtp"
    biases = [tensor for name, tensor in tensors_in(exported).items() if name.endswith("e_score_correction_bias")]
    assert [tensor.dtype for tensor in biases] == [torch.float32] * 3
    heads = {f"model.layers.{layer}.shared_head.head" for layer in (2, 3)} | {"lm_head"}
    assert ignored_in(exported) == {f"model.layers.{layer}.mlp.gate" for layer in (1, 2, 3)} | heads


def test_mtp_layers_that_are_not_quantized_are_ignored_whole(live_mtp: LiveRanks) -> None:
    """ModelOpt's default configuration leaves them unquantized."""
    exported = live_mtp.at(processes=2, pp=2) / "nvfp4"
    mtp = ("model.layers.2.", "model.layers.3.")
    source = {name: tensor for name, tensor in tensors_in(live_mtp.hf).items() if name.startswith(mtp)}
    found = tensors_in(exported)
    assert {name for name in found if name.startswith(mtp)} == source.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in source.items())
    linears = {name.removesuffix(".weight") for name, tensor in source.items() if tensor.ndim == 2}
    fused = {f"{layer}mlp.shared_experts.gate_up_proj" for layer in mtp}  # as engines call the layer of gate and up
    assert {name for name in ignored_in(exported) if name.startswith(mtp)} == {
        name for name in linears if not name.endswith("embed_tokens")
    } | fused


def test_the_amax_of_an_mtp_layer_is_its_own(live_mtp: LiveRanks) -> None:
    """The oracle is the hash from which the worker made each amax."""
    tensors = tensors_in(live_mtp.at(processes=2, tp=2, ep=2, etp=1) / "nvfp4_mtp")
    for index, kind in itertools.product(range(2), ("weight", "input")):
        inner = f"mtp.layers.{index}.mtp_model_layer"
        for quantizer, module in (
            (f"mtp.layers.{index}.eh_proj.{kind}_quantizer", "eh_proj"),
            (f"{inner}.self_attention.linear_kv_up_proj.{kind}_quantizer", "self_attn.kv_b_proj"),
            (f"{inner}.mlp.experts.linear_fc2.{kind}_quantizer.5", "mlp.experts.5.down_proj"),
            (f"{inner}.mlp.shared_experts.linear_fc1.{kind}_quantizer", "mlp.shared_experts.up_proj"),
        ):
            digest = hashlib.sha256(quantizer.encode()).digest()
            amax = 0.25 + int.from_bytes(digest[:3], "little") / 2**24
            scale = tensors[f"model.layers.{2 + index}.{module}.{kind}_global_scale"]
            assert scale.item() == pytest.approx(2688 / amax, rel=1e-6), quantizer


def test_transformers_computes_what_megatron_computed(live_mla: LiveRanks) -> None:
    """YaRN, group-limited routing with biases, shared experts; fp32 on both sides."""
    compare_logits(live_mla.at())


def test_transformers_agrees_without_query_compression_and_yarn(live_mtp: LiveRanks, tmp_path: Path) -> None:
    """transformers has no MTP layers, so it gets a copy without them."""
    from safetensors.torch import save_file

    source = live_mtp.at()
    tensors = tensors_in(source / "plain")
    kept = {
        name: tensor for name, tensor in tensors.items() if not name.startswith(("model.layers.2", "model.layers.3"))
    }
    (tmp_path / "plain").mkdir()
    save_file(kept, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "plain" / "config.json").write_bytes((source / "plain" / "config.json").read_bytes())
    (tmp_path / "logits.pt").write_bytes((source / "logits.pt").read_bytes())
    compare_logits(tmp_path)


@pytest.mark.parametrize("model", ["live_mla", "live_mtp"])
def test_a_checkpoint_saved_at_tp_2_exports_the_same_bytes(
    model: str, launch: Launcher, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    live: LiveRanks = request.getfixturevalue(model)
    checkpoint = live.at(tp=2) / "checkpoint"
    words = [f"checkpoint={checkpoint}", f"hf={live.hf}", f"output={tmp_path / 'out'}", "io.max_shard_gb=6e-5"]
    launch(ROOT / "scripts" / "export.py", *words)
    same_files(tmp_path / "out", live.at() / "nvfp4")


class TestNames:
    def test_the_layer_after_the_last_is_the_first_mtp_layer(self) -> None:
        registry = FAMILY.registry_for(CONFIG)
        for layer, megatron in (("60", "decoder.layers.60"), ("61", "mtp.layers.0.mtp_model_layer")):
            for hf_name, name in (
                ("self_attn.q_a_proj.weight", "self_attention.linear_q_down_proj.weight"),
                ("mlp.experts.7.up_proj.weight", "mlp.experts.linear_fc1.weight7"),
                ("mlp.gate.e_score_correction_bias", "mlp.router.expert_bias"),
                ("self_attn.kv_b_proj.input_quantizer._amax", "self_attention.linear_kv_up_proj.input_quantizer._amax"),
            ):
                found = registry.hf_to_megatron_lookup(f"model.layers.{layer}.{hf_name}")
                assert found is not None
                assert found.megatron_param == f"{megatron}.{name}"
                assert registry.megatron_to_hf_lookup(found.megatron_param) == found
        found = registry.megatron_to_hf_lookup("mtp.layers.0.final_layernorm.weight")
        assert found is not None
        assert found.targets == ("model.layers.61.shared_head.norm.weight",)
        assert registry.megatron_to_hf_lookup("mtp.layers.1.enorm.weight") is None

    def test_without_mtp_layers_there_are_no_exceptions(self) -> None:
        registry = FAMILY.registry_for({**CONFIG, "num_nextn_predict_layers": 0})
        assert registry is FAMILY.registry
        assert registry.megatron_to_hf_lookup("mtp.layers.0.enorm.weight") is None

    @pytest.mark.parametrize(
        ("spelled", "name"),
        [
            ("decoder.layers.3.self_attention.linear_q_up_proj.layer_norm_weight", "q_layernorm.weight"),
            ("decoder.layers.3.self_attention.linear_kv_up_proj.layer_norm_weight", "kv_layernorm.weight"),
        ],
    )
    def test_fused_norms(self, spelled: str, name: str) -> None:
        assert canonical(spelled) == f"decoder.layers.3.self_attention.{name}"

    def test_the_inner_layer_of_older_releases(self) -> None:
        assert canonical("mtp.layers.0.transformer_layer.mlp.x") == "mtp.layers.0.mtp_model_layer.mlp.x"


class TestDownProjection:
    mapping = LatentDownMapping("m", "h", rows=("kv_lora_rank", "qk_pos_emb_head_dim"))
    weight = torch.arange(24.0).reshape(12, 2)

    @pytest.mark.parametrize("size", [1, 2, 4])
    @pytest.mark.parametrize(("implementation", "cut"), [("local", True), ("transformer_engine", False)])
    def test_round_trip_in_either_form(self, implementation: str, cut: bool, size: int) -> None:
        config = ModelConfig(kv_lora_rank=8, qk_pos_emb_head_dim=4, transformer_impl=implementation)
        shards = [self.mapping.split({"h": self.weight}, config, rank, size) for rank in range(size)]
        assert {len(shard) for shard in shards} == {12 // size if cut else 12}
        assert torch.equal(self.mapping.join(shards, config)["h"], self.weight)

    def test_other_rows_are_refused(self) -> None:
        config = ModelConfig(kv_lora_rank=8, qk_pos_emb_head_dim=4)
        with pytest.raises(MappingError, match="12 rows are neither 5 nor 2 times 5"):
            self.mapping.join([torch.zeros(5, 2)] * 2, config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_interleave", False),
        ("norm_topk_prob", False),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
    ],
)
def test_what_megatron_cannot_compute_is_refused(deepseek_v3: Path, field: str, value: object) -> None:
    config = json.loads((deepseek_v3 / "config.json").read_text())
    with pytest.raises(UsageError, match=r"no equal in Megatron's layers|latent attention has no|has weights that"):
        FAMILY.transformer_config({**config, field: value})
