"""launch/SECURITY.md: what comes from outside is never executed, cannot write outside its folder and cannot forge output."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data_tools.__main__ import main as data_tools
from data_tools.format.index import Dataset, load_array
from data_tools.io.errors import run_command
from data_tools.io.formatting import printable
from tests.support.shards import encode, picture, write_tar
from tests.support.tiny_models import tiny_config, tiny_tokenizer
from tests.test_launch import around, multinode
from trainer.checkpoint.state_io import _reader
from trainer.checkpoint.tensor_file import TensorReader
from trainer.core.types import UserError
from trainer.metrics.environment import write_environment
from trainer.models import DualEncoder, ModelSettings, build

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "launch" / "SECURITY.md"
CODE = "from pathlib import Path\n\nPath({mark!r}).touch()\n\n\nclass Own:\n    pass\n"


def test_the_page_names_only_tests_that_exist() -> None:
    named = re.findall(r"(test_\w+)(?:\.py)?::(test_\w+)", PAGE.read_text())
    assert len(named) > 15
    for module, test in named:
        assert f"def {test}(" in (ROOT / "tests" / f"{module}.py").read_text(), f"{module}.py has no {test}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    build(ModelSettings(config=tiny_config(), tokenizer=tiny_tokenizer())).save_pretrained(folder)
    return folder


def change(path: Path, **keys: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize(
    ("file", "kinds"),
    [
        ("config.json", ("AutoConfig", "AutoModel")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
        ("preprocessor_config.json", ("AutoImageProcessor", "AutoProcessor")),
        ("processor_config.json", ("AutoProcessor", "AutoImageProcessor")),
    ],
)
def test_code_in_a_model_directory_is_never_run(model: Path, tmp_path: Path, file: str, kinds: tuple[str, ...]) -> None:
    mark = tmp_path / "executed"
    (model / "own.py").write_text(CODE.format(mark=str(mark)))
    (model / "__init__.py").write_text(CODE.format(mark=str(mark)))
    if (model / file).is_file():
        change(
            model / file, auto_map={kind: "own.Own" if kind != "AutoTokenizer" else ["own.Own", None] for kind in kinds}
        )
    DualEncoder.from_pretrained(model)  # its class is in transformers: the map is ignored
    assert not mark.exists()
    if file == "config.json":
        change(model / file, model_type="own")
        with pytest.raises(UserError, match=r"needs Python code .* never runs"):
            DualEncoder.from_pretrained(model)
        assert not mark.exists()


def test_a_pickle_beside_a_model_is_not_unpickled(model: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return (Path.touch, (Path(tmp_path / "executed"),))  # type: ignore[return-value]

    (model / "model.safetensors").unlink()
    torch.save({"x": Evil()}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.path"):
        DualEncoder.from_pretrained(model)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content",
    [
        (1 << 62).to_bytes(8, "little") + b"{}",  # a header of exabytes
        (2).to_bytes(8, "little") + b"[]",
        (200_000).to_bytes(8, "little") + b"{" * 200_000,  # nested deep
        b"",
    ],
)
def test_a_hostile_safetensors_header_is_one_line(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="its weights cannot be read"):
        DualEncoder.from_pretrained(model)
    with pytest.raises(UserError, match="not a safetensors file"):
        _reader(model / "model.safetensors")  # that of checkpoints


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in ("a", "b")}
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(Exception, match=r"(?i)overlap|offset"):
        TensorReader(path)
    save_file({"a": torch.zeros(2)}, path)
    assert TensorReader(path)


def test_an_array_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
            return (Path.touch, (tmp_path / "executed",))  # type: ignore[return-value]

    path = tmp_path / "column.npy"
    np.save(path, np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"allow_pickle|object"):
        load_array(str(path))
    assert not (tmp_path / "executed").exists()


def test_escapes_in_captions_and_keys_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clear = "\x1b[2J\x1b]0;title\x07\x9b31m"
    folder = tmp_path / "in"
    folder.mkdir()
    write_tar(folder / "0.tar", {f"k{clear}": {"png": encode(picture(0)), "txt": clear.encode()}})
    assert data_tools(["index", str(folder)]) == 0
    assert data_tools(["cat", str(folder), "0"]) == 0
    tar = (folder / "0.tar").read_bytes()
    (folder / "0.tar").write_bytes(tar.replace(b"IDAT", b"IDAX"))  # so that the key is named
    assert data_tools(["verify", str(folder)]) == 1

    def fails(argv: list[str]) -> int:
        raise UserError(f"{clear}: no such file")

    run_command(fails, [])
    printed = capsys.readouterr()
    assert not set(printed.out + printed.err) & set("\x1b\x07\x9b")
    assert r"caption  \x1b[2J" in printed.out and r"k\x1b[2J" in printed.out and r"\x1b[2J" in printed.err


@pytest.mark.parametrize(
    ("text", "shown"), [("a\tb\nc", "a\tb\nc"), ("\x1b[1m\r", r"\x1b[1m\x0d"), ("é 猫 🐈", "é 猫 🐈")]
)
def test_what_is_printable_stays(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_log_message_cannot_carry_escapes() -> None:
    script = "import logging, trainer.core; logging.getLogger('trainer.x').warning('key \\x1b[2J')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "warning: key \\x1b[2J\n"


def test_no_environment_variable_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cret-of-mine")
    write_environment(tmp_path, 0)
    assert "s3cret-of-mine" not in (tmp_path / "environment.json").read_text()


def test_shell_characters_pass_through_the_scripts_as_they_are(tmp_path: Path) -> None:
    texts = ["$(touch executed)", "`touch executed`", "a; touch executed", "a && touch executed", "'\"*\\ x"]
    (tmp_path / "end-0").write_text(
        f'printf "%s\\n" "$@" >{tmp_path}/arguments; echo "runs/x: finished at 96 samples"; exit 0'
    )
    overrides = [f"run.directory={text}" for text in texts]
    done = multinode("--ranks", "1", f"{texts[0]}.yaml", *overrides, environment=around(tmp_path))
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "arguments").read_text().splitlines()[-6:] == [f"{texts[0]}.yaml", *overrides]
    assert not list(tmp_path.rglob("executed")) and not (ROOT / "executed").exists()


def test_a_manifest_cannot_make_a_command_write_outside(tmp_path: Path) -> None:
    """A view's manifest may point to tars elsewhere, which are read; nothing in it names a file that is written."""
    folder = tmp_path / "data"
    folder.mkdir()
    outside = tmp_path / "outside.tar"
    outside.write_bytes(b"mine")
    manifest = {
        "format": "ringlip-shards", "version": 1, "samples": 1,
        "shards": [{"name": "../outside.tar", "samples": 1, "bytes": 4, "digest": "0"}],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for command in ("verify", "index", "stats", "merge"):
        assert data_tools([command, str(folder)]) == 2
    assert outside.read_bytes() == b"mine"
    assert not (tmp_path / "outside.idx").exists()
    with pytest.raises(UserError, match="cannot be the name of a shard"):
        Dataset.open(folder)
