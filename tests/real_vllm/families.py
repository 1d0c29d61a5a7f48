"""Every family's tiny model in vLLM's build for a CPU: as it is, and quantized. `make test-vllm-families`.

    python -m tests.real_vllm.families --vllm .venv-vllm/bin/python [--only NAME]

Writes the table "Families" of docs/in-vllm.md. Exit status 1 where a tensor that was written is not loaded, or where
what is computed is not what transformers computes.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tests.support.paths import ROOT
from tests.support.tiny_models import TINY_MODELS, TinyModel, save_tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from amaxbridge.export.schemes import Recipe

SERVE = Path(__file__).with_name("serve_families.py")
TABLE = ROOT / "docs" / "in-vllm.md"
_TABLE = re.compile(r"(<!-- families -->\n).*?(<!-- /families -->)", re.DOTALL)
SCHEMES = ("none", "mxfp8", "nvfp4a16")
AS_PUBLISHED = {  # fields that vLLM reads, and that transformers' classes do not have
    "DeepseekV3ForCausalLM": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "Glm4MoeLiteForCausalLM": {"topk_method": "noaux_tc", "first_k_dense_replace": 1},
    "HYV3ForCausalLM": {"first_k_dense_replace": 1, "expert_hidden_dim": 32, "route_norm": True, "qk_norm": True},
    "HunYuanDenseV1ForCausalLM": {"use_qk_norm": True},
    "HunYuanMoEV1ForCausalLM": {"use_qk_norm": True, "moe_intermediate_size": 32, "use_mixed_mlp_moe": True},
    "MiniMaxM2ForCausalLM": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
}
NOT_LOADED = {  # architecture → what this build of vLLM says
    "GptOssForCausalLM": "KeyError",  # quantized: its loader knows no biases of single experts
    "Gemma3ForConditionalGeneration": "failed to be inspected",
    "NemotronHForCausalLM": "is_act_and_mul=False is supported only for CUDA",
    "Qwen3_5ForCausalLM": "failed to be inspected",
    "Qwen3_5MoeForCausalLM": "failed to be inspected",
}
LIMIT = 1e-4  # mean difference of log-probabilities, in fp32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", required=True, help="python of the environment that has vLLM")
    parser.add_argument("--only", help="one row of tiny_models.py")
    options = parser.parse_args()
    cases: list[dict[str, Any]] = []
    for name, tiny in TINY_MODELS.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory() as made:
                prepare(tiny, Path(made))  # a process each: vLLM's groups of the first model stay in a process
                subprocess.run([options.vllm, SERVE, made, f"{made}/found.json"], check=True)
                cases += [{"model": name, **case} for case in json.loads(Path(f"{made}/found.json").read_text())]
    found = "\n".join([*rows(cases), "", *reasons(cases)]) + "\n"
    print(found)
    if options.only is None:
        TABLE.write_text(_TABLE.sub(lambda marks: marks[1] + found + marks[2], TABLE.read_text()))
    failures = [failure for case in cases for failure in failures_of(case)]
    print("\n".join(failures) or f"{len(cases)} loads; nothing differs")
    return 1 if failures else 0


def prepare(
    tiny: TinyModel,
    made: Path,
    *,
    recipes: "Mapping[str, str | Recipe]" = MappingProxyType({scheme: scheme for scheme in SCHEMES[1:]}),
    fit: "Callable[[PreTrainedConfig], PreTrainedConfig] | None" = None,
) -> None:
    """Makes the plain model and the quantized ones, and the logits of their weights: vLLM does not emulate inputs.

    Args:
        recipes: directory → what `model_free_ptq` takes as its scheme.
        fit: changes the configuration to what the build of vLLM can run; by default `fitted`.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from amaxbridge.export.model_free.whole_directory import model_free_ptq
    from amaxbridge.mappings.errors import AmaxbridgeError
    from tests.workers.model import TOKENS

    def note(scheme: str, logits: torch.Tensor) -> None:
        save_file({"tokens": TOKENS, "logits": logits.contiguous()}, made / f"{scheme}.safetensors")

    plain = made / "none"
    save_tiny_model(replace(tiny, make=lambda: (fit or fitted)(tiny.make())), plain)
    note("none", torch.load(plain / "logits.pt"))
    for scheme, recipe in recipes.items():
        try:
            model_free_ptq(plain, made / scheme, recipe)
            model_free_ptq(made / scheme, made / f"{scheme} as it is", "none")
        except AmaxbridgeError as error:
            (made / f"{scheme}.txt").write_text(str(error))
            continue
        model = AutoModelForCausalLM.from_pretrained(made / f"{scheme} as it is", dtype=torch.float32).eval()
        with torch.no_grad():
            note(scheme, model(TOKENS).logits)


def fitted(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """The configuration with heads of at least 32 dims, which vLLM's attention on a CPU needs, and as published."""
    text = config.get_text_config()
    for field, value in AS_PUBLISHED.get(config.architectures[0], {}).items():
        setattr(config, field, value)
    if getattr(text, "head_dim", None) in (None, 16) and not getattr(text, "kv_lora_rank", None):
        text.num_attention_heads //= 2
        text.num_key_value_heads //= 2
        if getattr(text, "head_dim", None):
            text.head_dim = 32
    return config


def rows(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: a row for each model, what each scheme came to."""
    yield f"| model | architecture | {' | '.join(SCHEMES)} |"
    yield f"|---|---|{'---|' * len(SCHEMES)}"
    for model in dict.fromkeys(case["model"] for case in cases):
        of_model = {case["scheme"]: case for case in cases if case["model"] == model}
        cells = [cell(of_model[scheme]) for scheme in SCHEMES]
        yield f"| {model} | `{of_model['none']['architecture']}` | {' | '.join(cells)} |"


def cell(case: Mapping[str, Any]) -> str:
    if "mean" in case:
        return f"{case['mean']:.0e}"
    return "loaded" if case.get("loaded") else "not loaded" if "why" in case else "not written"


def reasons(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Why something was not written, loaded or computed; one of a kind."""
    said: dict[str, list[str]] = {}
    for case in cases:
        why = case.get("refused") or case.get("why") or case.get("no kernel")
        if why and "mean" not in case:
            said.setdefault(" ".join(why.split())[:160], []).append(f"{case['model']} {case['scheme']}")
    for why, who in said.items():
        yield f"- {', '.join(who)}: `{why}`"


def failures_of(case: Mapping[str, Any]) -> Iterator[str]:
    label = f"{case['model']} {case['scheme']}"
    if case.get("unfilled"):
        yield f"{label}: not loaded: {', '.join(case['unfilled'])}"
    if case.get("mean", 0.0) > LIMIT:
        yield f"{label}: log-probabilities differ by {case['mean']:.2g}"
    known = NOT_LOADED.get(case["architecture"])
    if "why" in case and (known is None or known not in case["why"]):
        yield f"{label}: {case['why']}"


if __name__ == "__main__":
    sys.exit(main())
