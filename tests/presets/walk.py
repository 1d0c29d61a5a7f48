"""Calibrates a tiny model by every preset and recipe of ModelOpt, exports it, and holds the tables in docs against it.

    python -m tests.presets.walk [--renew]

The model has a dense layer and one with experts. For each preset and recipe a table of docs/quantizers.md has the
schemes that are written and how their weights compare with ModelOpt's own fake quantizers, or the refusal. Exit status
1: a weight differs from ModelOpt's, or the tables are not what was found; `--renew` writes them.
"""

import argparse
import contextlib
import copy
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import modelopt.torch.quantization as mtq  # noqa: E402
import modelopt_recipes  # noqa: E402
import torch  # noqa: E402
from modelopt.recipe import load_recipe  # noqa: E402
from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor, NVFP4QTensor  # noqa: E402
from torch import Tensor  # noqa: E402

from amaxbridge.bridge import AutoBridge, megatron  # noqa: E402
from amaxbridge.bridge.live.model_walk import walk_quantizers  # noqa: E402
from amaxbridge.export.schemes import scheme_of  # noqa: E402
from amaxbridge.export.schemes.signature import Signature  # noqa: E402
from amaxbridge.export.schemes.targets import is_targeted  # noqa: E402
from amaxbridge.mappings.errors import AmaxbridgeError  # noqa: E402
from tests.support.checkpoints import tensors_in  # noqa: E402
from tests.support.hf_models import make_qwen3_moe  # noqa: E402
from tests.support.paths import ROOT  # noqa: E402
from tests.workers.model import calibrate  # noqa: E402

PAGE = ROOT / "docs" / "quantizers.md"
_ATTRIBUTE = re.compile(r": (\w+)=[^\n]*?: ([^\n:]+)\n    next step")
_AS_OTHERS = 2**-7  # an ulp of bf16: scales in the model's dtype, or a product that rounds otherwise


def presets() -> Iterator[tuple[str, Any]]:
    """Every preset; those of the key-value cache together with FP8 weights, as ModelOpt combines them."""
    for name in sorted(name for name in dir(mtq) if name.endswith("_CFG")):
        config = copy.deepcopy(getattr(mtq, name))
        if "_KV_" in name:
            config["quant_cfg"] = [*mtq.FP8_DEFAULT_CFG["quant_cfg"], *config["quant_cfg"]]
            config["algorithm"] = "max"
        yield name, config


def recipes() -> Iterator[tuple[str, Any]]:
    """Every recipe for quantizing without a search; of those that say the same, the first."""
    seen, root = set[str](), Path(modelopt_recipes.__file__).parent
    for file in sorted(root.rglob("*.yaml")):
        if not re.search(r"^ *recipe_type: ptq$", file.read_text(), re.MULTILINE):
            continue
        config = load_recipe(file).quantize.model_dump()
        text = re.sub(r"'checkpoint_dir': '[^']*'", "", repr(config))
        if text not in seen:
            seen.add(text)
            yield str(file.relative_to(root).with_suffix("")), config


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--renew", action="store_true", help="write the tables")
    options = parser.parse_args()
    page, wrong = PAGE.read_text(), list[str]()
    with tempfile.TemporaryDirectory() as place:
        for what, walked in (("preset", presets()), ("recipe", recipes())):
            found = walk(Path(place) / what, walked)
            wrong += [name for name, each in found.items() if each.get("other")]
            page = with_table(page, what, table(found, what))
    if options.renew:
        PAGE.write_text(page)
    current = PAGE.read_text() == page
    if wrong or not current:
        sys.exit(f"differ from ModelOpt: {wrong or 'none'}; the tables are {'' if current else 'not '}current")


def with_table(page: str, what: str, table: str) -> str:
    before, begin, rest = page.partition(f"<!-- {what}s: make presets -->\n")
    _, end, after = rest.partition(f"<!-- end of {what}s -->")
    assert begin and end, what
    return f"{before}{begin}{table}{end}{after}"


