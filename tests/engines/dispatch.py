"""Which schemes an engine serves: its own dispatch, cut out of its source and run on the config groups that we write.

The methods of `CompressedTensorsConfig` that choose a scheme are compiled from the engine's file. What they return is
replaced by recorders, what they ask of the machine is answered for an NVIDIA GPU of a compute capability; the arguments
that they look at are those of the compressed-tensors version that the engine pins. So this runs in a process of its
own, with that version first in its path:

    PYTHONPATH=COMPRESSED_TENSORS python -m tests.engines.dispatch ENGINE SOURCES < groups.json
"""

import ast
import json
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CAPABILITIES = (90, 100)
_ROOM = "layers/quantization/compressed_tensors"
FILES = {
    "vllm": (f"vllm/model_executor/{_ROOM}/compressed_tensors.py",
             f"vllm/model_executor/{_ROOM}/compressed_tensors_moe/compressed_tensors_moe.py"),
    "sglang": (f"sglang/srt/{_ROOM}/compressed_tensors.py",),
}  # fmt: skip
MATCHERS = {
    "vllm": ("vllm/model_executor/layers/quantization/utils/config_utils.py",
             f"vllm/model_executor/{_ROOM}/utils.py"),
    "sglang": (f"sglang/srt/{_ROOM}/utils.py",),
}  # fmt: skip
MAPPERS = {"vllm": "vllm/model_executor/models/utils.py", "sglang": "sglang/srt/models/utils.py"}
_WANTED = ("_is_", "_get_scheme", "get_moe", "get_lm_head", "_check")
_FALSE = ("_is_npu", "_is_hip", "_is_xpu", "is_npu", "is_hip", "is_xpu")


class Chosen:
    """Stands for a scheme class: the dispatch chose it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: object, **__: object) -> "Chosen":
        return self

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name == "get_min_capability":
            return lambda: 100 if self.name in ("CompressedTensorsW4A4Fp4", "CompressedTensorsW4A4Nvfp4MoE") else 75
        raise AttributeError(name)


class Names(dict[str, Any]):
    """The globals of the compiled source: a name that is imported from the engine is a recorder or does nothing."""

    def __missing__(self, name: str) -> Any:
        if name.startswith(("CompressedTensors", "NPU", "XPU", "Unquantized", "Mxfp4")):
            return Chosen(name)
        raise KeyError(name)


def _quiet(*_: object, **__: object) -> None:
    pass


def names_for(capability: int) -> Names:
    """The globals that the engine's files import, as they are on an NVIDIA GPU."""
    import compressed_tensors
    import compressed_tensors.quantization as quantization
    import torch

    silent = SimpleNamespace(**dict.fromkeys(("info_once", "warning_once", "debug", "warning", "info"), _quiet))
    backend = SimpleNamespace(
        is_auto=lambda: True, is_triton=lambda: False, is_marlin=lambda: False, is_flashinfer_trtllm=lambda: False
    )
    platform = SimpleNamespace(
        is_rocm=lambda: False, is_xpu=lambda: False,
        get_device_capability=lambda: SimpleNamespace(to_int=lambda: capability),
    )  # fmt: skip
    known = {
        name: getattr(quantization, name)
        for name in ("QuantizationArgs", "QuantizationStrategy", "QuantizationType", "ActivationOrdering")
    }
    return Names(
        known
        | dict.fromkeys(_FALSE, False)
        | {
            "CompressionFormat": compressed_tensors.CompressionFormat, "BaseModel": object, "logger": silent,
            "current_platform": platform, "get_moe_runner_backend": lambda: backend,
            "get_fp4_gemm_runner_backend": lambda: backend, "get_platform": lambda: SimpleNamespace(is_sm100=False),
            "WNA16_SUPPORTED_BITS": [4, 8], "suppress": None, "_is_cuda": True, "torch": torch,
        }
    )  # fmt: skip


def functions(file: Path, wanted: Callable[[str], bool], names: Names) -> dict[str, Any]:
    """Functions and methods of a file, compiled without annotations, and without decorators of the engine."""
    found: dict[str, Any] = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef) and wanted(node.name):
            for each in ast.walk(node):
                if isinstance(each, ast.arg):
                    each.annotation = None
                elif isinstance(each, ast.FunctionDef):
                    each.returns = None
                elif isinstance(each, ast.ImportFrom) and each.level:  # a scheme: the recorder
                    each.module, each.level = "tests.engines.recorders", 0
            kinds = {getattr(each, "id", "") for each in node.decorator_list}
            node.decorator_list = [ast.Name(each, ast.Load()) for each in kinds & {"classmethod", "staticmethod"}]
            unit = ast.Module([node], [])
            exec(compile(ast.fix_missing_locations(unit), str(file), "exec"), names, found)
    return found


