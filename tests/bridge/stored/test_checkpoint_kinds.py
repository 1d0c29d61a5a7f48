"""A checkpoint that cannot be exported: names of tensors or files tell what it is, and the message what to do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, save

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import HFModel, read_hf_model
from amaxbridge.bridge.stored.checkpoint_kinds import kind_of_tensors
from amaxbridge.bridge.stored.identification import identify
from amaxbridge.mappings.errors import CheckpointError, UsageError
from amaxbridge.mappings.families import family_of
from amaxbridge.mappings.tensors import TensorSpec
from tests.support.checkpoints import tensors_in
from tests.support.stored_checkpoints import megatron_state, write_state
from tests.support.tiny_models import TINY_MODELS

type State = dict[str, Tensor]

QKV = "decoder.layers.0.self_attention.linear_qkv"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kinds") / "hf"
    TINY_MODELS["Qwen3"].make().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def state(hf: Path) -> State:
    return megatron_state(read_hf_model(hf))


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def adapted(state: State) -> State:
    """The names of a linear that Megatron-Bridge has wrapped in an adapter."""
    made = {name.replace("linear_qkv.", "linear_qkv.to_wrap."): tensor for name, tensor in state.items()}
    return made | {
        f"{QKV}.adapter.linear_in.weight": torch.ones(4, 64),
        f"{QKV}.adapter.linear_out.weight": torch.ones(9),
    }


def with_head(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: {**without(state, "output_layer"), name: torch.ones(shape)}


def without(state: State, part: str) -> State:
    return {name: tensor for name, tensor in state.items() if part not in name}


def renamed(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {name.replace(old, new): tensor for name, tensor in state.items()}


TENSORS: dict[str, tuple[Callable[[State], State], str]] = {
    "fsdp, two chunks": (prefixed("model0.module."), "is a checkpoint of Megatron-FSDP"),
    "module": (prefixed("module."), "a Megatron model inside another module"),
    "model": (prefixed("model."), "a Megatron model inside another module"),
    "state_dict": (prefixed("state_dict."), "a Megatron model inside another module"),
    "lightning": (prefixed("state_dict.module.module."), "a Megatron model inside another module"),
    "policy": (prefixed("actor.model."), "a Megatron model inside another module"),
    "lora": (adapted, "a model with adapters"),
    "lora of modelopt": (
        lambda state: state | {f"{QKV}.lora_a.default.weight": torch.ones(2)},
        "a model with adapters",
    ),
    "canonical lora": (lambda state: state | {f"{QKV}.adapter_q.linear_in.weight": torch.ones(2)}, "with adapters"),
    "lora alone": (
        lambda state: {name: each for name, each in adapted(state).items() if "adapter" in name},
        "adapters (LoRA) without the model",
    ),
    "peft": (lambda state: {"base_model.model.q_proj.lora_A.weight": torch.ones(2)}, "adapters (LoRA) without"),
    "pooler": (
        with_head("pooler_head.weight", 1, 64),
        "beside Megatron's own modules (a reward model, a critic or a classifier): pooler_head.weight [1, 64]",
    ),
    "reward": (with_head("reward_model_head.weight", 5, 64), "with a head beside Megatron's own modules"),
    "value": (with_head("v_head.summary.weight", 1, 64), "with a head beside Megatron's own modules"),
    "classifier": (with_head("classifier.weight", 3, 64), "with a head beside Megatron's own modules"),
    "optimizer": (lambda state: {"optimizer.state.exp_avg": torch.ones(2)}, "the state of an optimizer without"),
    "optimizers": (lambda state: {"chained_1.optimizer.param": torch.ones(2)}, "the state of an optimizer without"),
    "teacher": (lambda state: state | {f"_teacher_model.{QKV}.weight": torch.ones(2)}, "under distillation"),
    "eagle": (lambda state: state | {"eagle_module.fc.weight": torch.ones(2)}, "a draft model"),
    "before mcore": (renamed("decoder.", "language_model.encoder."), "before Megatron-Core"),
    "images": (
        lambda state: prefixed("language_model.")(without(state, "embedding")) | {"vision_model.a": torch.ones(2)},
        "several parts (images and language)",
    ),
    "bert": (renamed("decoder.", "encoder."), "an encoder"),
    "hugging face": (
        lambda state: {
            "model.embed_tokens.weight": torch.ones(2),
            "model.layers.0.self_attn.q_proj.weight": torch.ones(2),
        },
        "names of Hugging Face or torchtitan",
    ),
    "torchtitan": (
        lambda state: {"tok_embeddings.weight": torch.ones(2), "layers.0.attention.wq.weight": torch.ones(2)},
        "names of Hugging Face or torchtitan",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_say_what_they_are(name: str, hf: Path, state: State, tmp_path: Path) -> None:
    make, message = TENSORS[name]
    checkpoint = write_state(tmp_path / "checkpoint", make(state))
    for attempt in (
        lambda: AutoBridge.from_hf_pretrained(hf).convert_checkpoint(checkpoint, tmp_path / "out", scheme="none"),
        lambda: AutoBridge.from_megatron_checkpoint(checkpoint),
    ):
        with pytest.raises((CheckpointError, UsageError)) as error:  # arguments could describe a model with adapters
            attempt()
        assert message in str(error.value)
        assert "embedding.word_embeddings.weight: missing" not in str(error.value)
    assert message in identify(checkpoint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_no_model_that_is_exported_is_taken_for_another_kind(name: str) -> None:
    fields = TINY_MODELS[name].make().to_dict()
    hf = HFModel(Path(), fields, fields, family_of(fields))
    state = {key: TensorSpec.of(tensor) for key, tensor in megatron_state(hf).items()}
    assert kind_of_tensors(state, any_others=True) is None


def test_states_of_chained_optimizers_are_left_out(hf: Path, state: State, tmp_path: Path) -> None:
    """A mixture of experts has two optimizers: one for the experts, one for the rest."""
    others = {f"chained_{each}.optimizer.state.exp_avg.{QKV}.weight": torch.ones(3) for each in range(2)}
    checkpoint = write_state(tmp_path / "checkpoint", state | others)
    AutoBridge.from_hf_pretrained(hf).convert_checkpoint(checkpoint, tmp_path / "out", scheme="none")
    assert len(tensors_in(tmp_path / "out")) == 25


def test_other_sizes_are_said_first(hf: Path, state: State, tmp_path: Path) -> None:
    cut = {name: tensor[..., :32] if tensor.shape[-1] == 64 else tensor for name, tensor in state.items()}
    fewer = {name: tensor[:100] if "embedding" in name else tensor for name, tensor in without(cut, ".1.").items()}
    checkpoint = write_state(tmp_path / "checkpoint", without(fewer, "output_layer"))
    with pytest.raises(CheckpointError) as error:
        AutoBridge.from_hf_pretrained(hf).convert_checkpoint(checkpoint, tmp_path / "out")
    lines = str(error.value).splitlines()[1:]
    assert lines[0].strip() == "the checkpoint has 1 layers, but config.json says 2"
    assert lines[1].strip() == "the checkpoint has 32 columns of hidden size, but config.json says 64"
    assert lines[2].strip() == "the checkpoint has 100 rows of vocabulary, but config.json says 131"
    assert "has no output layer: it is of a model with tied embeddings" in lines[3]


FILES: dict[str, tuple[list[str], str]] = {
    "legacy": (["mp_rank_00/model_rng.pt"], "a legacy checkpoint (--ckpt-format torch) without model_optim_rng.pt"),
    "legacy, pipeline": (["mp_rank_00_000/optim.pt", "mp_rank_00_001/a.pt"], "a legacy checkpoint"),
    "zarr": (["decoder.layers.mlp.linear_fc1.weight/.zarray", "common.pt"], "in the zarr format"),
    "hugging face": (["config.json", "model.safetensors"], "a Hugging Face directory"),
    "weights alone": (["model-00001-of-00002.safetensors"], "a Hugging Face directory"),
    "peft": (["adapter_config.json", "adapter_model.safetensors"], "an adapter of PEFT"),
    "deepspeed": (["global_step10/zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest"], "a DeepSpeed checkpoint"),
    "deepspeed, inside": (["mp_rank_00_model_states.pt"], "a DeepSpeed checkpoint"),
    "nemo 2": (["context/model.yaml", "weights/.metadata", "weights/__0_0.distcp"], "a NeMo 2 checkpoint"),
    "nemo 1": (["model_config.yaml", "model_weights.ckpt"], "a NeMo 1 checkpoint"),
    "half-written": (["__0_0.distcp", "__1_0.distcp", "common.pt"], "without .metadata, which is written last"),
    "being written": (["__0_0.distcp", ".metadata.tmp"], "without .metadata, which is written last"),
    "local": (["iter_0000010_0_local.pt"], "a local checkpoint"),
    "lightning": (["last.ckpt"], "a checkpoint of PyTorch pickles"),
    "gguf": (["model-q4.gguf"], "a GGUF file"),
    "trainings": (["run1/latest_checkpointed_iteration.txt", "run2/iter_0000001/.metadata"], "give one of run1, run2"),
    "no latest": (["iter_0000100/.metadata", "iter_0000200/.metadata"], "give one of iter_0000100, iter_0000200"),
    "empty": ([], "it is empty"),
    "something": (["notes.txt"], "no .metadata there, and nothing else that is known"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_say_what_they_are(name: str, hf: Path, tmp_path: Path) -> None:
    files, message = FILES[name]
    place = tmp_path / "place"
    place.mkdir()
    for file in files:
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_bytes(b"")
    for attempt in (
        lambda: AutoBridge.from_hf_pretrained(hf).convert_checkpoint(place, tmp_path / "out"),
        lambda: AutoBridge.from_megatron_checkpoint(place),
    ):
        with pytest.raises(CheckpointError, match="is not a checkpoint of Megatron's training") as error:
            attempt()
        assert message in str(error.value)


@pytest.mark.parametrize("text", ["", "7", "garbage", "release", "²"])
def test_an_iteration_that_is_not_there(text: str, hf: Path, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    (tmp_path / "iter_0000005").mkdir()
    with pytest.raises(
        CheckpointError, match="whose checkpoint is not there; there are iter_0000005: give one of them"
    ):
        AutoBridge.from_hf_pretrained(hf).convert_checkpoint(tmp_path, tmp_path / "out")


def test_a_path_that_is_not_there_and_a_file(hf: Path, tmp_path: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    with pytest.raises(CheckpointError, match="there is nothing at this path"):
        bridge.convert_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(CheckpointError, match="it is a file; give the directory"):
        bridge.convert_checkpoint(hf / "config.json", tmp_path / "out")


def test_a_megatron_checkpoint_as_hf(state: State, tmp_path: Path) -> None:
    checkpoint = write_state(tmp_path / "checkpoint", state)
    (tmp_path / "legacy" / "mp_rank_00").mkdir(parents=True)
    for place in (checkpoint, checkpoint / "iter_0000005", tmp_path / "legacy"):
        with pytest.raises(UsageError, match=r"no config.json there; it is what Megatron's training saved: give it as"):
            read_hf_model(place)
    save({"a": torch.ones(2)}, storage_writer=FileSystemWriter(tmp_path / "alone"), no_dist=True)
    with pytest.raises(UsageError, match="give it as checkpoint="):
        read_hf_model(tmp_path / "alone")
