"""The options of every command: types, defaults and meanings. Hydra checks the command line against them.

A command is one dataclass, and one YAML file that names the choices of its config groups. A config group (`scheme`,
`amax`, `adapter`, `io`, `parallel`, `model`) is a dataclass here and a directory of choices beside this file.
"""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from amaxbridge.configs.options import help_template, option, shared


@dataclass
class SchemeGroupConfig:
    """One scheme of a recipe, and its modules."""

    scheme: str = option("Name of a scheme.")
    targets: list[str] = option("Modules: full names, re: patterns matched from the beginning, or Linear.", ["Linear"])
    group_size: int | None = option("As scheme.group_size, for this group.", None)
    scales: str | None = option("As scheme.scales, for this group.", None)


@dataclass
class SchemeConfig:
    """A recipe: the scheme of each module. No groups: plain weights."""

    groups: list[SchemeGroupConfig] = option(
        "Items {scheme: NAME, targets: [MODULE, re:PATTERN, Linear], group_size: N, scales: NAME}; the first that "
        "targets a module is its group.",
        [],
    )
    group_size: int | None = option(
        "Columns that share a scale in schemes of packed integers (w4a16, …), for groups that set none; null for 128.",
        None,
    )
    scales: str | None = option(
        "ue8m0: round scales up to powers of two (fp8_block), as vLLM does on a Hopper or Blackwell; null for none.",
        None,
    )
    from_quantizers: bool = option("Read the scheme of every module from its quantizers, in place of groups.", False)
    ignore: list[str] = option("Modules to leave unquantized: full names, or re: patterns.", [])


@dataclass
class AmaxConfig:
    """What to do about unusable quantizer state."""

    missing: str = shared("missing_amax")


@dataclass
class ExportAmaxConfig(AmaxConfig):
    """What to do about quantizer state that does not fit."""

    weights: str = shared("weight_amax")


@dataclass
class AdapterConfig:
    """What to do with adapters."""

    mode: str | None = shared("adapter")
    alpha: float | None = shared("adapter_alpha")
    base: str | None = shared("adapter_base")


@dataclass
class IoConfig:
    """The output directory."""

    overwrite: bool = shared("overwrite")
    hash_source: bool = shared("hash_source")


@dataclass
class QuantizeIoConfig(IoConfig):
    """Input and output directories."""

    stream: bool = option(
        "Fetch the weights of a model on the Hub part by part while they are quantized, and keep none of them.", False
    )


@dataclass
class ShardsConfig(IoConfig):
    """The output directory, of safetensors."""

    max_shard_gb: float = option("Largest safetensors file, in 10^9 bytes.", 5.0)


@dataclass
class ParallelConfig:
    """Sizes of a Megatron mesh; processes beyond TP times PP are data-parallel."""

    tp: int = option("Tensor-parallel size.", 1)
    pp: int = option("Pipeline-parallel size.", 1)
    vpp: int | None = option("Model chunks of each pipeline rank; null for one, without a virtual pipeline.", None)
    ep: int = option("Expert-parallel size.", 1)
    etp: int | None = option("Tensor-parallel size of the experts; null for tp.", None)


@dataclass
class ModelConfig:
    """How the Megatron model is built."""

    model_class: str | None = option("gpt or hybrid; null for GPTModel if the family has one.", None)
    dtype: str = option("Dtype of the parameters: bfloat16, float16 or float32.", "bfloat16")


@dataclass
class CommonConfig:
    """Options that every command has."""

    debug: bool = option("Show tracebacks.", False)


