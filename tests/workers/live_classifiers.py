"""Real Megatron ranks with reward models, critics and classifiers, made as RL frameworks make them.

    torchrun --nproc-per-node N live_classifiers.py CASES_JSON OUT_DIR

CASES_JSON maps a case to {"hf": directory of the language model, "architecture", "labels", "bias", "sharded": the head
is Megatron's own column-parallel linear, "sizes": arguments of `megatron.distributed`}. For each: `plain` and `nvfp4`,
live exports; `checkpoint`; and `values.pt`, of all tokens, in Megatron, and in a model built from `plain`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.model_walk import layer_pattern
from amaxbridge.bridge.live.process_ranks import process_group, world_rank
from amaxbridge.bridge.stored.saved_arguments import megatron_arguments
from tests.workers.model import calibrate


class LinearForLastLayer(torch.nn.Linear):
    """A head as verl's and slime's."""

    def forward(self, input_: Any, weight: Any = None, runtime_gather_output: Any = None) -> Any:  # type: ignore[override]
        return super().forward(input_).float(), None


def main(cases: dict[str, dict[str, Any]], out: Path) -> None:
    with process_group():
        for name, case in cases.items():
            run(case, out / name)


def run(case: dict[str, Any], out: Path) -> None:
    hf, architecture, labels = Path(case["hf"]), case["architecture"], case["labels"]
    with megatron.distributed(**case["sizes"]):
        model = megatron.build_model(AutoBridge.from_hf_pretrained(hf).hf, dtype=torch.float32)
        AutoBridge.from_hf_pretrained(hf).load_hf_weights(model)
        model.output_layer = head(model, labels, bias=case["bias"], sharded=case["sharded"])
        bridge = AutoBridge.from_hf_pretrained(hf, architecture=architecture, num_labels=labels)
        values = {"megatron": calibrate(model)}
        bridge.save_hf_pretrained(model, out / "plain", scheme="none")
        arguments = megatron_arguments(bridge.hf, model.config, layer_pattern([model]))
        megatron.save_checkpoint(model, out / "checkpoint", iteration=1, arguments=arguments)
        exported = AutoBridge.from_hf_pretrained(out / "plain")
        again = megatron.build_model(exported.hf, dtype=torch.float32)
        exported.load_hf_weights(again)
        values["again"] = calibrate(again)
        mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, calibrate)
        bridge.save_hf_pretrained(model, out / "nvfp4")
        if world_rank() == 0:
            torch.save(values, out / "values.pt")


def head(model: Any, labels: int, *, bias: bool, sharded: bool) -> torch.nn.Module:
    torch.manual_seed(5)
    weight, offsets = torch.randn(labels, model.config.hidden_size), torch.randn(labels)
    if sharded:
        made = ColumnParallelLinear(
            model.config.hidden_size, labels, config=model.config, init_method=model.config.init_method, bias=False
        )
        weight = weight.chunk(parallel_state.get_tensor_model_parallel_world_size())[
            parallel_state.get_tensor_model_parallel_rank()
        ]
    else:
        made = LinearForLastLayer(model.config.hidden_size, labels, bias=bias)
    made.weight.data.copy_(weight)
    if bias:
        made.bias.data.copy_(offsets)
    return made


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
