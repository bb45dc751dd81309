"""The layers only look down: read from the source with ast, so that no import can slip past."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"core"},
    {"engine", "optim", "metrics", "models", "losses", "data", "runtime"},
    {"gradient", "two_pass", "checkpoint", "evals", "distill"},
    {"step", "reinforce"},
    {"config"},
    {"plan", "defaults", "blend"},
    {"run"},
    {"train", "evaluate", "embed", "export", "report", "doctor"},
    {"api", "search", "runs", "finetune"},
    {"study"},
    {"cli"},
    {"__main__"},
]


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path: Path) -> str:
    """trainer/losses/topology.py -> losses; trainer/step.py -> step."""
    return path.relative_to(ROOT / "trainer").parts[0].removesuffix(".py")


def layer(part: str) -> int:
    found = [number for number, members in enumerate(LAYERS) if part in members]
    assert found, f"trainer/{part} stands in no layer: name it in {__file__}"
    return found[0]


@pytest.mark.parametrize("path", modules("trainer"), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_lower_layers(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top != "trainer" or not rest:
            continue
        other = rest.split(".")[0]
        if other in {"__version__", part}:
            continue
        assert layer(other) < layer(part), f"{path.relative_to(ROOT)} imports trainer.{other}, which is not below it"


def test_deepspeed_is_imported_by_the_engine_alone() -> None:
    for path in modules("trainer"):
        if part_of(path) != "engine":
            assert not [name for name in imports(path) if name.split(".")[0] == "deepspeed"], path


def test_data_tools_needs_neither_torch_nor_trainer() -> None:
    for path in modules("data_tools"):
        assert not [name for name in imports(path) if name.split(".")[0] in {"torch", "trainer"}], path


def test_the_trainer_knows_the_format_of_shards_and_no_command_of_data_tools() -> None:
    for path in modules("trainer"):
        if part_of(path) == "cli":  # `ringlip` lists both packages' commands
            continue
        for name in imports(path):
            if name.split(".")[0] == "data_tools":
                assert name.split(".")[1] in {"format", "io", "samples"}, f"{path} imports {name}"


def test_nothing_waits_by_a_clock_that_may_jump() -> None:
    """Timeouts and rates use time.monotonic; the clock of the day is shown or compared between machines only."""
    shown = {ROOT / "trainer/doctor/node.py", ROOT / "trainer/doctor/__main__.py", ROOT / "trainer/runs.py"}
    asking = {
        path for package in ("trainer", "data_tools") for path in modules(package) if "time.time()" in path.read_text()
    }
    assert asking == shown


@pytest.mark.parametrize("path", modules("trainer"), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_that_is_run_names_its_logger(path: Path) -> None:
    """Under `python -m` its __name__ is __main__, and a logger of that name prints no messages."""
    text = path.read_text(encoding="utf-8")
    assert path.name != "__main__.py" or "getLogger(__name__)" not in text
    assert 'if __name__ == "__main__"' not in text or "getLogger(__name__)" not in text