@dataclass
class ExportConfig(CommonConfig):
    """Megatron checkpoint → Hugging Face checkpoint in the compressed-tensors format.

    amaxbridge export checkpoint=CKPT hf=HF_DIR output=OUT scheme=nvfp4, or under torchrun to share the work
    """

    checkpoint: str | None = option(
        "Megatron checkpoint: training's save directory, or one iter_NNNNNNN. Without it, dry_run=true "
        "plans the export of a model of this mesh from config.json alone.",
        None,
    )
    hf: str | None = option(
        "Hugging Face directory or Hub name, for config.json and tokenizer. Without it, config.json is made "
        "from the arguments that training saved in the checkpoint.",
        None,
    )
    family: str | None = option(
        "Python file with a model family of your own, for a model that is not known here. The file runs.", None
    )
    architecture: str | None = option(
        "Without hf=: the architecture, if the saved arguments fit several. With hf=: that of a reward model, a critic "
        "or a classifier, as Qwen3ForSequenceClassification.",
        None,
    )
    num_labels: int | None = option("With hf= and architecture=: the rows of the head; 1 for a reward model.", None)
    revision: str | None = option("Branch, tag or commit of a model on the Hub, as NAME@REVISION says, too.", None)
    base_model: str | None = shared("base_model")
    push_to_hub: str | None = option("Name of a model on the Hub to upload the finished output to.", None)
    vocab_size: int | None = option(
        "Without hf=: the tokenizer's vocabulary size, if only Megatron's padded one was saved.", None
    )
    output: str = option("Directory to write.")
    scheme: SchemeConfig = shared("scheme", SchemeConfig)
    format: str = shared("format")
    ignore: list[str] = shared("ignore")
    amax: ExportAmaxConfig = option("What to do if an amax is missing.", ExportAmaxConfig)
    adapter: AdapterConfig = option("What to do with adapters (LoRA, DoRA).", AdapterConfig)
    io: ShardsConfig = option("What to do with an existing output.", ShardsConfig)
    dtype: str | None = shared("dtype")
    weights: str = shared("weights")
    quant_state: bool = shared("quant_state")
    parallel: ParallelConfig = option("Megatron's mesh, for a dry run without a checkpoint.", ParallelConfig)
    mixed_groups: str = shared("mixed_groups")
    nonfinite: str = shared("nonfinite")
    dry_run: bool = shared("dry_run")
    verify: bool = shared("verify")
    json: str | None = option("File for the plan as JSON.", None)


@dataclass
class ImportConfig(CommonConfig):
    """Hugging Face checkpoint, plain or compressed-tensors → Megatron distributed checkpoint.

    torchrun --nproc-per-node 4 -m amaxbridge import hf=HF_DIR output=CKPT parallel.tp=2 parallel.pp=2
    """

    hf: str = option("Hugging Face directory or Hub name.")
    revision: str | None = option("Branch, tag or commit of a model on the Hub, as NAME@REVISION says, too.", None)
    family: str | None = option(
        "Python file with a model family of your own, for a model that is not known here. The file runs.", None
    )
    output: str = option("Directory to write.")
    model: ModelConfig = option("How the Megatron model is built.", ModelConfig)
    parallel: ParallelConfig = option("Megatron's mesh.", ParallelConfig)
    io: IoConfig = option("What to do with an existing output.", IoConfig)
    dry_run: bool = option("Show the plan and write nothing.", False)
    json: str | None = option("File for the plan as JSON.", None)


@dataclass
class QuantizeConfig(CommonConfig):
    """Hugging Face checkpoint → compressed-tensors, without Megatron and without a model.

    amaxbridge quantize input=HF_DIR output=OUT scheme=nvfp4a16
    """

    input: str = option("Hugging Face directory or Hub name.")
    output: str = option("Directory to write.")
    scheme: SchemeConfig = shared("scheme", SchemeConfig)
    format: str = shared("format")
    ignore: list[str] = shared("ignore")
    quant_state: str | None = option("quant_state.safetensors of a trained model; without it, no calibration.", None)
    amax: AmaxConfig = option("What to do if quant_state lacks an amax.", AmaxConfig)
    io: QuantizeIoConfig = option("What to do with an existing output.", QuantizeIoConfig)
    converter: str | None = option(
        "Format of a source that is already quantized: fp8_block, compressed_tensors, kimi_int4, modelopt, awq, gptq, "
        "gpt_oss; null to detect it from the source's config.json and tensors.",
        None,
    )
    revision: str | None = option("Branch, tag or commit of a model on the Hub, as NAME@REVISION says, too.", None)
    base_model: str | None = shared("base_model")
    push_to_hub: str | None = option("Name of a model on the Hub to upload the finished output to.", None)
    architecture: str | None = option(
        "Null for the one in config.json; the name of a known one with the same tensors; or guess, to go by usual "
        "tensor names.",
        None,
    )
    workers: int | None = option("Threads; null for one per core, or eight per GPU.", None)
    device: str | None = option(
        "Where to quantize: cpu, cuda or cuda:N; null for all GPUs, or the CPU if there is none.", None
    )
    mixed_groups: str = shared("mixed_groups")
    nonfinite: str = shared("nonfinite")
    dry_run: bool = shared("dry_run")
    verify: bool = shared("verify")
    json: str | None = option("File for the plan as JSON.", None)


