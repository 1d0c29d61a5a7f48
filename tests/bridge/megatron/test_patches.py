"""What is replaced in Megatron, ModelOpt and torch is the original again when the context has ended."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.ssm import mamba_mixer
from megatron.core.transformer.dot_product_attention import DotProductAttention
from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry

from amaxbridge.bridge.megatron import cache_quantizers, patches
from amaxbridge.bridge.megatron.mamba_in_torch import TorchMambaMixer, mixer_class
from amaxbridge.bridge.megatron.patches import Patch, patched
from amaxbridge.bridge.megatron.without_cuda import without_cuda
from tests.support.cpu_patches import ON_A_CPU
from tests.support.launcher import Launcher
from tests.support.paths import WORKERS


class Parent:
    attribute = "the parent's"


class Child(Parent):
    own = "the child's"


@pytest.fixture(autouse=True)
def nothing_announced() -> None:
    patches.announce.cache_clear()


def values() -> list[Any]:
    return [getattr(owner, name) for owner, name in ON_A_CPU]


def test_attributes_come_back_inherited_ones_too() -> None:
    with patched(Patch(Child, "attribute", 1), Patch(Child, "own", 2)):
        assert (Child.attribute, Child.own, Parent.attribute) == (1, 2, "the parent's")
        with patched(Patch(Child, "attribute", 3), Patch(Parent, "attribute", 4)):
            assert (Child.attribute, Parent.attribute) == (3, 4)
        assert (Child.attribute, Parent.attribute) == (1, "the parent's")
    assert (Child.attribute, Child.own) == ("the parent's", "the child's")
    assert "attribute" not in vars(Child)


def test_attributes_come_back_after_an_error() -> None:
    with pytest.raises(KeyError), patched(Patch(Child, "own", 2)):
        raise KeyError
    with pytest.raises(TypeError), patched(Patch(Child, "own", 2), Patch(1, "nothing", 2)):
        pass
    assert Child.own == "the child's"


def test_without_cuda_undoes_all_of_it() -> None:
    originals = values()
    with without_cuda():
        inside = values()
        assert torch.cuda.current_device() == torch.device("cpu")
        assert not [one for one, other in zip(originals, inside, strict=True) if one is other]
        with without_cuda():
            assert torch.cuda.current_device() == torch.device("cpu")
        assert all(one is other for one, other in zip(inside, values(), strict=True))
    assert all(one is other for one, other in zip(originals, values(), strict=True))
    with pytest.raises(ZeroDivisionError), without_cuda():
        _ = 1 / 0
    assert all(one is other for one, other in zip(originals, values(), strict=True))


def test_what_is_replaced_is_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "amaxbridge")
    for _ in range(3):
        with without_cuda():
            pass
    assert [record.message for record in caplog.records] == [
        "No CUDA here: Megatron and ModelOpt run on the CPU. Meanwhile torch.cuda.current_device, "
        "torch.cuda.synchronize, Tensor.cuda and four functions of theirs are replaced"
    ]


def test_cache_quantizers_may_be_nested() -> None:
    assert DotProductAttention not in QuantModuleRegistry
    with cache_quantizers():
        with cache_quantizers():
            assert DotProductAttention in QuantModuleRegistry
        assert DotProductAttention in QuantModuleRegistry
    assert DotProductAttention not in QuantModuleRegistry
    with pytest.raises(KeyError), cache_quantizers():
        raise KeyError
    assert DotProductAttention not in QuantModuleRegistry


def test_a_registration_that_is_not_ours_stays() -> None:
    class Theirs(QuantModule):  # type: ignore[misc]
        def _setup(self) -> None:
            pass

    QuantModuleRegistry.register({DotProductAttention: "theirs"})(Theirs)
    try:
        with cache_quantizers():
            pass
        assert issubclass(QuantModuleRegistry[DotProductAttention], Theirs)
    finally:
        QuantModuleRegistry.unregister(DotProductAttention)


@pytest.mark.parametrize(("gpu", "level"), [(False, "INFO"), (True, "WARNING")])
def test_mamba_in_torch_is_never_silent(
    gpu: bool, level: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "amaxbridge")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(mamba_mixer, "HAVE_MAMBA_SSM", False)
    config: Any = SimpleNamespace(use_mamba_mem_eff_path=True)
    assert mixer_class(config) is mixer_class(config) is TorchMambaMixer
    assert not config.use_mamba_mem_eff_path
    assert [record.levelname for record in caplog.records] == [level]
    assert "token by token" in caplog.text
    monkeypatch.setattr(mamba_mixer, "HAVE_MAMBA_SSM", True)
    assert mixer_class(config) is mamba_mixer.MambaMixer


def test_a_mamba_model_leaves_nothing_behind(launch: Launcher, nemotron_h: Path, tmp_path: Path) -> None:
    """On real Megatron, from building to loading: inside the context only what a CPU needs is replaced."""
    launch(WORKERS / "live_patches.py", nemotron_h, tmp_path)
    seen = json.loads((tmp_path / "patches.json").read_text())
    inside = [name for _, name in ON_A_CPU]
    moments = ("built", "run", "quantized", "saved", "loaded")
    assert seen == {"before": [], "after": [], "after an error": [], **dict.fromkeys(moments, inside)}
