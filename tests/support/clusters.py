"""Several "nodes" on this machine for tests: an sshd on loopback addresses, and a Slurm of two nodes. Debian's
packages, no system service.

    with ssh_nodes(folder) as (names, environment): ...
    with slurm_nodes(folder) as environment: ...

What is missing skips the test with the line that installs it; ``.ci/run`` installs it where it may.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
SSH = ("sshd", "ssh", "ssh-keygen", "pdsh")
SLURM = ("slurmctld", "slurmd", "srun", "sbatch", "munged")


def need(programs: tuple[str, ...], packages: str) -> None:
    """Skips where one is missing."""
    missing = [program for program in programs if shutil.which(program, path=PATH) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install --no-install-recommends {packages}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def until(what: str, check: list[str], environment: dict[str, str], log: Path, seconds: float = 60) -> None:
    """Waits until the command ``check`` succeeds; shows the daemon's log where it never does."""
    deadline = time.monotonic() + seconds
    while subprocess.run(check, env=environment, capture_output=True).returncode:
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come up:\n{log.read_text() if log.is_file() else ''}")
        time.sleep(0.2)


@contextmanager
def daemon(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Iterator[None]:
    """A process in the foreground that ends with the block, in a group of its own."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def ssh_nodes(folder: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Two names that ssh and pdsh reach without a password, and the environment that makes them do so."""
    need(SSH, "openssh-server openssh-client pdsh")
    folder.mkdir(parents=True)
    port, log = free_port(), folder / "sshd.log"
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    for private in ("host", "user", "authorized"):
        (folder / private).chmod(0o600)
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.2\nListenAddress 127.0.0.3\nHostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nPasswordAuthentication no\nUsePAM no\nMaxStartups "
        f"50\n"
    )
    (folder / "config").write_text(
        f"Host 127.0.0.2 127.0.0.3\nPort {port}\nUser {getpass.getuser()}\nIdentityFile "
        f"{folder}/user\nIdentitiesOnly yes\n"
        "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\nBatchMode yes\n"
    )
    environment = os.environ | {
        "PATH": PATH,
        "PDSH_SSH_ARGS_APPEND": f"-F {folder}/config",
        "RINGLIP_SSH": f"-F {folder}/config",
    }
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)
    sshd = shutil.which("sshd", path=PATH)
    assert sshd is not None
    with daemon([sshd, "-D", "-e", "-f", str(folder / "sshd_config")], log):
        until("sshd", ["ssh", "-F", str(folder / "config"), "127.0.0.2", "true"], environment, log)
        yield ["127.0.0.2", "127.0.0.3"], environment


@contextmanager
def slurm_nodes(folder: Path) -> Iterator[dict[str, str]]:
    """A Slurm of two nodes, n0 and n1, both this machine; the environment in which srun and sbatch find it."""
    need(SLURM, "slurmctld slurmd slurm-client munge")
    folder.mkdir(parents=True)
    for state in ("control", "spool-n0", "spool-n1"):
        (folder / state).mkdir()
    folder.chmod(0o755)
    munge, user = folder / "munge", getpass.getuser()
    munge.mkdir(mode=0o755)
    (munge / "key").write_bytes(os.urandom(128))
    (munge / "key").chmod(0o400)
    ports = [free_port() for _ in range(3)]
    (folder / "slurm.conf").write_text(
        f"ClusterName=test\nSlurmctldHost=localhost(127.0.0.1)\nSlurmUser={user}\nSlurmdUser={user}\nSlurmctldPort={ports[0]}\n"
        f"AuthType=auth/munge\nAuthInfo=socket={munge}/socket\nCredType=cred/munge\nStateSaveLocation={folder}/control\n"
        f"SlurmdSpoolDir={folder}/spool-%n\nSlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/slurmd-%n.pid\n"
        f"SlurmctldLogFile={folder}/slurmctld.log\nSlurmdLogFile={folder}/slurmd-%n.log\nProctrackType=proctrack/pgid\n"
        "TaskPlugin=task/none\nSwitchType=switch/none\nMpiDefault=none\nReturnToService=2\nSchedulerType=sched/backfill\n"
        "SelectType=select/linear\nKillWait=10\nInactiveLimit=0\nSchedulerParameters=requeue_setup_env_fail\n"
        f"NodeName=n0 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000\n"
        f"NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000\n"
        "PartitionName=all Nodes=n0,n1 Default=YES MaxTime=60 State=UP\n"
    )
    environment = os.environ | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    programs = {name: str(shutil.which(name, path=PATH)) for name in SLURM}
    # A path to a socket is short, and munged wants all that leads to its files to be safe.
    with ExitStack() as stack:
        files = [
            f"--socket={munge}/socket",
            f"--key-file={munge}/key",
            f"--pid-file={munge}/pid",
            f"--seed-file={munge}/seed",
        ]
        command = [programs["munged"], "--foreground", "--force", *files, f"--log-file={munge}/log"]
        stack.enter_context(daemon(command, folder / "munged.out", environment))
        until("munged", ["munge", "-n", f"--socket={munge}/socket"], environment, folder / "munged.out")
        stack.enter_context(daemon([programs["slurmctld"], "-D"], folder / "slurmctld.out", environment))
        for node in ("n0", "n1"):
            stack.enter_context(daemon([programs["slurmd"], "-D", "-N", node], folder / f"{node}.out", environment))
        until("Slurm", ["srun", "--nodes=2", "--time=1", "true"], environment, folder / "slurmctld.out", seconds=90)
        try:
            yield environment
        finally:  # a job that a test gave up must not outlive it
            subprocess.run(["scancel", f"--user={user}"], env=environment, check=False)
            idle = 'test -z "$(squeue --noheader)"'
            until("the end of all jobs", ["bash", "-c", idle], environment, folder / "slurmctld.out")
