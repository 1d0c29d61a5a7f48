"""Shared fixtures: a tiny Hugging Face model, and real Megatron processes exporting it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tiny_models import NEMOTRON_H, config, expert_biases, randomize

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).parent.parent
WORKERS = ROOT / "tests" / "workers"


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class Launcher:
    """Runs scripts on real ranks, in processes forked from one that has Megatron imported; see zygote.py."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._zygote = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "zygote.py"],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(logs / "zygote.txt").open("w"),
            text=True,
            cwd=ROOT,
        )

    def __call__(self, *command: object, processes: int = 1, cwd: Path = ROOT) -> str:
        """What the ranks printed, all of them, run in `cwd`.

        Raises:
            AssertionError: a rank failed; shows what they printed.
        """
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        argv = [str(word) for word in command]
        log = self._logs / f"{len(list(self._logs.iterdir()))}.txt"
        request = {"argv": argv, "processes": processes, "log": str(log), "cwd": str(cwd)}
        print(json.dumps(request), file=self._zygote.stdin, flush=True)
        status = self._zygote.stdout.readline().strip()
        assert status == "0", f"{' '.join(argv)} ended with {status or 'the zygote'}:\n{log.read_text()}"
        return log.read_text()

    def close(self) -> None:
        self._zygote.communicate()


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Runs scripts on real ranks: `launch(script, *arguments, processes=2)`."""
    launcher = Launcher(tmp_path_factory.mktemp("logs"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3 in Hugging Face's format: grouped-query attention, a vocabulary that TP=2 must pad."""
    import torch
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
def live(launch: Launcher, qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> "LiveRanks":
    """What real Megatron ranks exported, at TP=1, TP=2 and PP=2."""
    return LiveRanks(launch, "live_export.py", qwen3, tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="session")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3-MoE: two layers of eight experts, two for each token."""
    sizes = {"num_hidden_layers": 2, "num_experts": 8, "moe_intermediate_size": 64, "norm_topk_prob": True}
    return make_qwen3_moe(tmp_path_factory.mktemp("qwen3_moe"), sizes)


@pytest.fixture(scope="session")
def qwen3_moe_mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a dense layer among four, tied embeddings, and expert weights that do not add up to one."""
    sizes = {"num_hidden_layers": 4, "num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": False}
    directory = tmp_path_factory.mktemp("qwen3_moe_mixed")
    return make_qwen3_moe(directory, {**sizes, "mlp_only_layers": [2], "tie_word_embeddings": True})


def make_qwen3_moe(directory: Path, sizes: dict[str, Any]) -> Path:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(11)
    config = Qwen3MoeConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.08,
        **sizes,
    )
    model = Qwen3MoeForCausalLM(config)
    randomize(model)
    model.bfloat16().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def deepseek_v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random DeepSeek-V3: a dense layer, then two with experts in four groups; YaRN."""
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    sizes = {"num_hidden_layers": 3, "q_lora_rank": 32, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
    scales = {"mscale": 1.0, "mscale_all_dim": 0.5}
    return make_deepseek_v3(tmp_path_factory.mktemp("deepseek_v3"), 0, {**sizes, "rope_parameters": {**yarn, **scales}})


@pytest.fixture(scope="session")
def deepseek_v3_mtp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with two layers for multi-token prediction, queries that are projected at once, two shared experts."""
    sizes = {"num_hidden_layers": 2, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    return make_deepseek_v3(tmp_path_factory.mktemp("deepseek_v3_mtp"), 2, {**sizes, "n_shared_experts": 2})


def make_deepseek_v3(directory: Path, mtp_layers: int, sizes: dict[str, Any]) -> Path:
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(13)
    config = DeepseekV3Config(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=8,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=64,
        initializer_range=0.08,
        num_nextn_predict_layers=mtp_layers,
        **sizes,
    )
    model = DeepseekV3ForCausalLM(config)
    randomize(model)
    model.bfloat16()
    expert_biases(model)
    model.save_pretrained(directory)
    if mtp_layers:
        add_mtp_layers(directory, config.num_hidden_layers, mtp_layers)
    return directory


def add_mtp_layers(directory: Path, first: int, count: int) -> None:
    """Layers as DeepSeek stores them, which transformers neither loads nor saves: each like the last decoder layer."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    hidden = tensors["model.norm.weight"].numel()
    last = f"model.layers.{first - 1}."
    likes = {name.removeprefix(last): tensor for name, tensor in tensors.items() if name.startswith(last)}
    likes |= {f"{name}.weight": tensors["model.norm.weight"] for name in ("enorm", "hnorm", "shared_head.norm")}
    likes["eh_proj.weight"] = torch.empty(hidden, 2 * hidden, dtype=torch.bfloat16)
    for layer in range(first, first + count):
        for name, like in likes.items():
            tensors[f"model.layers.{layer}.{name}"] = (0.1 * torch.randn(like.shape)).to(like.dtype)
        tensors[f"model.layers.{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"model.layers.{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def nemotron_h(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Nemotron-H: two layers of Mamba, one each of MLP, attention and experts; two layers for MTP."""
    import torch
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
def live_mla(launch: Launcher, deepseek_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> "LiveRanks":
    """What real Megatron ranks exported of the model with latent attention."""
    return LiveRanks(launch, "live_mla.py", deepseek_v3, tmp_path_factory.mktemp("live_mla"))


@pytest.fixture(scope="session")
def live_mtp(launch: Launcher, deepseek_v3_mtp: Path, tmp_path_factory: pytest.TempPathFactory) -> "LiveRanks":
    """The same of the model with layers for multi-token prediction."""
    return LiveRanks(launch, "live_mla.py", deepseek_v3_mtp, tmp_path_factory.mktemp("live_mtp"))


@pytest.fixture(scope="session")
def live_moe(launch: Launcher, qwen3_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> "LiveRanks":
    """What real Megatron ranks exported of the MoE model."""
    return LiveRanks(launch, "live_moe.py", qwen3_moe, tmp_path_factory.mktemp("live_moe"))


@pytest.fixture(scope="session")
def live_moe_mixed(launch: Launcher, qwen3_moe_mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> "LiveRanks":
    """The same of the model with a dense layer."""
    return LiveRanks(launch, "live_moe.py", qwen3_moe_mixed, tmp_path_factory.mktemp("live_moe_mixed"))


class LiveRanks:
    """Runs a worker once per topology, when first asked for."""

    def __init__(self, launch: Launcher, worker: str, hf: Path, root: Path) -> None:
        self.hf = hf
        self._launch = launch
        self._worker = WORKERS / worker
        self._root = root
        self._done = set[Path]()

    def at(self, *, processes: int = 0, **sizes: int) -> Path:
        """The directory of everything that the ranks of a topology wrote.

        Args:
            processes: how many; without it, what TP and PP need.
            sizes: as `megatron.distributed` takes them.
        """
        sizes = {"tp": 1, **sizes}
        processes = processes or sizes["tp"] * sizes.get("pp", 1)
        directory = self._root / f"{processes}_{''.join(f'{axis}{size}' for axis, size in sizes.items())}"
        if directory not in self._done:
            self._launch(self._worker, self.hf, directory, json.dumps(sizes), processes=processes)
            self._done.add(directory)
        return directory

    def report(self, **sizes: int) -> dict[str, Any]:
        """What the worker noted down: messages of warnings and errors."""
        report: dict[str, Any] = json.loads((self.at(**sizes) / "report.json").read_text())
        return report


def tensors_in(directory: Path) -> dict[str, "Tensor"]:
    """All tensors of a directory of safetensors."""
    from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint

    with SafetensorsCheckpoint(directory) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.weight_map}
