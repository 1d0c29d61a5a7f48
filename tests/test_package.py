"""What pip installs: one import name, with all its files, beside projects that use the same words for their own."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.support.checkpoints import dense_model, tensors_of, write_checkpoint
from tests.support.paths import ROOT

ROOMS = ("bridge", "configs", "export", "mappings", "scripts")
DATA = {".json", ".yaml", ".css", ".jinja", ".txt", ".typed"}
HEAVY = {"torch", "hydra", "omegaconf", "numpy", "numba", "transformers", "megatron", "modelopt"}


def package_files() -> set[str]:
    """Every module and data file that an installation must have, as `amaxbridge/…`."""
    own = {path for path in (ROOT / "amaxbridge").iterdir() if path.is_file()}
    files = own.union(*((ROOT / room).rglob("*") for room in ROOMS))
    wanted = {path for path in files if path.suffix in {".py", *DATA}}
    names = {path.relative_to(ROOT).as_posix() for path in wanted}
    return {name if name.startswith("amaxbridge/") else f"amaxbridge/{name}" for name in names}


@dataclass(frozen=True)
class Environment:
    """A fresh virtual environment, which finds what we depend on in ours, but not ourselves."""

    path: Path

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return next((self.path / "lib").glob("python3*/site-packages"))

    def install(self, *words: object) -> None:
        run(
            sys.executable,
            "-m",
            "uv",
            "pip",
            "install",
            "-q",
            "--offline",
            "--no-deps",
            "--compile-bytecode",
            "--python",
            self.python,
            *words,
        )


def run(*command: object, cwd: Path | None = None) -> str:
    """Runs a command without our folder on its path, and returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def fresh_environment(path: Path) -> Environment:
    run(sys.executable, "-m", "uv", "venv", "-q", "--python", sys.executable, path)
    made = Environment(path)
    # A .pth file found through another one is not read, so our own editable installation stays out of sight.
    (made.site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, because setuptools leaves folders beside what it builds."""
    copy = tmp_path_factory.mktemp("source") / "repository"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "tests", "build", "dist", "demo-output")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=unwanted)
    return copy


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and with the wheel that was built from the sdist."""
    folder = tmp_path_factory.mktemp("built")
    words = ("--quiet", "--offline", "--no-build-isolation", "--python", sys.executable)
    run(sys.executable, "-m", "uv", "build", *words, "--out-dir", folder, source)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("amaxbridge-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with nothing but the wheel."""
    environment = fresh_environment(tmp_path_factory.mktemp("installed") / "venv")
    environment.install(wheel)
    return environment


class TestWheel:
    def test_top_level_names(self, wheel: Path) -> None:
        names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
        version = wheel.name.split("-")[1]
        assert names == {"amaxbridge", f"amaxbridge-{version}.dist-info"}

    def test_files(self, wheel: Path) -> None:
        held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("amaxbridge/")}
        wanted = package_files()
        assert {Path(name).suffix for name in wanted} == {".py", *DATA}
        assert held == wanted

    def test_the_sdist_holds_them_too(self, built: Path) -> None:
        (sdist,) = built.glob("amaxbridge-*.tar.gz")
        with tarfile.open(sdist) as archive:
            held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
        assert package_files() <= held
        assert {"pyproject.toml", "README.md", "LICENSE"} <= held

    def test_installed_files_are_no_links(self, installed: Environment) -> None:
        """In the repository the rooms are links inside `amaxbridge`."""
        assert (ROOT / "amaxbridge" / "export").is_symlink()
        paths = list((installed.site_packages / "amaxbridge").rglob("*"))
        assert len(paths) > len(package_files())  # and folders
        assert not [path for path in paths if path.is_symlink()]

    def test_the_environment_has_one_name_of_ours(self, installed: Environment) -> None:
        held = {path.name.partition("-")[0] for path in installed.site_packages.iterdir() if "amaxbridge" in path.name}
        assert held == {"amaxbridge"}
        for room in ROOMS:
            assert not (installed.site_packages / room).exists()

    def test_the_version(self, installed: Environment, wheel: Path) -> None:
        elsewhere = installed.path  # in the checkout, Python would find the checkout
        printed = run(installed.path / "bin" / "amaxbridge", "--version", cwd=elsewhere).strip()
        assert printed == run(installed.python, "-m", "amaxbridge", "--version", cwd=elsewhere).strip()
        code = "import amaxbridge; print(amaxbridge.__version__)"
        assert printed == run(installed.python, "-c", code, cwd=elsewhere).strip()
        assert wheel.name.split("-")[1] == printed


def test_an_editable_installation(source: Path, tmp_path: Path) -> None:
    environment = fresh_environment(tmp_path / "venv")
    environment.install("--no-build-isolation", "--editable", source)
    code = "import amaxbridge.export.disk.staging, amaxbridge.scripts as s; print(s.__file__)"
    file = Path(run(environment.python, "-c", code, cwd=tmp_path).strip())
    assert file.resolve() == (source / "scripts" / "__init__.py").resolve()
    assert "usage: amaxbridge" in run(environment.path / "bin" / "amaxbridge", "--help", cwd=tmp_path)


OURS = "import amaxbridge.configs.options, amaxbridge.export.schemes, amaxbridge.mappings, amaxbridge.scripts.tables\n"
PROJECTS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "nanochat": (
        {
            "scripts/base_train.py": f"from nanochat import gpt\n{OURS}print(gpt.NAME)",
            "nanochat/gpt.py": "NAME = 'own'",
        },
        ("-m", "scripts.base_train"),
    ),
    "torchtitan": (
        {
            "scripts/download_hf_assets.py": "NAME = 'own'",
            "tests/assets.py": f"from scripts.download_hf_assets import NAME\n{OURS}print(NAME)",
        },
        ("-m", "tests.assets"),
    ),
    "configs without __init__": (
        {"configs/mine.py": "NAME = 'own'", "train.py": f"{OURS}from configs.mine import NAME\nprint(NAME)"},
        ("train.py",),
    ),
    "modules": (
        {
            **{f"{name}.py": "NAME = 'own'" for name in ROOMS},
            "train.py": f"import {', '.join(ROOMS)}\n{OURS}print(*{{{', '.join(f'{name}.NAME' for name in ROOMS)}}})",
        },
        ("train.py",),
    ),
}
"""Projects that have the words for themselves: their files, and what runs them."""