def walk(place: Path, walked: Iterator[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    bridge, rows = AutoBridge.from_hf_pretrained(model_directory(place / "model")), {}
    with megatron.distributed(tp=1):
        for number, (name, config) in enumerate(walked):
            work = place / f"{number}-work"
            work.mkdir()
            with contextlib.chdir(work):  # layer-by-layer recipes keep files there, and would take up those of others
                rows[name] = row(bridge, config, place / str(number))
            print(name, rows[name], flush=True)
    return rows


def model_directory(directory: Path) -> Path:
    """Writes the tiny model, whose weights divide into blocks of 128, also where Megatron fuses them."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "num_experts": 2,
             "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128,
             "mlp_only_layers": [0]}  # fmt: skip
    return make_qwen3_moe(directory, sizes)


def table(rows: Mapping[str, Mapping[str, Any]], what: str) -> str:
    lines = [
        f"| {what} | written as | weights equal to ModelOpt's, to an ulp of bf16, to its exporter | or refused |",
        "|---|---|---|---|",
    ]
    for name, each in rows.items():
        if "schemes" in each:
            counts = f"{each['equal']}, {each['within an ulp']}, {each['exporter']} of {each['modules']}"
            lines.append(f"| `{name}` | `{', '.join(each['schemes'])}` | {counts} | |")
        else:
            lines.append(f"| `{name}` | | | {why(each)} |")
    return "\n".join(lines) + "\n"


def why(each: Mapping[str, Any]) -> str:
    """The reason of a refusal in a few words."""
    if "modelopt" in each:
        return f"ModelOpt itself: {each['modelopt'].split(':')[0]}"
    text = each["refused"]
    attributes = dict.fromkeys(f"`{name}`: {effect}" for name, effect in _ATTRIBUTE.findall(text))
    return "; ".join(attributes) or re.sub(r"\S*\.\S+ ", "", text.partition("\n")[0].rstrip(":")).replace("|", "")


def row(bridge: AutoBridge, config: Any, target: Path) -> dict[str, Any]:
    model = megatron.build_model(bridge.hf)
    bridge.load_hf_weights(model)
    try:
        with megatron.cache_quantizers():
            mtq.quantize(model.float(), config, calibrate)
    except Exception as error:
        return {"modelopt": f"{type(error).__name__}: {error}"[:300]}
    model.bfloat16()
    try:
        report = bridge.save_hf_pretrained(model, target, scheme="auto")
    except AmaxbridgeError as error:
        return {"refused": str(error)}
    return {"schemes": sorted(set(report.quantized.values())), **compared(bridge, model, target)}


@torch.no_grad()
def compared(bridge: AutoBridge, model: Any, target: Path) -> dict[str, Any]:
    """How many dequantized weights equal ModelOpt's fake-quantized ones, in all bits or to an ulp of bf16, or else
    those of ModelOpt's exporter."""
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    written, counts = tensors_in(target), {"modules": 0, "equal": 0, "within an ulp": 0, "exporter": 0, "other": 0}
    modules = {id(each): each for each in model.modules()}
    owners = {id(q): m for m in modules.values() for q in [getattr(m, "weight_quantizer", None)] if q is not None}
    for each in walk_quantizers([model]):
        if ".weight_quantizer" not in each.name:
            continue
        name = re.sub(r"\.weight_quantizer(\.(\d+))?$", lambda found: f".weight{found[2] or ''}", each.name)
        mapping = bridge.hf.registry.megatron_to_hf_lookup(name)
        assert mapping is not None, name
        weight = owners[id(each.module)].weight.detach()
        fake = fake_quantized(each.module, weight)
        by_exporter = mapping.join([as_exported(each.module, weight, fake)], bridge.hf.model_config)
        for name, expected in mapping.join([fake], bridge.hf.model_config).items():
            found = dequantized(name.removesuffix(".weight"), config, written)
            fits = {
                "equal": torch.equal(found, expected),
                "within an ulp": close(found, expected),
                "exporter": close(found, by_exporter[name]),
                "other": True,
            }
            counts["modules"] += 1
            counts[next(kind for kind, fit in fits.items() if fit)] += 1
    return counts


def close(found: Tensor, expected: Tensor) -> bool:
    return bool(torch.isclose(found.float(), expected.float(), rtol=_AS_OTHERS, atol=0).all())


def fake_quantized(quantizer: Any, weight: Tensor) -> Tensor:
    """What ModelOpt's quantizer makes of a weight.

    Its MX quantizers need a GPU. MXFP8 is made by ModelOpt's packed tensor instead. MXFP4 has that one's exponents, and
    the nearest codes, ties to even, of the kernel: the packed tensor rounds ties down.
    """
    if not quantizer.is_mx_format:
        made: Tensor = quantizer(weight)
        return made
    if quantizer.num_bits == (4, 3):
        packed, scale = MXFP8QTensor.quantize(weight)
        made = packed.dequantize(dtype=weight.dtype, scale=scale, block_sizes={-1: 32})
    else:
        steps = torch.exp2(MXFP4QTensor.quantize(weight, 32)[1].float() - 127).view(len(weight), -1, 1)
        made = (nearest(weight.float().unflatten(1, (-1, 32)) / steps) * steps).flatten(1).to(weight.dtype)
    return made


def nearest(values: Tensor) -> Tensor:
    """The nearest E2M1 value; of two, that with an even code."""
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    distance = (values.abs()[..., None] - grid).abs()
    ties = distance == distance.amin(-1, keepdim=True)
    return grid[(ties * torch.tensor([2, 1] * 4)).argmax(-1)] * values.sign()


def as_exported(quantizer: Any, weight: Tensor, fake: Tensor) -> Tensor:
    """The weight in the checkpoint of ModelOpt's exporter, which for calibrated NVFP4 blocks may differ from `fake`.

    Where the scale of a block lies exactly between two of E4M3, ModelOpt's exporter and fake quantizer disagree.
    """
    if not quantizer.is_nvfp4_static or getattr(quantizer, "_lsq", False):
        return fake
    scale, factor = NVFP4QTensor.get_weights_scaling_factor_from_quantizer(quantizer, weight)
    packed = NVFP4QTensor.quantize(weight, 16, scale, factor)[0]
    made: Tensor = packed.dequantize(weight.dtype, scale=scale, double_scale=factor, block_sizes={-1: 16})
    return made


def dequantized(module: str, config: Mapping[str, Any], written: Mapping[str, Tensor]) -> Tensor:
    group = next(each for each in config["config_groups"].values() if is_targeted(module, each["targets"]))
    scheme = scheme_of(Signature.of(group, config["format"]))
    assert scheme is not None
    prefix = f"{module}."
    return scheme.dequantize({n.removeprefix(prefix): each for n, each in written.items() if n.startswith(prefix)})


if __name__ == "__main__":
    main()
