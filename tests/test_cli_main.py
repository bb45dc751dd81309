"""The command `ringlip`: what it lists, what it starts, what it completes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import __version__
from trainer.cli.completion import script
from trainer.cli.main import ALL, LAUNCHERS, launchers, main, start

ROOT = Path(__file__).parent.parent


def ringlip(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from trainer.cli.main import run; run()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_help_lists_every_command_and_loads_no_heavy_module() -> None:
    code = "import sys; from trainer.cli.main import ALL, main; main(['--help'], 'ringlip', ALL); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    listed = re.findall(r"^  (\w+) {2,}\S", out, re.MULTILINE)
    commands = {path.stem for path in (ROOT / "data_tools/commands").glob("*.py")} - {
        "arguments",
        "shard_arguments",
        "__init__",
    }
    modules = {path.stem for path in (ROOT / "trainer").glob("*.py") if "run_command" in path.read_text()}
    packages = {path.parent.name for path in (ROOT / "trainer").glob("*/__main__.py")}
    assert sorted(listed) == sorted(commands | modules | packages | {"launch", "completion"})
    assert not {"torch", "numpy", "pyarrow", "transformers"} & set(out.splitlines()[-1].split())


def test_version_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"], "ringlip", ALL) == 0
    assert capsys.readouterr().out == f"ringlip {__version__}\n"
    assert main(["exprot"], "ringlip", ALL) == 2
    assert capsys.readouterr().err == "error: ringlip: no command 'exprot'; did you mean 'export'?\n"
    assert main([], "ringlip", ALL) == 2


@pytest.mark.parametrize(
    ("command", "module"),
    [("stats", ["data_tools", "stats"]), ("cat --help", ["data_tools", "cat"]), ("report nowhere", ["trainer.report"])],
)
def test_a_command_is_its_module(command: str, module: list[str]) -> None:
    name, *arguments = command.split()
    found = ringlip(name, *arguments)
    same = subprocess.run([sys.executable, "-m", *module, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert (found.returncode, found.stdout, found.stderr) == (same.returncode, same.stdout, same.stderr)


def test_train_says_how_to_use_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert launchers(["recipe.yaml"]) == launchers(["--help"]) == LAUNCHERS
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert launchers(["recipe.yaml"]) == ""


def test_bash_completes_commands_options_keys_and_recipes() -> None:
    groups = {"Some": {"train": "trains", "report": "a page", "completion": ""}}
    text = script(["bash"], groups, start)

    def complete(*words: str) -> list[str]:
        line = f"{text}\nCOMP_WORDS=({' '.join(words)} '')\nCOMP_CWORD={len(words) - 1}\n_ringlip 2>/dev/null\n"
        line += 'printf "%s\\n" "${COMPREPLY[@]}"'
        return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.split()

    assert complete("ringlip", "tr") == ["train"]
    assert complete("ringlip", "report", "--o") == ["--out"]
    assert complete("ringlip", "train", "batch.si") == ["batch.size="]
    assert complete("ringlip", "train", "data.tr") == ["data.train="]
    assert "glyphs" in complete("ringlip", "train", "gl")
    assert complete("ringlip", "completion", "z") == ["zsh"]