@pytest.mark.parametrize("name", PROJECTS)
def test_beside_a_project_with_the_same_words(name: str, installed: Environment, tmp_path: Path) -> None:
    """The project finds its own modules although we are installed, and we find ours although they are there."""
    files, words = PROJECTS[name]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert run(installed.python, *words, cwd=tmp_path) == "own\n"
    words = (installed.path / "bin" / "amaxbridge",) if "configs" in name else (installed.python, "-m", "amaxbridge")
    assert "scheme=" in run(*words, "quantize", "--help", cwd=tmp_path)


def test_the_installed_command_quantizes(installed: Environment, tmp_path: Path) -> None:
    """It works in a folder whose modules have our rooms' names, and whose `configs` has a scheme of our name."""
    for name in ROOMS:
        (tmp_path / f"{name}.py").write_text("raise ImportError('of the user')")
    (tmp_path / "configs" / "scheme").mkdir(parents=True)
    (tmp_path / "configs" / "scheme" / "mxfp4.yaml").write_text("not: ours")
    write_checkpoint(tmp_path / "in", dense_model(layers=1))
    run(installed.path / "bin" / "amaxbridge", "quantize", "input=in", "output=out", "scheme=mxfp4", cwd=tmp_path)
    assert sum(name.endswith(".weight_packed") for name in tensors_of(tmp_path / "out")) == 7


def test_help_loads_nothing_heavy() -> None:
    """Help answers at once: the list of commands imports the standard library only, a command's options no torch."""
    code = (
        "import sys; from amaxbridge.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "print(*sys.modules, sep='\\n', file=sys.stderr)"
    )

    def loaded(*words: str) -> set[str]:
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
        assert "amaxbridge" in done.stdout
        modules = {line.partition(".")[0] for line in done.stderr.splitlines()}
        assert "amaxbridge" in modules
        return modules & HEAVY

    assert loaded("--help") == set()
    assert loaded("export", "--help") <= {"hydra", "omegaconf"}


