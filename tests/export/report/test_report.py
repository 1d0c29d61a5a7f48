"""The report: every figure against another computation of it, and a page that needs nothing but itself."""

import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amaxbridge.export.amax.quant_state import Divergence, QuantState
from amaxbridge.export.amax.quant_state_file import ModelIdentity, quant_state_bytes
from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.export.report import Facts, gather, render, report_json, write_report
from amaxbridge.export.report.heatmap import heat_map
from amaxbridge.export.report.module_place import place_of
from amaxbridge.export.verify import verify
from amaxbridge.mappings.errors import UsageError
from tests.support.checkpoints import dense_model, tensors_in, write_checkpoint

SATURATED = "model.layers.1.self_attn.o_proj"
FAR = "model.layers.0.mlp.experts.5.down_proj"


def state_of(weights: dict[str, Tensor]) -> QuantState:
    """Every projection calibrated on its own weight; one saturated, one expert far off, one missing, one divergent."""
    modules = [name.removesuffix(".weight") for name in weights if "_proj" in name]
    amax = {}
    for module in modules:
        largest = weights[f"{module}.weight"].abs().max().float()
        amax[f"{module}.weight_quantizer._amax"] = largest * (0.5 if module == SATURATED else 1.0)
        amax[f"{module}.input_quantizer._amax"] = torch.tensor(40.0 if module == FAR else 4.0)
    missing = "model.layers.0.self_attn.k_proj.weight_quantizer._amax"
    del amax[missing]
    divergent = {"model.layers.0.self_attn.q_proj.input_quantizer._amax": Divergence(2.0, 4.0)}
    return QuantState(amax, dict.fromkeys(modules, "nvfp4"), frozenset({missing}), divergent)


def quantized(source: Path, target: Path) -> Path:
    state = state_of(experts_apart(tensors_in(source)))
    model_free_ptq(
        source,
        target,
        "nvfp4",
        quant_state=state,
        missing_amax="from_weights",
        record={"command_line": "python a.py <b>"},
    )
    return target


def experts_apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A directory's tensors with packed experts taken apart."""
    from amaxbridge.export.disk.packed_experts import split_fused_moe_experts

    return split_fused_moe_experts(tensors)


