"""Shared fixtures: a tiny Hugging Face model, and real Megatron processes exporting it."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.support.hf_models import make_deepseek_v3, make_qwen3_moe
from tests.support.launcher import Launcher, LiveRanks
from tests.support.tiny_models import NEMOTRON_H, config, expert_biases, randomize


class _TorchRandom:
    """PyTorch's global generator in the form that Hypothesis seeds before each example, and resets after it."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_TORCH_RANDOM = _TorchRandom()
with contextlib.suppress(ImportError):  # tests/gpu runs where Hypothesis is not installed
    hypothesis = importlib.import_module("hypothesis")
    hypothesis.register_random(_TORCH_RANDOM)
    hypothesis.settings.register_profile("tests", deadline=None)  # a busy machine is no failure
    hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random tensors, whichever tests run before it."""
    torch.manual_seed(20)


SLOW = frozenset({"launch", "transformers"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what starts Megatron ranks or loads transformers; `make test-fast` leaves these tests out.

    Other slow tests carry the marker themselves.
    """
    for item in items:
        if isinstance(item, pytest.Function) and SLOW & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    """The library, whose import takes seconds."""
    return importlib.import_module("transformers")


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Runs scripts on real ranks: `launch(script, *arguments, processes=2)`."""
    launcher = Launcher(tmp_path_factory.mktemp("logs"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def qwen3(transformers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3 in Hugging Face's format: grouped-query attention, a vocabulary that TP=2 must pad."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    directory = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.08,
    )
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif "proj" in name:  # a largest element whose scale has an exact reciprocal, so that forwards can be compared
            parameter.data[0, 0] = 0.5
    model.bfloat16().save_pretrained(directory)
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return directory


@pytest.fixture(scope="session")
def live(launch: Launcher, qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    """What real Megatron ranks exported, at TP=1, TP=2 and PP=2."""
    return LiveRanks(launch, "live_export.py", qwen3, tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="session")
def qwen3_moe(transformers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3-MoE: two layers of eight experts, two for each token."""
    sizes = {"num_hidden_layers": 2, "num_experts": 8, "moe_intermediate_size": 64, "norm_topk_prob": True}
    return make_qwen3_moe(tmp_path_factory.mktemp("qwen3_moe"), sizes)


@pytest.fixture(scope="session")
def qwen3_moe_mixed(transformers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a dense layer among four, tied embeddings, and expert weights that do not add up to one."""
    sizes = {"num_hidden_layers": 4, "num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": False}
    directory = tmp_path_factory.mktemp("qwen3_moe_mixed")
    return make_qwen3_moe(directory, {**sizes, "mlp_only_layers": [2], "tie_word_embeddings": True})


@pytest.fixture(scope="session")
def deepseek_v3(transformers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random DeepSeek-V3: a dense layer, then two with experts in four groups; YaRN."""
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    sizes = {"num_hidden_layers": 3, "q_lora_rank": 32, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
    scales = {"mscale": 1.0, "mscale_all_dim": 0.5}
    return make_deepseek_v3(tmp_path_factory.mktemp("deepseek_v3"), 0, {**sizes, "rope_parameters": {**yarn, **scales}})


@pytest.fixture(scope="session")
def deepseek_v3_mtp(transformers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with two layers for multi-token prediction, queries that are projected at once, two shared experts."""
    sizes = {"num_hidden_layers": 2, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    return make_deepseek_v3(tmp_path_factory.mktemp("deepseek_v3_mtp"), 2, {**sizes, "n_shared_experts": 2})


@pytest.fixture(scope="session")
def nemotron_h(transformers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Nemotron-H: two layers of Mamba, one each of MLP, attention and experts; two layers for MTP."""
    from safetensors.torch import load_file, save_file
    from transformers import NemotronHForCausalLM

    directory = tmp_path_factory.mktemp("nemotron_h")
    torch.manual_seed(19)
    mtp = {"num_nextn_predict_layers": 2, "mtp_layers_block_type": ["full_attention", "moe"]}
    model = NemotronHForCausalLM(config("NemotronHForCausalLM", **NEMOTRON_H, **mtp)())
    randomize(model)
    model.bfloat16()
    expert_biases(model)
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for layer, like in enumerate(("backbone.layers.2", "backbone.layers.3") * 2):  # transformers does not build them
        likes = {name.removeprefix(like): tensor for name, tensor in tensors.items() if name.startswith(f"{like}.")}
        if layer % 2 == 0:
            norm, projection = tensors["backbone.norm_f.weight"], torch.empty(64, 128, dtype=torch.bfloat16)
            likes |= {".enorm.weight": norm, ".hnorm.weight": norm, ".eh_proj.weight": projection}
        else:
            likes[".final_layernorm.weight"] = norm
        for name, tensor in likes.items():
            tensors[f"mtp.layers.{layer}{name}"] = (0.1 * torch.randn(tensor.shape)).to(tensor.dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def live_mla(launch: Launcher, deepseek_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    """What real Megatron ranks exported of the model with latent attention."""
    return LiveRanks(launch, "live_mla.py", deepseek_v3, tmp_path_factory.mktemp("live_mla"))


@pytest.fixture(scope="session")
def live_mtp(launch: Launcher, deepseek_v3_mtp: Path, tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    """The same of the model with layers for multi-token prediction."""
    return LiveRanks(launch, "live_mla.py", deepseek_v3_mtp, tmp_path_factory.mktemp("live_mtp"))


@pytest.fixture(scope="session")
def live_moe(launch: Launcher, qwen3_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    """What real Megatron ranks exported of the MoE model."""
    return LiveRanks(launch, "live_moe.py", qwen3_moe, tmp_path_factory.mktemp("live_moe"))


@pytest.fixture(scope="session")
def live_moe_mixed(launch: Launcher, qwen3_moe_mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    """The same of the model with a dense layer."""
    return LiveRanks(launch, "live_moe.py", qwen3_moe_mixed, tmp_path_factory.mktemp("live_moe_mixed"))
