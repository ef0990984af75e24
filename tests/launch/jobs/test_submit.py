"""`kilobatch submit` without a scheduler: options, refusals, sweeps, snapshots, the script for sbatch."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kilobatch.launch.jobs import cluster, code_snapshot, sbatch
from kilobatch.launch.recipes import sweep
from tests.launch.conftest import CommandResult

CLUSTER_YAML = """
account: vision@a100
setup: [module purge, module load cuda/12.8]
default: big
clusters:
  big: {partition: gpu, gpus_per_node: 8, gpu_type: a100, cpus_per_worker: 12, time: 20:00:00,
        extra: {hint: nomultithread}}
  cpu:
    partition: cpu
    workers_per_node: 4
    cpus_per_worker: 6
    mem_gb: 0
    time: 90
  local: {workers_per_node: 2}
"""
SHAPES = {
    "four-nodes-of-eight-gpus": "--nodes 4 --gpus-per-node 8 --partition gpu --time 24:00:00",
    "two-nodes-of-two-cpu-workers": "--nodes 2 --workers-per-node 2 --cpus-per-worker 1 --time 0:30:00",
    "named-cluster": "--cluster big --nodes 2 --qos long --setup 'export NCCL_DEBUG=WARN'",
    "sweep": "--cluster cpu --sweep optimizer.lr=0.3,0.6,1.2 --sweep seed=0,1 --array-parallelism 2",
    "all-that-may-be-asked": "--nodes 3 --gpus-per-node 4 --gpu h100 --cpus-per-worker 16 --mem-gb 480.5 "
    "--time 3-12:00:00 --partition long --account lab --qos high --constraint nvlink --exclude n[03-07] "
    "--comment 'table 2' --signal-lead 300 --interface ib0 --python python3 --extra mail-type=END --extra exclusive",
    "one-worker": "--cluster cpu --workers-per-node 1 --cpus-per-worker 2 --mem-gb 8 --time 1:00:01",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder of a person with the cluster.yaml above."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = cluster.personal_file()
    file.parent.mkdir(parents=True)
    file.write_text(CLUSTER_YAML)
    return file


@pytest.mark.parametrize("shape", SHAPES)
def test_script_for_sbatch(shape: str, kilobatch: Callable[..., CommandResult], tmp_path: Path):
    arguments = SHAPES[shape]
    if "--cluster" not in arguments:
        cluster.personal_file().unlink()
    folder = "/scratch/ann's runs" if shape.startswith("all") else "/scratch/ann"
    recipe = ["demo", "data.batch=480", f"run.folder={folder}"]
    result = kilobatch("submit", *recipe, "--name", "demo", "--dry-run", *shlex.split(arguments))
    assert (result.code, result.err) == (0, "")
    expected = Path(__file__).parent / "sbatch" / f"{shape}.txt"
    assert result.out.replace(sys.executable, "PYTHON") == expected.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["home"], "a dry run makes nothing"


def test_a_dry_run_on_this_machine_is_a_line_of_shell(kilobatch: Callable[..., CommandResult]):
    result = kilobatch("submit", "demo", "data.batch=480", "--name", "demo", "--dry-run", "--cluster", "local")
    assert result.out.startswith(f"PYTHONPATH={Path('runs/demo/code/001').absolute()}")
    assert result.out.endswith(f"-m kilobatch.launch.jobs.local_queue {Path('runs/demo').absolute()}\n")


REFUSED: dict[str, tuple[str, list[str]]] = {
    "no time limit": ("--cluster lab.yaml", ["--time HH:MM:SS", "cluster.yaml"]),
    "no such cluster": ("--cluster bigg", ["--cluster:", "'bigg'", "cluster.yaml", "did you mean 'big'?"]),
    "no such file": ("--cluster ours.yaml", ["no file ours.yaml"]),
    "a key misspelt": ("--cluster typo.yaml", ["typo.yaml line 2", "'partitoin'", "did you mean 'partition'?"]),
    "a section for a key": ("--cluster list.yaml", ["list.yaml line 1", "clusters holds a name"]),
    "several, none chosen": ("--cluster two.yaml", ["two.yaml", "no default", "--cluster", "a, b"]),
    "a default that is not there": ("--cluster gone.yaml", ["gone.yaml line 1", "no cluster 'c'", "known: a, local"]),
    "a number too small": ("--nodes 0", ["--nodes:", "nodes is 0", "greater than or equal to 1"]),
    "a time that is none": ("--time 24h", ["--time:", "'24h' is no time", "HH:MM:SS"]),
    "no time at all": ("--time 0", ["'0' is no time to run in"]),
    "no room before the signal": ("--time 3", ["time 3 has no room", "180 s", "signal_lead_seconds 120"]),
    "workers and GPUs": ("--workers-per-node 4", ["workers_per_node 4", "gpus_per_node 8", "leave"]),
    "a key with an option": ("--extra nodes=3", ["--extra:", "'nodes'", "option of its own: --nodes"]),
    "a key that is ours": ("--extra no_requeue", ["'no-requeue' is set for each job"]),
    "a GPU type without GPUs": ("--gpus-per-node 0 --gpu a100", ["gpu_type a100", "gpus_per_node 0"]),
    "a batch that does not divide": ("--nodes 7", ["data.batch 480", "56 workers", "use 448 or 504"]),
    "a CPU recipe on GPUs": ("run.device=cpu", ["run.device=cpu", "gpus_per_node is 8"]),
    "a GPU recipe on CPUs": ("run.device=cuda --cluster cpu", ["run.device=cuda", "gpus_per_node is 0"]),
    "a recipe misspelt": ("optimizer.lrr=1", ["'optimizer.lrr=1'", "did you mean 'lr'?"]),
    "what this machine has not": ("--cluster local --partition gpu", ["--partition", "local"]),
    "more than this machine": ("--cluster local --nodes 2", ["nodes is 2", "this machine alone"]),
    "a path with a colon": ("run.folder=runs:2", ["runs:2", "':' means something", "a path without it"]),
    "a sweep of nothing": ("--sweep optimizer.lr=", ["--sweep optimizer.lr=", "no values", "optimizer.lr=0.3,0.6"]),
    "a sweep that is none": ("--sweep lr=1,2", ["'lr=1'", "did you mean 'optimizer.lr'"]),
    "a value twice": ("--sweep optimizer.lr=0.3,0.30", ["0.30 stands twice"]),
    "a key twice": ("--sweep seed=1 --sweep run.seed=2", ["--sweep run.seed stands twice"]),
    "one bad point among good ones": ("--sweep data.batch=480,481", ["'data.batch=481'", "use 480 or 488"]),
    "a name that is none": ("--name a/b", ["a/b", "no name for a run"]),
}  # fmt: skip
FILES = {
    "lab.yaml": "partition: gpu\n",
    "typo.yaml": "nodes: 2\npartitoin: gpu\n",
    "list.yaml": "clusters: [a, b]\n",
    "two.yaml": "clusters: {a: {nodes: 2}, b: {nodes: 3}}\n",
    "gone.yaml": "default: c\nclusters: {a: {nodes: 2}}\n",
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_anything_is_made(what: str, kilobatch: Callable[..., CommandResult], tmp_path: Path):
    for name, text in FILES.items():
        Path(name).write_text(text)
    arguments, parts = REFUSED[what]
    result = kilobatch("submit", "demo", "data.batch=480", *arguments.split())
    assert (result.code, result.out) == (2, "")
    for part in parts:
        assert part in result.err
    assert result.err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"home", *FILES}


def test_a_named_cluster_overrides_the_file_and_the_command_line_overrides_both():
    options = {"nodes": 2, "extra": ["hint=multithread", "exclusive"], "setup": ["conda activate x"], "qos": None}
    kind, resources = cluster.choose_cluster(None, options)
    assert (kind, resources.partition, resources.account, resources.nodes, resources.workers) == (
        "slurm",
        "gpu",
        "vision@a100",
        2,
        8,
    )
    assert resources.extra == {"hint": "multithread", "exclusive": True}
    assert resources.setup == ["module purge", "module load cuda/12.8", "conda activate x"]
    assert resources.minutes == 20 * 60
    kind, resources = cluster.choose_cluster("local", {})
    assert (kind, resources.account, resources.workers, resources.minutes) == ("local", None, 2, None)
    assert cluster.choose_cluster("cpu", {})[1].minutes == 90


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("90:30", 91),
        ("1:30:00", 90),
        ("0:04:01", 5),
        ("2-0", 2880),
        ("1-12:30", 2190),
        ("3-12:00:01", 5041),
    ],
)
def test_times_are_read_as_slurm_reads_them(text: str, minutes: int):
    assert cluster.choose_cluster("cpu", {"time": text})[1].minutes == minutes


def test_resources_read_back_equal(tmp_path: Path):
    _, resources = cluster.choose_cluster(
        None, {"mem_gb": 1.5, "time": "90", "setup": ["a: b", "'c'"], "extra": ["x=1"]}
    )
    path = tmp_path / "cluster.yaml"
    path.write_text(resources.dump_yaml())
    assert cluster.cluster_again("slurm", path, {}) == resources
    assert cluster.cluster_again("slurm", path, {"nodes": 3}).nodes == 3
    path.write_text(cluster.Cluster().dump_yaml())
    assert cluster.cluster_again("local", path, {}) == cluster.Cluster()


def test_points_of_a_sweep():
    points = sweep.points(["optimizer.lr=0.3,1e-3", "seed=0,1", "data.views.crop.scale=[0.1, 1]"])
    assert [point.name for point in points] == [
        "0-lr-0.3-seed-0-scale-0.1_1",
        "1-lr-0.3-seed-1-scale-0.1_1",
        "2-lr-1e-3-seed-0-scale-0.1_1",
        "3-lr-1e-3-seed-1-scale-0.1_1",
    ]
    assert points[2].changes == ["optimizer.lr=1e-3", "run.seed=0", "data.views.crop.scale=[0.1, 1]"]
    assert sweep.points([]) == [sweep.Point("0", [])]
    many = sweep.points([f"seed={','.join(map(str, range(101)))}"])
    assert [many[9].name, many[100].name] == ["009-seed-9", "100-seed-100"]


def test_data_is_named_by_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from kilobatch.data.sources.specs import absolute_spec

    monkeypatch.chdir(tmp_path)
    assert absolute_spec("train.beton") == str(tmp_path / "train.beton")
    assert absolute_spec("folder:photos/train") == f"folder:{tmp_path}/photos/train"
    assert absolute_spec("npz:~/x.npz") == f"npz:{Path.home()}/x.npz"
    assert absolute_spec("digits") == "digits"


def test_a_job_runs_the_snapshot_wherever_it_is_started(tmp_path: Path):
    code = code_snapshot.take_snapshot(tmp_path / "code")
    assert code_snapshot.take_snapshot(tmp_path / "code").name == "002"
    note = json.loads((code / "commit.json").read_text())
    assert note["commit"] is None or len(note["commit"]) == 40
    assert not list(code.rglob("__pycache__"))
    assert (code / "kilobatch" / "configs" / "demo.yaml").read_bytes() == (
        code_snapshot.CHECKOUT / "configs" / "demo.yaml"
    ).read_bytes()

    with (code / "kilobatch" / "launch" / "jobs" / "slurm_job.py").open("a") as job:
        job.write("\nSAID = 'the snapshot'\n")
    python = [
        sys.executable,
        "-c",
        "from kilobatch import configs, data; from kilobatch.launch.jobs import slurm_job as job; "
        "print(job.SAID, data.__file__)",
    ]
    command = "\n".join([*sbatch.environment(code), 'exec "$@"'])
    environment = os.environ | {"PYTHONPATH": str(code_snapshot.CHECKOUT / "src")}
    for folder in (code_snapshot.CHECKOUT, tmp_path):
        ran = subprocess.run(
            ["bash", "-c", command, "-", *python],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert ran.stdout == f"the snapshot {code / 'kilobatch' / 'data' / '__init__.py'}\n"


def test_a_copy_that_was_interrupted_is_made_again(tmp_path: Path):
    (tmp_path / "code" / ".001" / "kilobatch" / "launch" / "jobs").mkdir(parents=True)
    (tmp_path / "code" / ".001" / "kilobatch" / "launch" / "jobs" / "slurm_job.py").write_text("half")
    code = code_snapshot.take_snapshot(tmp_path / "code")
    assert (code / "kilobatch" / "launch" / "jobs" / "slurm_job.py").read_bytes() == (
        code_snapshot.CHECKOUT / "launch" / "jobs" / "slurm_job.py"
    ).read_bytes()
    assert [path.name for path in (tmp_path / "code").iterdir()] == ["001"]


def test_no_sbatch_no_run(kilobatch: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    result = kilobatch("submit", "demo", "data.batch=480", "--cluster", "cpu")
    assert result.code == 2
    assert "no sbatch here" in result.err
    assert "--cluster local" in result.err
    assert not Path("runs").exists()


def test_commands_for_runs_that_are_no_jobs(kilobatch: Callable[..., CommandResult]):
    from kilobatch.launch.recipes.recipe import resolve_recipe
    from kilobatch.launch.runs import run_folder

    recipe = resolve_recipe("demo", ["run.name=mine"])
    folder = run_folder.create_run(recipe.run, "demo", recipe.dump_yaml(), 2)
    result = kilobatch("cancel", "mine")
    assert (result.code, result.err) == (2, "kilobatch: runs/mine was not submitted, so there is no job to cancel\n")
    result = kilobatch("resume", "mine", "--workers", "2", "--nodes", "2")
    assert result.err == "kilobatch: --workers goes on here, --nodes on a cluster; give one of them\n"
    run_folder.set_status(folder, "finished", 2)
    result = kilobatch("resume", "mine", "--cluster", "cpu")
    assert "has finished" in result.err
    assert not (folder / "job.json").exists()