@dataclass
class RepairConfig(CommonConfig):
    """Mends a compressed-tensors checkpoint that engines read wrong, without training and without the original weights.

    amaxbridge repair input=BAD output=GOOD [dry_run=true]
    """

    input: str = option("Directory to mend; it stays as it is.")
    output: str = option("Directory to write.")
    unseen: str = shared("unseen")
    copy: bool = shared("copy")
    io: IoConfig = option("How to write.", IoConfig)
    dry_run: bool = shared("dry_run")
    verify: bool = shared("verify")
    json: str | None = option("File for every change as JSON.", None)


@dataclass
class VerifyConfig(CommonConfig):
    """Checks a compressed-tensors checkpoint; exit status 1 if an engine could not serve it correctly.

    amaxbridge verify input=OUT [reference=HF_DIR] [engine=vllm]
    """

    input: str = option("Directory to check.")
    reference: str | None = option(
        "What the checkpoint was made from: a Hugging Face directory or Hub name, to measure errors, or "
        "quant_state.safetensors.",
        None,
    )
    json: str | None = option("File for the findings as JSON.", None)
    engine: str = option(
        "Engine that must serve it: vllm, sglang, transformers or runtime; all: a verdict for each, and at least one "
        "must serve it.",
        "all",
    )
    tp: int = option("Tensor-parallel size at which it must serve.", 1)
    ep: int = option("Expert-parallel size at which it must serve.", 1)


@dataclass
class ReportConfig(CommonConfig):
    """Reports on a checkpoint, for people and for programs: report.html and report.json.

    amaxbridge report input=OUT [reference=HF_DIR] [quant_state=FILE]
    """

    input: str = option("Directory to report on.")
    reference: str | None = option(
        "Hugging Face directory or Hub name that the checkpoint was made from, to measure errors.", None
    )
    quant_state: str | None = option("quant_state.safetensors of the training run; null for the one in input.", None)
    output: str | None = option("Directory for the report; null for input.", None)
    card: bool = option("Write the signal-to-noise ratio into the model card of input; needs reference.", False)


@dataclass
class DeltaConfig(CommonConfig):
    """What changed between two checkpoints of one training, in one file.

    amaxbridge delta base=STEP_1 new=STEP_2 output=DELTA
    """

    base: str = option("Directory that is there already where the delta will be applied.")
    new: str = option("Directory to make of it.")
    output: str = option("File to write, NAME.safetensors; or a directory, in which it is delta.safetensors.")
    io: IoConfig = option("What to do with an existing output.", IoConfig)
    json: str | None = option("File for the figures as JSON.", None)


@dataclass
class ApplyConfig(CommonConfig):
    """Makes the checkpoint that a delta was written for, byte for byte, or nothing.

    amaxbridge apply base=STEP_1 delta=DELTA output=OUT
    """

    base: str = option("Directory that the delta was made from; it stays as it is.")
    delta: str = option("What `amaxbridge delta` wrote: the file, or its directory.")
    output: str = option("Directory to write.")
    io: IoConfig = option("What to do with an existing output.", IoConfig)


@dataclass
class DemoConfig(CommonConfig):
    """The whole way with a tiny model: trained in Megatron, quantized, exported, loaded and compared.

    python scripts/demo.py
    """

    output: str = option("Directory for everything that the demo makes; it is replaced.", "demo-output")
    processes: int = option("Tensor-parallel ranks.", 2)


COMMANDS: dict[str, type[CommonConfig]] = {
    "export": ExportConfig,
    "import_hf": ImportConfig,
    "quantize": QuantizeConfig,
    "verify": VerifyConfig,
    "repair": RepairConfig,
    "report": ReportConfig,
    "delta": DeltaConfig,
    "apply": ApplyConfig,
    "demo": DemoConfig,
}


def register() -> None:
    """Makes the schemas and help texts known to Hydra under the names that the YAML files use."""
    store = ConfigStore.instance()
    for name, schema in COMMANDS.items():
        store.store(name=f"{name}_schema", node=schema)
        store.store(group="hydra/help", name=name, node={"template": help_template(schema)})
