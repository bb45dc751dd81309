"""The launch scripts, with real launchers, ssh daemons and a real Slurm: two "nodes" of two ranks train as one node of
four does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.support.clusters import SSH, free_port, need, slurm_nodes, ssh_nodes
from tests.support.forked_ranks import run_ranks
from tests.support.runs import curve, make_shards
from tests.support.tiny_models import tiny_captions, tiny_config, tiny_tokenizer
from trainer import train
from trainer.checkpoint import RunLock

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
LONG = 240


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    tree: dict[str, Any] = {
        "run": {"directory": str(folder / "whole"), "samples": 96},
        "model": {"config": tiny_config(), "tokenizer": tiny_tokenizer()},
        "data": {"train": str(make_shards(folder / "pairs", tiny_captions(60))), "workers": 0},
        "batch": {"size": 16, "micro_batch": 4},
        "optim": {"lr": 3e-3, "eps": 1e-4},
        "engine": {"precision": "fp32"},
        "log": {"every": 1, "line_seconds": 1000, "trackers": "none"},
        "checkpoint": {"every": 32},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path) -> list[tuple[int, float, float]]:
    """The curve of one node of four ranks."""
    assert run_ranks(train.main, 4, [str(recipe)]) == [0] * 4
    return curve(recipe.parent / "whole")


def same(found: list[tuple[int, float, float]], expected: list[tuple[int, float, float]]) -> None:
    assert [point[0] for point in found] == [point[0] for point in expected]
    np.testing.assert_allclose([point[1] for point in found], [point[1] for point in expected], rtol=1e-5)


def multinode(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch" / "multinode.sh"), "--master-port", str(free_port()), *arguments]
    environment = (environment or dict(os.environ)) | ENVIRONMENT | {"RINGLIP_RESTART_SECONDS": "0"}
    return subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LONG
    )


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A hostfile of two nodes of two ranks, and the environment that reaches them."""
    with ssh_nodes(tmp_path / "ssh") as (names, environment):
        (tmp_path / "hostfile").write_text("".join(f"{name} slots=2\n" for name in names))
        (tmp_path / "env").write_text("".join(f"{key}={value}\n" for key, value in ENVIRONMENT.items()))
        yield tmp_path / "hostfile", environment | {"DS_ENV_FILE": str(tmp_path / "env")}


@pytest.mark.parametrize("ssh", ["pdsh", pytest.param("ssh", marks=pytest.mark.slow)])
def test_two_nodes_over_ssh_train_as_one(
    recipe: Path, whole: list[tuple[int, float, float]], hosts: tuple[Path, dict[str, str]], tmp_path: Path, ssh: str
) -> None:
    options = ["--ssh"] if ssh == "ssh" else []
    done = multinode(
        "--hostfile", str(hosts[0]), *options, str(recipe), f"run.directory={tmp_path / 'run'}", environment=hosts[1]
    )
    assert done.returncode == 0, done.stdout
    same(curve(tmp_path / "run"), whole)


def sbatch(environment: dict[str, str], recipe: Path, folder: Path, *overrides: str) -> str:
    """Submits; the job's number."""
    command = [
        "sbatch",
        "--parsable",
        "--nodes=2",
        f"--output={folder}/job.out",
        f"--chdir={folder}",  # anywhere: the script finds its neighbours
        str(ROOT / "launch" / "slurm.sbatch"),
    ]
    command += [str(recipe), f"run.directory={folder / 'run'}", *overrides]
    environment = (
        environment
        | ENVIRONMENT
        | {"RANKS_PER_NODE": "2", "MASTER_PORT": str(free_port()), "RINGLIP_RESTART_SECONDS": "0"}
    )
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def state_of(environment: dict[str, str], job: str) -> dict[str, str]:
    text = subprocess.run(
        ["scontrol", "show", "job", job], env=environment, check=True, capture_output=True, text=True
    ).stdout
    return dict(word.partition("=")[::2] for word in text.split())


def wait_for_job(environment: dict[str, str], job: str, log: Path) -> dict[str, str]:
    deadline = time.monotonic() + LONG
    while (state := state_of(environment, job))["JobState"] not in (
        "COMPLETED",
        "FAILED",
        "TIMEOUT",
        "NODE_FAIL",
        "CANCELLED",
    ):
        assert time.monotonic() < deadline, log.read_text() if log.is_file() else state
        time.sleep(0.3)
    return state


def test_two_nodes_under_slurm_train_as_one(
    recipe: Path, whole: list[tuple[int, float, float]], tmp_path: Path
) -> None:
    with slurm_nodes(tmp_path / "slurm") as environment:
        state = wait_for_job(environment, sbatch(environment, recipe, tmp_path), tmp_path / "job.out")
    assert state["JobState"] == "COMPLETED", (tmp_path / "job.out").read_text()
    same(curve(tmp_path / "run"), whole)


