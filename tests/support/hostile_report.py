"""A report about a checkpoint whose every name and text is markup that would run a script where it is not escaped."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from amaxbridge.export import model_free_ptq
from amaxbridge.export.report import write_report
from tests.support.checkpoints import moe_model, write_checkpoint

MARK = "ran"
"""What each payload would add to the global list of this name."""

PAYLOADS = (
    f"<script>{MARK}(1)</script>",
    f'"><script>{MARK}(2)</script><b title="',
    f"'><img src=x onerror={MARK}(3)>",
    f'" onload="{MARK}(4)" onmouseover="{MARK}(4)" x="',
    f"</style><script>{MARK}(5)</script>",
    f"</svg><svg onload={MARK}(6)>",
    f"--><iframe srcdoc='<script>parent.{MARK}(7)</script>'></iframe>",
    f'<a href="javascript:{MARK}(8)">x</a>',
    "{{ 7 * 7 }}{% raw %}",
)


def make_hostile_report(directory: Path) -> Path:
    """Quantizes a model whose modules are named so, changes everything else that a page shows, and writes the page.

    Returns:
        The path of report.html.
    """
    tensors = moe_model(layers=2)
    for number, payload in enumerate(PAYLOADS):
        name = payload.replace("/", "\u2215") if number % 2 else payload  # a name has no upper limit on its markup
        for layer in range(2):
            tensors[f"model.layers.{layer}.{name}.q{number}_proj.weight"] = tensors[
                "model.layers.0.self_attn.q_proj.weight"
            ].clone()
            tensors[f"model.layers.{layer}.mlp.experts.0.{name}.weight"] = tensors[
                "model.layers.0.mlp.experts.0.up_proj.weight"
            ].clone()
        tensors[f"{name}_norm.weight"] = tensors["model.norm.weight"].clone()
    config = {"architectures": ["Qwen3MoeForCausalLM", *PAYLOADS], "hidden_size": 256, "num_experts": 4}
    source = write_checkpoint(directory / "source", tensors, config=config)
    output = directory / 'out"><script>ran(0)<'
    model_free_ptq(
        source,
        output,
        "nvfp4a16",
        architecture="guess",
        verify=False,
        record={"command_line": PAYLOADS[0], "notes": [*PAYLOADS]},
    )
    record = output / "amaxbridge.json"
    said = json.loads(record.read_bytes())
    said["base_model"], said["versions"] = PAYLOADS[1], dict(zip(PAYLOADS, PAYLOADS, strict=True))
    said["amax"] |= {
        "missing": [*PAYLOADS],
        "filled": dict(zip(PAYLOADS, PAYLOADS, strict=True)),
        "divergent": {payload: [1.0, 2.0] for payload in PAYLOADS},
    }
    record.write_text(json.dumps(said))
    config = json.loads((output / "config.json").read_bytes())
    config["quantization_config"]["ignore"] += [*PAYLOADS, *(f"re:({payload}" for payload in PAYLOADS)]
    config["quantization_config"]["config_groups"][PAYLOADS[2]] = {"targets": [PAYLOADS[3]], "weights": None}
    (output / "config.json").write_text(json.dumps(config))
    for file in output.glob("*.safetensors"):  # one tensor fewer: findings name modules
        held = load_file(file)
        del held[next(name for name in held if name.endswith("weight_scale"))]
        save_file(held, file)
    write_report(output, reference=source)
    return output / "report.html"
