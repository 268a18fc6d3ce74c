"""What importing costs, which part may import which, and the list of packages."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import clagrange

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

LEVELS = [
    {
        "dynamics",
        "gaussian",
        "replicas",
        "_checks",
        "_compilation",
        "_magnitudes",
        "_modes",
        "_torchvision",
        "distributed",
    },
    {"optim", "interventions", "mechanics", "metrics", "networks", "wiring"},
    {"callbacks", "strategies", "tasks"},
    {"configs", "figures", "study", "verify"},
    {"cli", "__main__"},
]
"""From the ground up: a part imports its own level and those below."""

FRAMEWORKS = {"lightning": {"callbacks"}, "pytorch_lightning": set(), "avalanche": {"strategies"}}
"""Who may import them."""


def sources() -> dict[str, Path]:
    """Every module of the package by its name after ``clagrange.``, the linked folders included."""
    found = {}
    for part, folder in [("", "clagrange"), *((f"{name}.", name) for name in ("configs", "strategies", "tasks"))]:
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            if not part and relative.parts[0] in ("configs", "strategies", "tasks"):
                continue  # a link to the folder beside
            name = part + ".".join(relative.with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def level_of(name: str) -> int:
    """The level of a module by the first part of its name after ``clagrange.``."""
    part = name.split(".")[0]
    for level, parts in enumerate(LEVELS):
        if part in parts:
            return level
    raise AssertionError(f"clagrange.{name} is in no level of this test")


def imported(path: Path, lenient: bool) -> set[str]:
    """Full names of what a file imports, with names from ``clagrange`` itself resolved.

    ``lenient`` leaves out imports inside functions and under TYPE_CHECKING.
    """
    names = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef) or (
                isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            )
            if not (lenient and inside):
                visit(child)

    visit(ast.parse(path.read_text()))
    return names


ROOT_EXPORTS = {name for name in clagrange.__all__ if not hasattr(getattr(clagrange, name), "__path__")}


@pytest.mark.parametrize("name", [name for name in sources() if name != "__init__"])
def test_imports_point_downward(name: str) -> None:
    level = level_of(name)
    for target in imported(sources()[name], lenient=name == "tasks.base"):
        package, _, rest = target.partition(".")
        if package in FRAMEWORKS:
            assert name.split(".")[0] in FRAMEWORKS[package], f"clagrange.{name} imports {target}"
        if package != "clagrange":
            continue
        if not rest or rest.split(".")[0] in ROOT_EXPORTS - set().union(*LEVELS) or rest == "__version__":
            # the package itself brings everything below callbacks
            assert level >= 2, f"clagrange.{name} imports {target}"
        else:
            assert level_of(rest) <= level, f"clagrange.{name} imports {target}, which is above it"


def test_no_linked_folder_is_imported_by_its_bare_name() -> None:
    for name, path in sources().items():
        bare = {target.split(".")[0] for target in imported(path, lenient=False)}
        assert not bare & {"configs", "strategies", "tasks"}, name


def test_importing_the_package_imports_no_framework() -> None:
    program = (
        "import sys, clagrange;"
        "heavy = 'lightning pytorch_lightning avalanche torchvision torchmetrics sklearn scipy matplotlib';"
        "lazy = 'clagrange.callbacks clagrange.strategies clagrange.study clagrange.tasks';"
        "found = {*heavy.split(), *lazy.split()} & set(sys.modules);"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_package_on_disk_is_listed() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    on_disk = {"clagrange"}
    for name, path in sources().items():
        if path.name == "__init__.py" and name != "__init__":
            on_disk.add(f"clagrange.{name}")
    assert sorted(on_disk) == sorted(listed)
    assert listed == sorted(listed)


def test_every_folder_with_modules_is_a_package() -> None:
    for name, path in sources().items():
        assert (path.parent / "__init__.py").exists(), name


def test_linked_folders_are_mapped_and_linked() -> None:
    mapping = PROJECT["tool"]["setuptools"]["package-dir"]
    assert mapping == {f"clagrange.{name}": name for name in ("configs", "strategies", "tasks")}
    for name in mapping.values():
        module = importlib.import_module(f"clagrange.{name}") if name != "strategies" else None
        if module is not None:
            assert module.__name__ == f"clagrange.{name}"
        link = ROOT / "clagrange" / name
        if link.is_symlink():
            assert link.resolve() == (ROOT / name).resolve()


def test_studies_are_shipped() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]
    assert data == {"clagrange": ["py.typed"], "clagrange.configs": ["*.yaml"]}
    assert (ROOT / "clagrange" / "py.typed").exists()
    assert list((ROOT / "configs").glob("*.yaml"))


def test_parts_that_are_imported_when_used() -> None:
    assert clagrange.tasks.PermutedDigits.__module__ == "clagrange.tasks.permuted_digits"
    with pytest.raises(AttributeError, match="module 'clagrange' has no attribute 'taskz'"):
        clagrange.taskz  # noqa: B018


def test_version_is_the_project_s() -> None:
    assert clagrange.__version__ == PROJECT["project"]["version"]


def test_everything_exported_is_there() -> None:
    for name in [name for name in sources() if name.endswith("__init__") or "." not in name]:
        if name in ("__init__", "__main__", "callbacks", "strategies"):
            continue
        module = importlib.import_module(f"clagrange.{name}")
        for export in getattr(module, "__all__", ()):
            assert hasattr(module, export), f"clagrange.{name}.{export}"
    assert all(hasattr(clagrange, export) for export in clagrange.__all__)


@pytest.mark.slow
def test_the_wheel_installs_one_name_with_all_files_and_imports_from_elsewhere(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*pip, str(tmp_path), str(source)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    code = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in code} == {"clagrange"}
    assert "clagrange/py.typed" in code
    for name, path in sources().items():
        inside = "clagrange/" + name.replace(".", "/") if name != "__init__" else "clagrange"
        suffix = "/__init__.py" if path.name == "__init__.py" else ".py"
        assert inside + suffix in code, name
    assert {Path(name).name for name in code if name.endswith(".yaml")} == {
        path.name for path in (ROOT / "configs").glob("*.yaml")
    }
    program = "import clagrange, clagrange.study.settings as s; print(clagrange.__file__); s.read_yaml('demo')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.startswith(str(tmp_path / "installed"))
