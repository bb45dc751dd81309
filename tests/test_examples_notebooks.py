"""The notebooks run from top to bottom on a CPU, in the order in which a reader meets them.

bash tests/run.sh -m slow -k notebooks        # some minutes; pip install nbclient ipykernel
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent / "examples"


@pytest.mark.slow
def test_notebooks_run_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    nbformat = pytest.importorskip("nbformat")
    if shutil.which("ringlip") is None:
        pytest.skip("no ringlip on the PATH: pip install --no-deps -e .")
    monkeypatch.setenv("RINGLIP_WORK", str(tmp_path / "demo"))
    monkeypatch.setenv("RINGLIP_SAMPLES", "40000")
    monkeypatch.setenv("RINGLIP_FINETUNE_SAMPLES", "12000")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    outputs = []
    for name in ("train_and_search", "finetune_lora"):
        notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
        nbclient.NotebookClient(notebook, timeout=1500, kernel_name="python3").execute(cwd=str(EXAMPLES.parent.parent))
        outputs.append("".join(str(output) for cell in notebook.cells for output in cell.get("outputs", [])))
        assert "error: " not in outputs[-1], outputs[-1][-2000:]
    searched, finetuned = outputs
    assert searched.count("image/png") == 3  # three queries
    assert json.loads((tmp_path / "demo/adapter/adapter_config.json").read_text())["r"] == 16
    assert "image_to_text_r1" in finetuned or "R@1" in finetuned