@pytest.fixture(scope="module")
def dense(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(qwen3, tmp_path_factory.mktemp("dense") / "out")


@pytest.fixture(scope="module")
def moe(qwen3_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(qwen3_moe, tmp_path_factory.mktemp("moe") / "out")


class Page(HTMLParser):
    """The contents of a page: open tags, addresses, text, and the paths of its pictures."""

    VOID = frozenset({"meta", "wbr", "path", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags = list[str]()
        self.addresses = list[str]()
        self.words = list[str]()
        self.paths = list[str]()
        self.feed(html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]
        self.paths += [value or "" for name, value in attributes if tag == "path" and name == "d"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def page_of(facts: Facts) -> Page:
    html = render(facts)
    assert not re.search(r"https?://|//|@import|url\(|<script|<link|<img", html.replace("<!doctype", "")), "external"
    page = Page(html)
    assert page.addresses == []
    return page


def reference_values(module: str, written: dict[str, Tensor]) -> Tensor:
    """A weight by the format's own definition: e2m1 code, times its block's scale, over the global scale."""
    e2m1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    packed = written[f"{module}.weight_packed"]
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).long()
    signs = 1.0 - 2.0 * (codes >> 3)
    scales = (
        written[f"{module}.weight_scale"].float().repeat_interleave(16, 1) / written[f"{module}.weight_global_scale"]
    )
    return (signs * e2m1[codes & 7] * scales).bfloat16().float()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_figures_against_another_computation(request: pytest.FixtureRequest, kind: str) -> None:
    output, source = (
        request.getfixturevalue(kind),
        request.getfixturevalue({"dense": "qwen3", "moe": "qwen3_moe"}[kind]),
    )
    facts = gather(output, source)
    written, weights = tensors_in(output), experts_apart(tensors_in(source))
    assert {module.name for module in facts.modules} == {
        name.removesuffix(".weight_packed") for name in written if name.endswith("_packed")
    }
    for module in facts.modules:
        weight = weights[f"{module.name}.weight"].float()
        error = weight - reference_values(module.name, written)
        assert module.snr == pytest.approx(10 * math.log10(weight.square().sum() / error.square().sum()), abs=1e-3)
        assert module.largest == weight.abs().max().item()
        assert module.weight_amax == pytest.approx(
            2688 / written[f"{module.name}.weight_global_scale"].item(), rel=1e-6
        )
        assert module.input_amax == pytest.approx(2688 / written[f"{module.name}.input_global_scale"].item(), rel=1e-6)
        assert module.shape == tuple(weight.shape)
    assert [module.name for module in facts.saturated] == [SATURATED]
    assert facts.saturated[0].saturation == pytest.approx(2.0, rel=1e-6)
    assert facts.before == sum(tensor.nbytes for tensor in weights.values())
    assert facts.after == sum(tensor.nbytes for tensor in written.values())
    others = [name for name, tensor in weights.items() if tensor.ndim == 2 and "_proj" not in name]
    assert sum(facts.left.values()) == len(others)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_page(request: pytest.FixtureRequest, kind: str) -> None:
    output, source = (
        request.getfixturevalue(kind),
        request.getfixturevalue({"dense": "qwen3", "moe": "qwen3_moe"}[kind]),
    )
    facts = gather(output, source)
    page = page_of(facts)
    for text in (
        f"{len(facts.modules)}modules quantized",
        "1tensors with weights beyond their amax",
        "model.layers.0.self_attn.q_proj.input_quantizer._amax 2 4 2",
        "model.layers.0.self_attn.k_proj.weight_quantizer._amax the weights",
        "python a.py <b>",
        SATURATED,
    ):
        assert re.sub(r"\s", "", text) in re.sub(r"\s", "", page.text), text
    assert ("By layer and expert" in page.text) == (kind == "moe")
    if kind == "moe":
        assert re.search(rf"{re.escape(FAR)}\s*input\s*40\s*10\.00", page.text)
        # weight amax: gate and up share theirs, down has its own; inputs: gate and up, down; SNR and two by projection
        assert page.tags.count("svg") == 3 + 4


def test_static_fp8(qwen3: Path, tmp_path: Path) -> None:
    """Scales of FP8 are multipliers, which a fused group shares."""
    state = state_of(tensors_in(qwen3))
    fp8 = QuantState(state.amax, dict.fromkeys(state.formats, "fp8"), state.missing)
    model_free_ptq(qwen3, tmp_path / "out", "fp8", quant_state=fp8, missing_amax="from_weights")
    facts, written = gather(tmp_path / "out", qwen3), tensors_in(tmp_path / "out")
    for module in facts.modules:
        assert module.weight_amax == pytest.approx(448 * written[f"{module.name}.weight_scale"].item(), rel=1e-6)
        assert module.input_amax == pytest.approx(448 * written[f"{module.name}.input_scale"].item(), rel=1e-6)
    assert [module.name for module in facts.saturated] == [SATURATED]


def test_without_a_reference_it_says_what_is_not_known(dense: Path, tmp_path: Path) -> None:
    page = page_of(gather(dense))
    assert "Not measured: give reference=HF_DIR" in page.text
    assert "mean SNR in dB" not in page.text
    (dense / "amaxbridge.json").rename(tmp_path / "kept.json")
    try:
        facts = gather(dense)
        assert report_json(facts)["amax"]["known"] is False
        assert "neither amaxbridge.json nor quant_state.safetensors" in page_of(facts).text
    finally:
        (tmp_path / "kept.json").rename(dense / "amaxbridge.json")


def test_a_quantizer_state_stands_for_the_notes(dense: Path, qwen3: Path, tmp_path: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    file = tmp_path / "state.safetensors"
    file.write_bytes(quant_state_bytes(state_of(tensors_in(qwen3)), ModelIdentity.of(config)))
    facts = replace(gather(dense, quant_state=file), conversion={})
    notes = report_json(facts)["amax"]
    assert [each["ratio"] for each in notes["divergent"]] == [2.0]
    assert notes["missing"] == [{"name": "model.layers.0.self_attn.k_proj.weight_quantizer._amax", "filled": None}]


@pytest.mark.parametrize("scheme", ["fp8_dynamic", "mxfp4", "w4a16", "none"])
def test_every_format_has_a_page(qwen3_wide: Path, tmp_path: Path, scheme: str) -> None:
    model_free_ptq(qwen3_wide, tmp_path / "out", scheme)
    facts = gather(tmp_path / "out", qwen3_wide)
    page_of(facts)
    assert {module.scheme for module in facts.modules} == ({scheme} if scheme != "none" else set())
    low = {"fp8_dynamic": 28.0, "mxfp4": 14.0, "w4a16": 14.0}
    assert all(low[scheme] < (module.snr or 0) < 40 for module in facts.modules)
    assert not facts.saturated, "each block has its own scale"


@pytest.fixture(scope="module")
def qwen3_wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two modules whose inputs divide by a group of 128."""
    from safetensors.torch import save_file

    directory = tmp_path_factory.mktemp("wide")
    names = ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight")
    generator = torch.Generator().manual_seed(3)
    save_file(
        {name: torch.randn(32, 256, generator=generator).bfloat16() for name in names}, directory / "model.safetensors"
    )
    (directory / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    return directory


def test_why_it_would_not_serve(dense: Path, qwen3: Path, tmp_path: Path) -> None:
    """One of three fused modules lacks its input scale, and some sizes cut blocks of 16."""
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    shutil.copytree(dense, broken)
    tensors = tensors_in(dense)
    tensors["model.layers.0.self_attn.v_proj.input_global_scale"] *= 2
    save_file(tensors, broken / "model.safetensors")
    page = page_of(gather(broken))
    assert re.search(r"Would it serve No\.", page.text)
    assert "q_proj 672, k_proj 672, v_proj 1344" in page.text
    assert re.search(r"Would it serve Yes", page_of(gather(dense)).text)
    shards = {size: 96 // size for size in (1, 2, 4, 8, 16)}  # inputs of down_proj
    assert all(shards[size] % 16 == 0 for size in (1, 2))
    serving = json.loads(json.dumps(report_json(gather(dense))["serving"]))
    assert {each["size"]: each["serves"] for each in serving["parallel"]} == {
        size: width % 16 == 0 and 4 % size == 0 for size, width in shards.items()
    }
    assert "tensor parallel 1 ✓ 2 ✓ 4 ✗ 8 ✗ 16 ✗" in page.text


def test_written_beside_the_checkpoint(dense: Path, qwen3: Path, tmp_path: Path) -> None:
    facts = write_report(dense, reference=qwen3, output=tmp_path / "here")
    found: dict[str, Any] = json.loads((tmp_path / "here" / "report.json").read_text())
    assert found["bytes"] == {"before": facts.before, "after": facts.after}
    assert found["saturated"] == [SATURATED]
    assert len(found["modules"]) == len(facts.modules)
    assert "NaN" not in (tmp_path / "here" / "report.json").read_text()
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["report.html", "report.json"]


def test_the_command(
    dense: Path, qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from amaxbridge import cli
    from amaxbridge.scripts.report import report

    words = (f"input={dense}", f"reference={qwen3}", f"output={tmp_path / 'out'}")
    monkeypatch.setattr("sys.argv", ["report.py", *words])
    with pytest.raises(SystemExit) as stop:
        cli.run("report", report)
    assert not stop.value.code
    assert (tmp_path / "out" / "report.json").is_file()
    assert "report.html" in capsys.readouterr().out


def test_what_cannot_be_reported_on(dense: Path, qwen3_moe: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        gather(tmp_path)
    with pytest.raises(UsageError, match=r"none is not there: give a directory"):
        gather(dense, tmp_path / "none")
    with pytest.raises(UsageError, match="no such file"):
        gather(dense, quant_state=tmp_path / "none")


def test_a_map_of_a_large_model_is_small() -> None:
    """94 layers of 128 experts: every cell once, in its colour, and far below a rectangle each."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(94, 128, generator=generator) + 0.01
    cells: dict[tuple[int, int], float | None] = {
        (row, col): values[row, col].item() for row in range(94) for col in range(128)
    }
    cells[3, 7] = None
    names = [str(number) for number in range(128)]
    found = heat_map("t", cells, names[:94], names, logarithmic=True)
    assert found is not None
    assert len(found.paths) < 150_000
    assert (found.missing, found.rows, found.columns, found.height) == (1, ("0", "93"), ("0", "127"), 94 * 5)
    drawn: dict[tuple[int, int], str] = {}
    for level, path in re.findall(r'<path class="(\w+)" d="([^"]*)"', found.paths):
        for column, row, count in re.findall(r"M(\d+) (\d+)\.5h(\d+)", path):
            for at in range(int(column), int(column) + int(count)):
                assert drawn.setdefault((int(row), at), level) == level
    assert drawn.keys() == cells.keys()
    assert drawn[3, 7] == "none"
    assert drawn[divmod(int(values.argmin()), 128)] == "l0"
    assert drawn[divmod(int(values.argmax()), 128)] == "l9"


@pytest.mark.parametrize(
    ("values", "logarithmic", "colours"),
    [
        ((20.41, 20.45), False, 1),
        ((20.0, 20.3, 20.49), False, 1),
        ((20.0, 21.0), False, 2),
        ((18.0, 20.0, 24.0), False, 3),
        ((1.0, 1.05), True, 1),
        ((1.0, 4.0, 16.0), True, 3),
    ],
)
def test_colours_do_not_exaggerate(values: tuple[float, ...], logarithmic: bool, colours: int) -> None:
    """What differs by less than 0.5 dB, or 10 %, has one colour; the scale says where it ends."""
    cells: dict[tuple[int, int], float | None] = {(0, at): value for at, value in enumerate(values)}
    found = heat_map("t", cells, ["q"], [str(at) for at in range(len(values))], logarithmic=logarithmic)
    assert found is not None
    assert len(re.findall("<path", found.paths)) == colours
    assert (found.ends is None) == (colours == 1)
    assert found.ends is None or (found.ends[0] <= min(values) and found.ends[1] >= max(values))


@pytest.mark.parametrize("scheme", ["nvfp4a16", "fp8_block", "mxfp4a16"])
def test_no_alarm_where_nothing_is_wrong(scheme: str, tmp_path: Path) -> None:
    """Scales of the weights alone: their largest values have every mantissa of bf16, and each is in range."""
    tensors = dense_model(layers=32)
    projections = [name for name in tensors if "_proj" in name]
    assert len(projections) == 7 * 32
    for number, name in enumerate(projections):
        tensors[name][0, 0] = 8 * (1 + number % 128 / 128)
    config = {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 32}
    source = write_checkpoint(tmp_path / "source", tensors, config=config)
    model_free_ptq(source, tmp_path / "out", scheme)
    facts = gather(tmp_path / "out", source)
    assert len(facts.modules) == 7 * 32
    assert facts.saturated == []
    assert "alibrate" not in page_of(facts).text


def test_figures_are_those_of_verify(moe: Path, qwen3_moe: Path) -> None:
    serving = verify(moe, reference=qwen3_moe)
    told = {each.projection: (each.mean_snr, each.worst.snr, each.modules) for each in serving.projections}
    found = report_json(gather(moe, qwen3_moe))["snr"]
    assert len(found) == 7
    assert {row["projection"]: (row["mean_db"], row["worst_db"], row["modules"]) for row in found} == told


def test_each_engine_has_a_verdict(dense: Path) -> None:
    facts = gather(dense)
    text = page_of(facts).text
    assert len(facts.serving.verdicts) == 4
    for verdict in facts.serving.verdicts:
        assert re.search(rf"{re.escape(verdict.name)}\s*{'yes' if verdict.serves else 'no'}", text)


@pytest.mark.parametrize(
    ("module", "projection", "layer", "expert", "part"),
    [
        ("model.layers.12.mlp.experts.7.up_proj", "mlp.experts.*.up_proj", 12, 7, "routed experts"),
        ("model.layers.3.block_sparse_moe.experts.1.w1", "block_sparse_moe.experts.*.w1", 3, 1, "routed experts"),
        ("model.layers.3.mlp.shared_experts.up_proj", "mlp.shared_experts.up_proj", 3, None, "MLP"),
        ("model.layers.3.mlp.gate", "mlp.gate", 3, None, "routers"),
        ("model.layers.3.self_attn.q_proj", "self_attn.q_proj", 3, None, "attention"),
        ("backbone.layers.4.mixer.in_proj", "mixer.in_proj", 4, None, "state-space mixers"),
        ("lm_head", "lm_head", None, None, "embeddings and head"),
        ("model.norm", "model.norm", None, None, "norms and the rest"),
    ],
)
def test_places(module: str, projection: str, layer: int | None, expert: int | None, part: str) -> None:
    place = place_of(module)
    assert (place.projection, place.layer, place.expert, place.part) == (projection, layer, expert, part)
