"""The distribution: nothing is missing from it, nothing is required without use, and what is installed works from
another folder."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
import yaml

from tests.support.runs import curve, make_shards
from tests.support.tiny_models import tiny_captions, tiny_config, tiny_tokenizer

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
IMPORTED_AS = {"huggingface-hub": "huggingface_hub", "pillow": "PIL", "PyYAML": "yaml"}
NEEDED_BY_OTHERS = {"sentencepiece", "tensorboard"}  # transformers for SigLIP's tokenizers; accelerate for its tracker
WITH_TORCH = {"triton"}  # of its CUDA builds; looked for before it is imported


def names(requirements: list[str]) -> set[str]:
    found = {re.split(r"[<>=\[ ]", requirement)[0] for requirement in requirements}
    return {IMPORTED_AS.get(name, name) for name in found}


def imported() -> set[str]:
    found: set[str] = set()
    for package in ("trainer", "data_tools"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"trainer", "data_tools"}


def test_what_is_imported_is_required_and_what_is_required_is_imported() -> None:
    required, extras = names(PROJECT["project"]["dependencies"]), PROJECT["project"]["optional-dependencies"]
    optional = {name for extra, found in extras.items() if extra != "test" for name in names(found)}
    assert imported() - optional - WITH_TORCH == required - NEEDED_BY_OTHERS


def test_requirements_txt_pins_all_of_pyproject() -> None:
    pins = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"], *PROJECT["build-system"]["requires"]]
    assert names(wanted) <= names(pins)


def test_every_package_is_in_the_wheel() -> None:
    mapped = {folder: name for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}
    found = {path.parent for top in ("trainer", "data_tools") for path in (ROOT / top).rglob("*.py")}
    found |= {
        path.parent
        for path in (ROOT / "trainer/recipes", ROOT / "ds_configs", ROOT / "launch")
        for path in path.rglob("*")
    }
    dotted = set()
    for folder in found:
        parts = folder.relative_to(ROOT)
        moved = next((place for place in [parts, *parts.parents] if str(place) in mapped), None)
        dotted.add(".".join([mapped[str(moved)], *parts.relative_to(moved).parts] if moved else parts.parts))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == dotted


def test_what_the_pages_are_made_of_is_in_the_wheel() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for path in (ROOT / "trainer").rglob("*"):
        if path.suffix in (".css", ".html", ".js"):
            assert f"*{path.suffix}" in data[".".join(path.parent.relative_to(ROOT).parts)], path


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel made from the sdist of this tree; everything else comes
    from the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("packaging")
    tree = folder / "tree"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in tracked:
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    build(tree, "sdist", folder / "sdist")
    [sdist] = (folder / "sdist").iterdir()
    shutil.unpack_archive(sdist, folder / "unpacked", filter="data")
    [unpacked] = (folder / "unpacked").iterdir()
    build(unpacked, "wheel", folder / "wheel")
    [wheel] = (folder / "wheel").iterdir()
    venv.create(folder / "venv", symlinks=True)
    site = sysconfig.get_path("purelib", vars={"base": str(folder / "venv"), "platbase": str(folder / "venv")})
    # Found after what lies in this environment; its .pth files (an editable RingLIP) are not read.
    Path(site, "rest.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "venv" / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": ""})
    return python.parent


def build(tree: Path, kind: str, out: Path) -> None:
    """What `python -m build` does in an environment that has the backend already."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, out], cwd=tree, check=True, capture_output=True)


def ringlip(installed: Path, folder: Path, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [installed / "ringlip", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_installed_package_shards_trains_and_plans_in_another_folder(installed: Path, tmp_path: Path) -> None:
    make_shards(tmp_path / "pairs", tiny_captions(24))
    shutil.rmtree(tmp_path / "pairs" / "shards")
    columns = ["--image", "image", "--caption", "caption", "--processes", "1", "--quiet"]
    ringlip(installed, tmp_path, "shard", "pairs/pairs.csv", "shards", *columns)
    tree = {
        "run": {"directory": "run", "samples": 16},
        "model": {"config": tiny_config(), "tokenizer": tiny_tokenizer()},
        "data": {"train": "shards", "workers": 0},
        "batch": {"size": 8},
        "engine": {"ds_config": "zero1"},
        "log": {"every": 1, "trackers": "none"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    ringlip(installed, tmp_path, "train", "recipe.yaml")
    assert [point[0] for point in curve(tmp_path / "run")] == [8, 16]
    table = ringlip(installed, tmp_path, "plan", "recipe.yaml", "--gpu-memory", "8GiB")
    configs = {path.stem for path in (ROOT / "ds_configs").glob("*.json")}
    assert configs <= set(re.findall(r"^[* ](\w+) ", table, re.MULTILINE)), table


def test_an_installed_package_is_all_there(installed: Path, tmp_path: Path) -> None:
    out = ringlip(installed, tmp_path, "--help")
    site = installed.parent / "lib"
    for line in ("Recipes", "ds_configs", "Launch scripts"):
        [place] = re.findall(rf"^{line}: (.*)$", out, re.MULTILINE)
        assert Path(place).is_relative_to(site) and any(Path(place).iterdir())
    assert "--hostfile F" in ringlip(installed, tmp_path, "launch", "--help")
    code = "import sys, ringlip, trainer; print(ringlip.__version__ == trainer.__version__, 'torch' in sys.modules)"
    found = subprocess.run([installed / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout == "True False\n"