def dispatch(engine: str, sources: Path, capability: int) -> dict[str, Callable[..., str]]:
    """What the engine chooses for linear layers, routed experts and the head: the name of its class, or raises."""
    names = names_for(capability)
    methods: dict[str, Any] = {}
    for file in FILES[engine]:
        methods |= functions(sources / file, lambda name: name.startswith(_WANTED), names)
    methods["_check_scheme_supported"] = staticmethod(
        lambda wanted, error=True, match_exact=False: capability == wanted if match_exact else capability >= wanted
    )
    utils = MATCHERS[engine][-1]
    names |= functions(sources / utils, lambda name: name == "is_activation_quantization_format", names)
    config_class = type("Config", (), methods)

    def scheme(args: Mapping[str, Any], group: Mapping[str, Any]) -> Any:
        config = config_class()
        config.quant_format = group["format"]
        names["QuantizationConfig"] = config_class
        inputs = args["input_activations"]
        reads = names["is_activation_quantization_format"](group["format"]) or (engine == "vllm" and inputs)
        return config, args["weights"], inputs if reads else None

    def linear(args: Mapping[str, Any], group: Mapping[str, Any]) -> str:
        config, weights, inputs = scheme(args, group)
        return config._get_scheme_from_parts(weight_quant=weights, input_quant=inputs, format=group["format"]).name

    def experts(args: Mapping[str, Any], group: Mapping[str, Any]) -> str:
        config, weights, inputs = scheme(args, group)
        found = {"weights": weights, "input_activations": inputs, "format": group["format"]}
        layer = SimpleNamespace(ckpt_gate_proj_name="gate_proj", ckpt_up_proj_name="up_proj",
                                ckpt_down_proj_name="down_proj", moe_config=None)  # fmt: skip
        config._add_fused_moe_to_target_scheme_map = _quiet
        config.get_scheme_dict = lambda *_: found
        if engine == "vllm":
            return methods["get_moe_method"].__func__(config, layer, "experts").name
        config.target_scheme_map = {"Linear": found}
        if config._is_mxfp4_moe(layer_name="experts"):
            return "Mxfp4MoEMethod"
        return config.get_moe_scheme(layer, "experts").name

    def head(args: Mapping[str, Any], group: Mapping[str, Any]) -> str:
        config, weights, inputs = scheme(args, group)
        if engine == "vllm":  # asks `get_scheme`, as for linear layers
            return linear(args, group)
        names.update(should_ignore_layer=lambda *_, **__: False, check_equal_or_regex_match=lambda **_: True)
        config.ignore, config.packed_modules_mapping = (), {}
        config.target_scheme_map = {"lm_head": {"weights": weights, "input_activations": inputs}}
        config.get_linear_scheme = lambda **_: Chosen(linear(args, group))
        return config.get_lm_head_scheme(None, "lm_head").name

    return {"linear": linear, "experts": experts, "head": head}


def served(engine: str, sources: Path, groups: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Scheme → what serves linear layers, experts and the head: names of classes, or `!` and the engine's own words."""
    from compressed_tensors.quantization import QuantizationArgs

    found: dict[str, dict[str, str]] = {name: {} for name in groups}
    for name, group in groups.items():
        args = {
            part: group[part] and QuantizationArgs.model_validate(group[part])
            for part in ("weights", "input_activations")
        }
        for part in ("linear", "experts", "head"):
            said = [_asked(dispatch(engine, sources, capability)[part], args, group) for capability in CAPABILITIES]
            served = [each for each in said if not each.startswith("!")]
            if served and len(served) < len(said):
                only = next(number for number, each in zip(CAPABILITIES, said, strict=True) if each == served[0])
                found[name][part] = f"{served[0]} (compute capability {only / 10:.1f} only)"
            else:
                found[name][part] = " or ".join(dict.fromkeys(said))
    return found


def _asked(choose: Callable[..., str], args: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    try:
        return choose(args, group)
    except (NotImplementedError, ValueError, RuntimeError, ImportError, AttributeError, AssertionError) as error:
        return f"!{type(error).__name__}: {' '.join(str(error).split())[:110]}"


def main() -> None:
    """Prints what `served` finds, as JSON."""
    logging.disable()
    engine, sources = sys.argv[1:]
    print(json.dumps(served(engine, Path(sources), json.load(sys.stdin))))


if __name__ == "__main__":
    main()
