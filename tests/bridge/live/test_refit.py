"""A live model streams quantized tensors: bit for bit those of its checkpoint, each from one rank."""

import json
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from examples.refit import STEPS, serve
from tests.support.checkpoints import tensors_in
from tests.support.hard_weights import same_bytes
from tests.support.launcher import Launcher
from tests.support.paths import ROOT, WORKERS


@pytest.fixture(scope="module")
def streamed(
    launch: Launcher, qwen3: Path, qwen3_moe: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The directories that two ranks wrote: a dense model at TP=2, and one with experts at EP=2."""
    root = tmp_path_factory.mktemp("refit")
    runs = {"dense": (qwen3, {"tp": 2}), "moe": (qwen3_moe, {"tp": 1, "ep": 2})}
    for name, (hf, sizes) in runs.items():
        launch(WORKERS / "live_refit.py", hf, root / name, json.dumps(sizes), processes=2)
    return {name: root / name for name in runs}


@pytest.mark.parametrize("model", ["dense", "moe"])
@pytest.mark.parametrize(("kind", "checkpoint"), [("plain", "plain"), ("nvfp4", "nvfp4"), ("auto", "nvfp4")])
def test_the_stream_is_the_checkpoint(streamed: dict[str, Path], model: str, kind: str, checkpoint: str) -> None:
    expected = tensors_in(streamed[model] / checkpoint)
    ranks = [load_file(streamed[model] / f"{kind}_{rank}.safetensors") for rank in range(2)]
    assert all(ranks), "the work is shared"
    assert not ranks[0].keys() & ranks[1].keys(), "each tensor comes from one rank"
    found = ranks[0] | ranks[1]
    assert found.keys() == expected.keys()
    assert all(same_bytes(found[name], tensor) for name, tensor in expected.items())
    caches = [name for name in found if name.endswith(("k_scale", "v_scale"))]
    assert len(caches) == (0 if kind == "plain" else 4)


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_a_stream_holds_no_more_than_a_bucket(streamed: dict[str, Path], model: str) -> None:
    for rank in range(2):
        alive = json.loads((streamed[model] / f"alive_{rank}.json").read_text())
        assert max(alive.values()) <= 12, "of 67 and more: the bucket is a fused group, q, k and v with 4 tensors each"


def test_the_example(launch: Launcher, qwen3: Path, tmp_path: Path) -> None:
    """The engine of examples/refit.py runs here and receives the weights from its training ranks after each step."""
    address, output = str(tmp_path / "engine"), tmp_path / "out"
    steps = list[dict[str, Tensor]]()
    # If the training fails, nobody ends the engine: it must not keep the test run alive.
    engine = threading.Thread(target=lambda: steps.extend(serve(address, ranks=2)), daemon=True)
    engine.start()
    launch(ROOT / "examples" / "refit.py", "train", qwen3, address, output, processes=2)
    engine.join()
    assert len(steps) == STEPS
    expected = tensors_in(output)
    assert steps[-1].keys() == expected.keys()
    assert all(same_bytes(steps[-1][name], tensor) for name, tensor in expected.items())
    assert not all(same_bytes(steps[0][name], tensor) for name, tensor in expected.items()), "the weights changed"