def checkpoint_of(run: Path, samples: int) -> None:
    deadline = time.monotonic() + LONG
    while not (run / "checkpoints" / f"samples-{samples:09d}").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_slurm_queues_a_job_again_that_was_told_to_stop(recipe: Path, tmp_path: Path) -> None:
    with slurm_nodes(tmp_path / "slurm") as environment:
        job = sbatch(environment, recipe, tmp_path, "run.samples=16000", "checkpoint.every=160")
        checkpoint_of(tmp_path / "run", 160)
        subprocess.run(["scancel", "--signal=USR1", job], env=environment, check=True)
        log = tmp_path / "job.out"
        deadline = time.monotonic() + LONG
        while "resumed at" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        assert "queued again" in log.read_text()
        assert int(state_of(environment, job)["Restarts"]) == 1
        subprocess.run(["scancel", job], env=environment, check=True)
        state = wait_for_job(environment, job, log)
        assert (state["JobState"], int(state["Restarts"])) == ("CANCELLED", 1)  # what a person ends stays ended


@pytest.mark.slow
def test_a_killed_rank_of_one_node_ends_the_other_and_both_start_again(
    recipe: Path, whole: list[tuple[int, float, float]], hosts: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """The data of rank 3 holds a bomb that goes off once: it is killed while it reads."""
    run = tmp_path / "run"
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from trainer import train\n"
        "real, fuse = train.Run.step, Path(sys.argv.pop())\n"
        "def step(self, batch, **options):\n"
        "    if os.environ['RANK'] == '3' and self.samples_seen == 48 and not fuse.exists():\n"
        "        fuse.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, batch, **options)\n"
        "train.Run.step = step\n"
        "sys.exit(train.run_command(train.main, sys.argv[1:]))\n"
    )
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "*cache*", "runs", "demo"))
    (tree / "trainer" / "bomb.py").write_text(code)
    script = tree / "launch" / "multinode.sh"
    script.write_text(script.read_text().replace("--module trainer.train", "--module trainer.bomb"))
    command = [
        "bash",
        str(script),
        "--hostfile",
        str(hosts[0]),
        str(recipe),
        f"run.directory={run}",
        str(tmp_path / "fuse"),
    ]
    environment = hosts[1] | ENVIRONMENT | {"MASTER_PORT": str(free_port()), "RINGLIP_RESTART_SECONDS": "0"}
    done = subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LONG, cwd=tree
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("error: rank 3 on ") == 1, done.stdout
    assert "starting again, from the last checkpoint if there is one (1 of 3)" in done.stdout
    assert "resumed at 32 samples" in done.stdout
    same(curve(run), whole)


NASTY = {
    "PLAIN": "eth0,eth1",
    "NASTY": """two words  $HOME $(id) `id` "double" it's %n %% \\ ; & | * # end""",
    "EMPTY": "",
}
ARGUMENTS = ["recipe.yaml", "a=[1,{b:2,c:3}]", "b=$HOME*%n", "c=two words", NASTY["NASTY"]]