def unread(*words: str) -> tuple[int, str]:
    """Exit status and standard error of Python whose standard output is a pipe that was closed at the other end."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run([sys.executable, *words], stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("export", "--help")], ids=" ".join)
def test_a_command_whose_output_is_not_read(words: tuple[str, ...]) -> None:
    """`amaxbridge --help | head -1` ended with a traceback."""
    assert unread("-m", "amaxbridge", *words) == (1, "")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_output_that_is_not_read(lines: int) -> None:
    """Few lines meet the closed pipe when they are flushed, many when they are printed. Errors of other pipes stay."""
    code = (
        "from amaxbridge.closed_pipe import quiet_on_closed_pipe\n"
        "with quiet_on_closed_pipe():\n"
        f"    for line in range({lines}): print(line)\n"
    )
    assert unread("-c", code) == (1, "")
    code += "    raise BrokenPipeError('of a worker')"
    read = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (read.returncode, read.stderr.splitlines()[-1]) == (1, "BrokenPipeError: of a worker")


ASSIGNS = (ast.Assign, ast.AnnAssign)
PACKAGES = sorted(
    str(path.parent.relative_to(ROOT)).replace("/", ".")
    for room in ROOMS
    for path in (ROOT / room).rglob("__init__.py")
)


@cache
def importers() -> dict[str, set[str]]:
    """Package → every name that a file of the repository imports from its `__init__`."""
    found: dict[str, set[str]] = {}
    folders = (*ROOMS, "amaxbridge", "tests", "benchmarks", "examples")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("amaxbridge"):
                found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return found


def sub_modules(package: str) -> set[str]:
    folder = ROOT / package.removeprefix("amaxbridge").lstrip(".").replace(".", "/")
    return {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


@pytest.mark.parametrize("name", PACKAGES)
def test_all_lists_what_a_package_is_for(name: str) -> None:
    """Both ways: what `__all__` lists is there, and what is defined there or imported from there is listed.

    What an `__init__` imports for its own use is no part of the package; mypy refuses to import it from there.
    """
    package = importlib.import_module(f"amaxbridge.{name}")
    listed = getattr(package, "__all__", [])
    assert len(set(listed)) == len(listed)
    for each in listed:
        assert getattr(package, each) is not None
    defined = {
        each
        for each, value in vars(package).items()
        if not each.startswith("_") and getattr(value, "__module__", None) == package.__name__
    }
    assigned = [node for node in ast.parse(Path(str(package.__file__)).read_text()).body if isinstance(node, ASSIGNS)]
    targets = [target for node in assigned for target in getattr(node, "targets", [getattr(node, "target", None)])]
    defined |= {target.id for target in targets if isinstance(target, ast.Name) and not target.id.startswith("_")}
    used = importers().get(f"amaxbridge.{name}", set()) - sub_modules(f"amaxbridge.{name}")
    assert defined | used <= set(listed)


def test_public_names_of_the_house() -> None:
    import amaxbridge

    assert set(amaxbridge.__all__) == {"AutoBridge", "__version__", "model_free_ptq", "repair", "verify"}
    assert amaxbridge.model_free_ptq is importlib.import_module("amaxbridge.export").model_free_ptq
    assert amaxbridge.AutoBridge is importlib.import_module("amaxbridge.bridge").AutoBridge
    assert amaxbridge.verify is importlib.import_module("amaxbridge.export.verify").verify
    assert set(amaxbridge.__all__) <= set(dir(amaxbridge))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = amaxbridge.nothing


FOUNDING = {
    "export": """build_microscale_inverse_weight_maps model_free_ptq process_file process_file_microscale_scheme
        split_fused_moe_experts validate_file""",
    "mappings": """AmaxFanoutMapping AmaxMapping AutoMapping ColumnParallelMapping DirectMapping GatedMLPMapping
        MappingRegistry MegatronParamMapping MoeAmaxFanoutMapping QKVMapping ReplicatedMapping RowParallelMapping
        convert_to_amax_map""",
    "export.runtime": """CompressedTensorsConfig CompressedTensorsLinearMethod CompressedTensorsW8A8Int8Scheme
        CompressedTensorsWNA16Scheme GPTQ_MARLIN_MIN_THREAD_K GPTQ_MARLIN_MIN_THREAD_N GPTQ_MARLIN_TILE
        MARLIN_SUPPORTED_GROUP_SIZES SCALAR_TYPE_UINT4 SCALAR_TYPE_UINT4B8 get_scale_perms marlin_make_empty_g_idx
        marlin_make_workspace marlin_permute_scales replace_parameter verify_marlin_supported
        verify_marlin_supports_shape""",
    "bridge": "AutoBridge",
}


@pytest.mark.parametrize("name", FOUNDING)
def test_founding_names_stay_where_they_are(name: str) -> None:
    assert set(FOUNDING[name].split()) <= set(importlib.import_module(f"amaxbridge.{name}").__all__)
