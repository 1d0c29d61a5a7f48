"""The options of every command, the errors for wrong ones, and the config groups as recipes."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from amaxbridge import cli
from amaxbridge.configs.options import choices_of, options_of
from amaxbridge.configs.schema import COMMANDS, SchemeConfig, SchemeGroupConfig, register
from amaxbridge.export.schemes import SCHEMES, Groups, from_quantizers, named_scheme
from amaxbridge.mappings.errors import UsageError
from amaxbridge.scripts.recipes import recipe_of
from tests.support.paths import GOLDEN, ROOT

OPTION_LIST = GOLDEN / "options.txt"


def composed(command: str, *words: str) -> Any:
    """The options that a command gets from a command line."""
    register()
    with initialize_config_dir(str(cli.CONFIGS), version_base="1.3"):
        return compose(command, list(words))


def recipe(*words: str) -> Any:
    options = composed("quantize", *words)
    return recipe_of(OmegaConf.to_object(options.scheme))


def all_options() -> str:
    """Each command with its options, their types and values, as text."""
    lines = []
    for command, schema in COMMANDS.items():
        values = composed(command)
        lines += [f"{command}:"]
        for name, field in options_of(schema):
            kind = field.type.__name__ if type(field.type) is type else str(field.type)
            value = f"one of {' '.join(choices_of(name))}" if choices_of(name) else None
            node = OmegaConf.select(values, name, throw_on_missing=False)
            if value is None:
                value = "required" if OmegaConf.is_missing(values, name) else f"{kind} = {node}"
            lines += [f"  {name}: {value}"]
    return "\n".join(lines) + "\n"


def test_the_options_stay() -> None:
    """Users' scripts rely on the options. Whoever changes one on purpose changes the golden file too."""
    assert all_options() == OPTION_LIST.read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_every_option_means(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed, _ = run(monkeypatch, capsys, command, "--help")
    assert status == 0
    text = " ".join(printed.split())
    for name, field in options_of(COMMANDS[command]):
        assert f" {name} {field.metadata['help']}" in text, name
        assert all(choice in text for choice in choices_of(name))
    assert "Hydra" not in printed


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("chekpoint=x", "Unknown option chekpoint=. Did you mean checkpoint=?"),
        ("io.overwrit=true", "Unknown option io.overwrit=. Did you mean io.overwrite=?"),
        ("tp=2", "Unknown option tp=. Did you mean parallel.tp=?"),
        ("parallel.zz=1", "Unknown option parallel.zz=. --help"),
        ("io.overwrite=perhaps", "io.overwrite=: Value 'perhaps' is not a valid bool"),
        ("parallel.tp=two", "parallel.tp=: Value 'two'"),
        ("scheme=nvfp5", "Unknown scheme=nvfp5. Use one of auto, experts_nvfp4"),
        ("amax=guess", "group_max"),
        ("scheme.groups=[{shceme: fp8}]", "Unknown option shceme=. Did you mean scheme=?"),
        ("scheme.groups=3", "scheme.groups= is a list"),
        ("overwrite", "overwrite is not name=value"),
        ("ignore=[a=b]", "A list has brackets"),
        ("json=${nothing}", "json=: Interpolation key 'nothing' not found"),
        ("~nothing", "Could not delete from config"),
    ],
)
def test_wrong_options_end_with_2_and_a_message(
    word: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, message = run(monkeypatch, capsys, "export", "checkpoint=a", "hf=b", "output=c", word)
    assert status == 2
    assert said in message
    assert "Traceback" not in message
    assert "hydra" not in message.lower()


@pytest.mark.parametrize(("text", "said"), [("a: [", "Not YAML"), ("shcem: 3", "Unknown option scheme.shcem=")])
def test_a_choice_of_the_user_s_own_that_is_none(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its flag may stand between options."""
    (tmp_path / "scheme").mkdir()
    (tmp_path / "scheme" / "mine.yaml").write_text(text)
    status, _, message = run(monkeypatch, capsys, "export", "hf=b", "--config-dir", str(tmp_path), "scheme=mine")
    assert status == 2
    assert said in message


@pytest.mark.parametrize("command", [name for name in COMMANDS if (ROOT / "scripts" / f"{name}.py").exists()])
def test_help_waits_for_no_torch(command: str) -> None:
    code = (
        "import runpy, sys\n"
        "sys.modules['torch'] = None\n"
        f"sys.argv = ['{command}.py', '--help']\n"
        f"runpy.run_path('scripts/{command}.py', run_name='__main__')\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert "Options, each as name=value" in printed


def test_one_rank_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """torchrun's ranks share one terminal, so one speaks for all; a rank that was started alone has its own."""
    monkeypatch.setenv("RANK", "3")
    assert "chekpoint" in run(monkeypatch, capsys, "export", "chekpoint=x")[2]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert run(monkeypatch, capsys, "export", "chekpoint=x") == (2, "", "")


class TestSchemes:
    """The config group `scheme`."""

    def test_a_choice_for_every_scheme(self) -> None:
        assert set(choices_of("scheme")) == {*SCHEMES, "auto", "none", "experts_nvfp4"}

    @pytest.mark.parametrize("name", SCHEMES)
    def test_one_scheme_for_everything(self, name: str) -> None:
        assert recipe(f"scheme={name}") == Groups.of(SCHEMES[name])

    def test_no_scheme_and_that_of_the_quantizers(self) -> None:
        assert recipe("scheme=none") is None
        assert recipe("scheme=auto") == from_quantizers()

    def test_a_mixed_recipe(self) -> None:
        mixed = recipe("scheme=experts_nvfp4", "scheme.ignore=[lm_head]")
        names = ("model.layers.0.mlp.experts.11.up_proj", "model.layers.0.self_attn.q_proj", "lm_head")
        found = [mixed.scheme_of(name, None) for name in names]
        assert found == [SCHEMES["nvfp4"], SCHEMES["fp8"], None]
        assert mixed.ignore == ("lm_head",)

    def test_a_recipe_on_the_command_line(self) -> None:
        mixed = recipe("scheme.groups=[{scheme: w4a16, targets: ['re:.*mlp'], group_size: 32}, {scheme: fp8}]")
        assert mixed.scheme_of("model.layers.0.mlp.up_proj", None).format == "int4 group_size=32"
        assert mixed.name == "w4a16+fp8"

    @pytest.mark.parametrize("size", [32, 64, 128])
    @pytest.mark.parametrize("name", ["w4a16", "w4a16_asym"])
    def test_a_group_size(self, name: str, size: int) -> None:
        assert recipe(f"scheme={name}", f"scheme.group_size={size}") == Groups.of(named_scheme(name, size))

    def test_scales(self) -> None:
        assert recipe("scheme=fp8_block", "scheme.scales=ue8m0") == Groups.of(named_scheme("fp8_block", scales="ue8m0"))
        groups = "[{scheme: w4a16, targets: ['re:.*experts']}, {scheme: fp8_block, scales: ue8m0}]"
        mixed = recipe(f"scheme.groups={groups}", "scheme.group_size=64")
        assert [(group.scheme.scales, group.scheme.blocks.width) for group in mixed.groups] == [
            ("", 64),
            ("ue8m0", 128),
        ]
        with pytest.raises(UsageError, match=r"scheme\.scales=ue8m0 is for fp8_block, and no group"):
            recipe("scheme=fp8", "scheme.scales=ue8m0")

    def test_a_group_size_is_for_groups_that_have_none(self) -> None:
        groups = (
            "[{scheme: w4a16, targets: ['re:.*q_proj'], group_size: 32}, {scheme: fp8, targets: [o]}, {scheme: w4a16}]"
        )
        mixed = recipe(f"scheme.groups={groups}", "scheme.group_size=64")
        assert [group.scheme for group in mixed.groups] == [
            named_scheme("w4a16", 32), SCHEMES["fp8"], named_scheme("w4a16", 64)
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["scheme=nvfp4a16"], "scheme.group_size=64 is for w4a16, w4a16_asym"),
            (["scheme=none"], "scheme.group_size=64 is for w4a16, w4a16_asym"),
            (["scheme.groups=[{scheme: w4a16, group_size: 32}]"], "without a group_size of its own"),
            (["scheme=auto"], "takes no scheme.group_size: the quantizers decide all schemes"),
        ],
    )
    def test_a_group_size_that_nothing_takes(self, words: list[str], said: str) -> None:
        with pytest.raises(UsageError, match=said):
            recipe(*words, "scheme.group_size=64")

    def test_a_recipe_of_ones_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "scheme").mkdir()
        (tmp_path / "scheme" / "mine.yaml").write_text("groups: [{scheme: mxfp8}]\nignore: ['re:.*down_proj']\n")
        words = ("--config-dir", str(tmp_path), "scheme=mine", "--cfg", "job")
        status, printed, _ = run(monkeypatch, capsys, "quantize", *words)
        assert status == 0
        assert "re:.*down_proj" in printed

    def test_sizes_that_no_scheme_has(self) -> None:
        with pytest.raises(UsageError, match="group_size is for w4a16, w4a16_asym"):
            recipe_of(SchemeConfig(groups=[SchemeGroupConfig("nvfp4", group_size=32)]))
        for size in (0, -1, 16, 48, 256):
            with pytest.raises(UsageError, match=rf"group_size={size}: engines have kernels .* 32, 64, 128 columns"):
                recipe_of(SchemeConfig(groups=[SchemeGroupConfig("w4a16")], group_size=size))
        with pytest.raises(UsageError, match="unknown scheme 'fp7'"):
            recipe_of(SchemeConfig(groups=[SchemeGroupConfig("fp7")]))
        with pytest.raises(UsageError, match=r"takes no scheme\.groups"):
            recipe_of(SchemeConfig(groups=[SchemeGroupConfig("fp8")], from_quantizers=True))


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, *words: str
) -> tuple[int, str, str]:
    """Runs a command line in this process, up to the options: its exit status and what it printed."""
    monkeypatch.setattr(sys, "argv", [f"{command}.py", *words])
    status: Any = 0
    try:
        cli.run(command, dataclasses.asdict)
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    return int(status or 0), printed.out, printed.err


if __name__ == "__main__":  # writes the golden file anew
    OPTION_LIST.write_text(all_options())
