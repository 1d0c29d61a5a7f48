"""Shared fixtures: tiny Hugging Face models, and what real Megatron processes export of them."""

import contextlib
import gc
import importlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support.hf_models import make_deepseek_v3, make_nemotron_h, make_qwen3, make_qwen3_moe
from tests.support.launcher import Launcher, LiveRanks
from tests.support.lowest_versions import Lowest, without_a_driver
from tests.support.made_once import made_once, shared_root
from tests.support.one_family import OneFamily
from tests.support.slow_tests import Measuring, mark_and_order


class _TorchRandom:
    """PyTorch's global generator in the form that Hypothesis seeds before each example, and resets after it."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_TORCH_RANDOM = _TorchRandom()
with contextlib.suppress(ImportError):  # tests/gpu runs where Hypothesis is not installed
    hypothesis = importlib.import_module("hypothesis")
    hypothesis.register_random(_TORCH_RANDOM)
    hypothesis.settings.register_profile(
        "tests",
        derandomize=True,  # the same examples in every run
        database=None,
        deadline=None,  # a busy machine is no failure
        suppress_health_check=[hypothesis.HealthCheck.too_slow],  # nor here
    )
    hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random tensors, whichever tests run before it."""
    torch.manual_seed(20)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--measure", action="store_true", help="measure all tests, and write tests/slow_tests.txt")
    parser.addoption("--lowest", action="store_true", help="leave out what tests/lowest_versions.txt has")
    parser.addoption("--family", metavar="ARCHITECTURE", help="only the tests of one model family")


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `make test &` has it ignored, tests too then
    if config.getoption("measure"):
        config.pluginmanager.register(Measuring())
    if config.getoption("lowest"):
        config.pluginmanager.register(Lowest())
        without_a_driver()
    if architecture := config.getoption("family"):
        config.pluginmanager.register(OneFamily(architecture))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_and_order(items)


def pytest_collection_finish() -> None:
    """Spares the garbage collector everything that is imported by now, which stays anyway."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    """The library, whose import takes seconds."""
    return importlib.import_module("transformers")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for the whole run, the same in every worker process of pytest-xdist."""
    return shared_root(tmp_path_factory)


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Runs scripts on real ranks: `launch(script, *arguments, processes=2)`."""
    launcher = Launcher(tmp_path_factory.mktemp("logs"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def qwen3(transformers: ModuleType, shared: Path) -> Path:
    """A tiny random Qwen3 in Hugging Face's format: grouped-query attention, a vocabulary that TP=2 must pad."""
    return made_once(shared / "qwen3", make_qwen3)


@pytest.fixture(scope="session")
def live(launch: Launcher, qwen3: Path, shared: Path) -> LiveRanks:
    """The exports of the Qwen3 by real Megatron ranks."""
    return LiveRanks(launch, "live_export.py", qwen3, shared / "live")


@pytest.fixture(scope="session")
def qwen3_moe(transformers: ModuleType, shared: Path) -> Path:
    """A tiny random Qwen3-MoE: two layers of eight experts, two for each token."""
    sizes = {"num_hidden_layers": 2, "num_experts": 8, "moe_intermediate_size": 64, "norm_topk_prob": True}
    return made_once(shared / "qwen3_moe", lambda directory: make_qwen3_moe(directory, sizes))


@pytest.fixture(scope="session")
def qwen3_moe_mixed(transformers: ModuleType, shared: Path) -> Path:
    """A tiny random Qwen3-MoE: one dense layer among four, tied embeddings, router weights that do not add up to 1."""
    sizes: dict[str, Any] = {"num_hidden_layers": 4, "num_experts": 4, "moe_intermediate_size": 32}
    sizes |= {"norm_topk_prob": False, "mlp_only_layers": [2], "tie_word_embeddings": True}
    return made_once(shared / "qwen3_moe_mixed", lambda directory: make_qwen3_moe(directory, sizes))


@pytest.fixture(scope="session")
def deepseek_v3(transformers: ModuleType, shared: Path) -> Path:
    """A tiny random DeepSeek-V3: a dense layer, then two with experts in four groups; YaRN."""
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    sizes: dict[str, Any] = {
        "num_hidden_layers": 3,
        "q_lora_rank": 32,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
    }
    scales = {"mscale": 1.0, "mscale_all_dim": 0.5}
    sizes["rope_parameters"] = {**yarn, **scales}
    return made_once(shared / "deepseek_v3", lambda directory: make_deepseek_v3(directory, 0, sizes))


@pytest.fixture(scope="session")
def deepseek_v3_mtp(transformers: ModuleType, shared: Path) -> Path:
    """A tiny random DeepSeek-V3: two multi-token prediction layers, one query projection, two shared experts."""
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "q_lora_rank": None, "n_group": 1, "topk_group": 1}
    sizes |= {"num_experts_per_tok": 2, "n_shared_experts": 2}
    return made_once(shared / "deepseek_v3_mtp", lambda directory: make_deepseek_v3(directory, 2, sizes))


@pytest.fixture(scope="session")
def nemotron_h(transformers: ModuleType, shared: Path) -> Path:
    """A tiny random Nemotron-H: two layers of Mamba, one each of MLP, attention and experts; two layers for MTP."""
    return made_once(shared / "nemotron_h", make_nemotron_h)


@pytest.fixture(scope="session")
def live_mla(launch: Launcher, deepseek_v3: Path, shared: Path) -> LiveRanks:
    """The exports of the DeepSeek-V3 by real Megatron ranks."""
    return LiveRanks(launch, "live_mla.py", deepseek_v3, shared / "live_mla")


@pytest.fixture(scope="session")
def live_mtp(launch: Launcher, deepseek_v3_mtp: Path, shared: Path) -> LiveRanks:
    """The exports of the DeepSeek-V3 with multi-token prediction layers."""
    return LiveRanks(launch, "live_mla.py", deepseek_v3_mtp, shared / "live_mtp")


@pytest.fixture(scope="session")
def live_moe(launch: Launcher, qwen3_moe: Path, shared: Path) -> LiveRanks:
    """The exports of the Qwen3-MoE by real Megatron ranks."""
    return LiveRanks(launch, "live_moe.py", qwen3_moe, shared / "live_moe")


@pytest.fixture(scope="session")
def live_moe_mixed(launch: Launcher, qwen3_moe_mixed: Path, shared: Path) -> LiveRanks:
    """The exports of the Qwen3-MoE with a dense layer."""
    return LiveRanks(launch, "live_moe.py", qwen3_moe_mixed, shared / "live_moe_mixed")