@pytest.mark.parametrize("how", ["pdsh", "no-ssh", pytest.param("ssh", marks=pytest.mark.slow)])
def test_values_of_the_environment_file_arrive_as_they_are(tmp_path: Path, how: str) -> None:
    """A stand-in for training writes down what its rank finds in the environment and on its command line."""
    tree, home = tmp_path / ("tree" if how == "pdsh" else "tree with a space"), tmp_path / "home"
    (tree / "launch").mkdir(parents=True)
    home.mkdir()
    (tree / "pyproject.toml").touch()
    script = tree / "launch" / "multinode.sh"
    script.write_text((ROOT / "launch" / "multinode.sh").read_text().replace("trainer.train", "stand_in"))
    (tree / "stand_in.py").write_text(
        "import json, os, sys\nfrom pathlib import Path\n"
        f"Path({str(tmp_path)!r}, 'rank-' + os.environ['RANK']).write_text(json.dumps(\n"
        "    [dict(os.environ), os.getcwd(), [a for a in sys.argv[1:] if not a.startswith('--local_rank')]]))\n"
        "print('runs/x: finished at 96 samples', file=sys.stderr)\n"
    )
    (home / ".deepspeed_env").write_text("FROM_HOME=yes\nPLAIN=replaced\n")
    lines = "".join(f"{name}={value}\n" for name, value in NASTY.items())
    (tree / ".deepspeed_env").write_text(f"# comment\n\nDS_ACCELERATOR=cpu\r\n{lines}")
    with ssh_nodes(tmp_path / "ssh") as (names, environment):
        (tmp_path / "hostfile").write_text("".join(f"{name} slots=1\n" for name in names))
        options = {"pdsh": [], "ssh": ["--ssh"], "no-ssh": ["--no-ssh", "0"]}[how]
        command = ["bash", str(script), "--hostfile", str(tmp_path / "hostfile"), *options, *ARGUMENTS]
        environment |= {"HOME": str(home), "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=LONG, cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = sorted(tmp_path.glob("rank-*"))
    assert len(ranks) == (1 if how == "no-ssh" else 2)
    for rank in ranks:
        found, folder, arguments = json.loads(rank.read_text())
        assert (folder, arguments) == (str(tree), ARGUMENTS)
        assert {name: found.get(name) for name in NASTY} == NASTY
        assert (found["FROM_HOME"], found["DS_ACCELERATOR"]) == ("yes", "cpu")
        assert found["RINGLIP_HOSTS"] == "127.0.0.2:1 127.0.0.3:1"


def test_a_line_of_the_environment_file_that_says_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("A=1\nexport B\n")
    done = multinode("--ranks", "1", "recipe.yaml", environment=os.environ | {"DS_ENV_FILE": str(tmp_path / "env")})
    assert done.returncode == 2
    assert f"{tmp_path}/env:2: 'export B' is not NAME=VALUE" in done.stdout


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("node-a slots=2\nnode-b\n", ":2: expected NAME slots=RANKS, got node-b"),
        ("node-a slots=two\n", ":1: expected NAME slots=RANKS, got node-a slots=two"),
        ("node-a slots=2 # one\n\nnode-a\tslots=2\r\n", ":3: node-a is listed twice"),
        ("# nobody\n", " lists no node"),
    ],
)
def test_a_wrong_hostfile_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "hostfile").write_text(text)
    done = multinode("--hostfile", str(tmp_path / "hostfile"), "--no-ssh", "0", "recipe.yaml")
    assert (done.returncode, len(done.stdout.splitlines())) == (2, 1)
    assert f"{tmp_path / 'hostfile'}{says}" in done.stdout


