"""A real SLURM of three virtual nodes on this machine, with ports, keys and folders of its own.

By hand: `python -m tests.slurm.cluster start FOLDER`, then as it says; `python -m tests.slurm.cluster stop FOLDER`.
"""

import getpass
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

NODES = ("n0", "n1", "n2")
BINARIES = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
READY = 30.0  # seconds for the nodes to be idle

CONFIGURATION = """\
ClusterName=kilobatch
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also the wait between a requeue and the next start: 120 s by default, 5 the least
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=8
MessageTimeout=4
KillWait=60
MinJobAge=86400
InactiveLimit=0
Waittime=0
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Cluster:
    """A cluster with its files in `folder`, whose path has to be short: munge's socket is in it. The daemons go on when
    this process ends."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which SLURM's commands use this cluster and no other."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Starts the daemons. Raises RuntimeError with their last output where the nodes are not idle in time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("munge", "state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(mode=0o755, exist_ok=True)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        controller, *ports = _free_ports(1 + len(NODES))
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=8000 State=UNKNOWN"
            for node, port in zip(NODES, ports, strict=True)
        )
        values = {"host": host, "controller": controller, "user": getpass.getuser(), "folder": self.folder}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(nodes=nodes, **values))

        munge = {name: self.folder / "munge" / name for name in ("key", "socket", "pid", "log", "seed")}
        options = [f"--{name}{'' if name == 'socket' else '-file'}={path}" for name, path in munge.items()]
        self._spawn("munged", ["munged", "--foreground", "--force", *options])
        self._wait(munge["socket"].exists, "munged has no socket")
        self._spawn("slurmctld", ["slurmctld", "-D", "-i"])
        for node in NODES:
            self.start_node(node)
        self._wait(lambda: self.idle() == set(NODES), "the nodes are not idle")

    def start_node(self, node: str) -> None:
        self._spawn(f"slurmd-{node}", ["slurmd", "-D", "-N", node], {"SLURMD_NODENAME": node})

    def kill_node(self, node: str) -> None:
        """SIGKILL to all processes of the node, as when its power fails."""
        for process in self.processes(node):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL to slurmd alone: the processes that it has started go on."""
        psutil.Process(int((self.folder / f"slurmd-{node}.pid").read_text())).kill()

    def idle(self) -> set[str]:
        found = subprocess.run(
            ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N %t"], env=self._environment(), capture_output=True, text=True
        )
        # A star marks a node that does not answer.
        return {line.split()[0] for line in found.stdout.splitlines() if line.split()[1] == "idle"}

    def command(self, *arguments: str) -> str:
        """What a command of SLURM prints. Raises CalledProcessError where it fails."""
        return subprocess.run(
            arguments, env=self._environment(), check=True, capture_output=True, text=True, timeout=30
        ).stdout.strip()

    def jobs(self) -> dict[str, str]:
        """The state of each job that SLURM remembers, by id; each task of an array has an entry."""
        lines = self.command("squeue", "-h", "-r", "-t", "all", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def processes(self, node: str) -> list[psutil.Process]:
        """The processes of a node. start_node marks slurmd by an environment variable, and SLURM marks its tasks; what
        they start has the mark too."""
        marks = {"SLURMD_NODENAME": node, **self.environment}.items()
        log = str(self.folder / f"slurmd-{node}.log")
        found = []
        for process in psutil.process_iter():
            try:
                if process.name() == "slurmstepd":  # it overwrites its environment with its title
                    belongs = any(file.path == log for file in process.open_files())
                else:
                    belongs = marks <= process.environ().items()
            except psutil.Error:  # it has ended meanwhile, is a zombie, or belongs to another user
                continue
            if belongs:
                found.append(process)
        return found

    def stop(self) -> None:
        """Ends the daemons and all processes of the nodes, and nothing else. The folder stays."""
        daemons = json.loads((self.folder / "daemons.json").read_text())
        for pid, began in daemons.values():
            if psutil.pid_exists(pid) and (daemon := psutil.Process(pid)).create_time() == began:
                daemon.terminate()
        for node in NODES:
            self.kill_node(node)

    def _environment(self) -> dict[str, str]:
        return os.environ | self.environment

    def _spawn(self, name: str, command: list[str], marks: dict[str, str] | None = None) -> None:
        # A daemon does not end with the terminal or the test that started it: only stop() ends it.
        with (self.folder / f"{name}.out").open("ab") as out:
            daemon = subprocess.Popen(
                [_binary(command[0]), *command[1:]],
                env=self._environment() | (marks or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        path = self.folder / "daemons.json"
        daemons = json.loads(path.read_text()) if path.exists() else {}
        daemons[name] = daemon.pid, psutil.Process(daemon.pid).create_time()
        path.write_text(json.dumps(daemons))

    def _wait(self, ready: Callable[[], bool], problem: str) -> None:
        end = time.monotonic() + READY
        while not ready():
            if time.monotonic() > end:
                words = "\n".join(f"{path}: {path.read_text()[-1000:]}" for path in sorted(self.folder.glob("*.[lo]*")))
                self.stop()
                raise RuntimeError(f"{problem} after {READY:.0f} s\n{words}")
            time.sleep(0.1)


def missing_binaries() -> list[str]:
    """The binaries that a cluster needs and this machine lacks."""
    return [name for name in BINARIES if _which(name) is None]


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def _binary(name: str) -> str:
    found = _which(name)
    assert found, f"{name} is not installed"
    return found


def _free_ports(count: int) -> list[int]:
    """Below the ephemeral range, so that no outgoing connection takes one before its daemon does."""
    found, held = [], []
    while len(found) < count:
        listener = socket.socket()
        try:
            listener.bind(("127.0.0.1", 12000 + secrets.randbelow(12000)))
        except OSError:
            continue
        held.append(listener)
        found.append(listener.getsockname()[1])
    for listener in held:
        listener.close()
    return found


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    cluster = Cluster(folder)
    if what == "stop":
        cluster.stop()
    else:
        cluster.start()
        print("\n".join(f"export {name}={value}" for name, value in cluster.environment.items()))


if __name__ == "__main__":
    main()