def test_tabs_comments_windows_lines_and_unequal_slots_make_the_same_hostfile(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("# nodes\r\n\r\nnode-a\tslots=1\r\nnode-b  slots=3 # larger\r\n")
    (tmp_path / "end-0").write_text(f"echo $RINGLIP_HOSTS on $*\n{FINISHED}")
    done = multinode("--hostfile", str(tmp_path / "hostfile"), "--no-ssh", "1", "r.yaml", environment=around(tmp_path))
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("node-a:1 node-b:3 on ") and "--node_rank 1 --master_addr node-a" in done.stdout


def test_pdsh_is_not_started_where_it_would_train_in_another_directory(tmp_path: Path) -> None:
    need(SSH, "openssh-server openssh-client pdsh")
    (tmp_path / "a b").mkdir()
    (tmp_path / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n")
    command = ["bash", str(ROOT / "launch" / "multinode.sh"), "--hostfile", str(tmp_path / "hostfile"), "recipe.yaml"]
    done = subprocess.run(command, cwd=tmp_path / "a b", text=True, capture_output=True, timeout=LONG)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: pdsh cannot start in '{tmp_path}/a b': pass --ssh")


@pytest.mark.parametrize("code", [127, 255])
def test_a_node_where_nothing_starts_is_named_and_nobody_waits_for_it(tmp_path: Path, code: int) -> None:
    """A stand-in for ssh: on the first node the ranks wait for the second, where there is no venv, or which is off."""
    (tmp_path / "ssh").write_text(
        f"#!/bin/bash\nfor last; do :; done\necho start >>{tmp_path}/starts\n"
        f"case \"$*\" in *node-b*) exit {code} ;; esac\nsleep 600 & trap 'kill $!; exit 143' TERM; wait\n"
    )
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    options = ["--hostfile", str(tmp_path / "hostfile"), "--ssh", "--restarts", "1"]
    done = multinode(*options, "recipe.yaml", environment=environment)
    assert done.returncode == code, done.stdout
    assert f"error: node-b: ssh ended with exit code {code}" in done.stdout
    assert len((tmp_path / "starts").read_text().split()) == (2 if code == 127 else 4)  # 255: a node may come back


def around(folder: Path) -> dict[str, str]:
    """An environment in which `deepspeed` counts its starts and does what folder/end-NUMBER says."""
    stand_in = folder / "deepspeed"
    stand_in.write_text(
        f"#!/bin/bash\nn=$(cat {folder}/count 2>/dev/null || echo 0)\necho $((n + 1)) >{folder}/count\n. "
        f"{folder}/end-$n\n"
    )
    stand_in.chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


FINISHED = "echo 'runs/x: finished at 96 samples' >&2; exit 0"


@pytest.mark.parametrize(
    ("ends", "code", "starts"),
    [
        ([FINISHED], 0, 1),
        (["exit 1", "exit 247", FINISHED], 0, 3),
        (["exit 1"] * 9, 1, 3),  # --restarts 2
        (["exit 75"] * 3 + [FINISHED], 0, 4),  # a signal is no failure
        (["exit 2", FINISHED], 2, 1),  # a mistake stays one
        (["no-such-command", FINISHED], 127, 1),  # no restart installs it
        (["exit 0", FINISHED], 0, 2),  # what DeepSpeed's launcher says when its child was killed
    ],
)
def test_what_is_started_again(tmp_path: Path, ends: list[str], code: int, starts: int) -> None:
    """The script around a launcher that ends as it is told to."""
    for number, end in enumerate(ends):
        (tmp_path / f"end-{number}").write_text(end)
    done = multinode("--ranks", "1", "--restarts", "2", "recipe.yaml", environment=around(tmp_path))
    assert (done.returncode, int((tmp_path / "count").read_text())) == (code, starts), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_deepspeed_command_that_dies_alone_takes_its_ranks_along(
    recipe: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """It passes no signal on: without a word the launcher below it and its ranks would train to the end."""
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_accelerators",
        "2",
        "--master_port",
        str(free_port()),
        "--module",
    ]
    command += ["trainer.train", str(recipe), f"run.directory={tmp_path / 'run'}", "run.samples=96000"]
    with (tmp_path / "out").open("w") as out:
        shell = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=out, stderr=out, cwd=ROOT)
        checkpoint_of(tmp_path / "run", 96)
        os.kill(shell.pid, number)
        shell.wait(LONG)
        with RunLock(tmp_path / "run", patience=LONG):
            pass
    assert "stopped by SIGHUP" in (tmp_path / "out").read_text()


@pytest.mark.slow
def test_a_launcher_that_was_killed_is_no_success_and_its_ranks_make_room(
    recipe: Path, whole: list[tuple[int, float, float]], tmp_path: Path
) -> None:
    """DeepSpeed's own launcher exits with 0 then, and leaves its ranks behind."""
    command = ["bash", str(ROOT / "launch" / "multinode.sh"), "--ranks", "4", "--master-port", str(free_port())]
    command += [str(recipe), f"run.directory={tmp_path / 'run'}", "run.samples=9600"]
    with (tmp_path / "out").open("w") as out:
        script = subprocess.Popen(
            command, env=os.environ | ENVIRONMENT | {"RINGLIP_RESTART_SECONDS": "0"}, stdout=out, stderr=out
        )
        checkpoint_of(tmp_path / "run", 96)
        [launch] = subprocess.run(
            ["pgrep", "-f", f"deepspeed.launcher.launch.*{tmp_path / 'run'}"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        os.kill(int(launch), signal.SIGKILL)
        deadline = time.monotonic() + LONG
        while "resumed at" not in (tmp_path / "out").read_text():
            assert time.monotonic() < deadline, (tmp_path / "out").read_text()
            time.sleep(0.2)
        script.send_signal(signal.SIGTERM)
        assert script.wait(LONG) == 75
    text = (tmp_path / "out").read_text()
    assert "stopped by SIGHUP" in text
    assert "starting again, from the last checkpoint if there is one (1 of 3)" in text
    same(curve(tmp_path / "run")[:1], whole[:1])


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("phase", ["running", "pausing"])
def test_a_signal_at_any_moment_ends_the_script_with_75(tmp_path: Path, name: signal.Signals, phase: str) -> None:
    """While the launcher runs it is passed on; in the pause before a restart there is nobody to pass it on to."""
    (tmp_path / "end-0").write_text("exit 1" if phase == "pausing" else "trap 'exit 75' TERM; sleep 30 & wait")
    (tmp_path / "end-1").write_text(FINISHED)
    command = ["bash", str(ROOT / "launch" / "multinode.sh"), "--ranks", "1", "recipe.yaml"]
    environment = around(tmp_path) | {"RINGLIP_RESTART_SECONDS": "30"}
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and bash cannot trap it
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    signal.signal(signal.SIGHUP, before)
    assert process.stderr is not None
    try:
        if phase == "pausing":
            while "starting again" not in process.stderr.readline():
                assert process.poll() is None
        else:
            deadline = time.monotonic() + 30
            while not (tmp_path / "count").is_file():
                assert time.monotonic() < deadline
                time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(name)
        assert process.wait(15) == 75
        assert f"stopped by {name.name} " in process.stderr.read()
        assert (tmp_path / "count").read_text().strip() == "1"
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
