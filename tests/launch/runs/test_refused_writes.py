"""Every writer of a run's files meets a full disk with one plain message that names the file."""

import subprocess
import sys
from pathlib import Path

# A limit of a file's size stands for the full disk: the kernel refuses each write alike.
PROGRAM = """
import io, resource, sys
from pathlib import Path

import torch
from rich.console import Console

from kilobatch.data.errors import UserError
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.final_evaluation import FinalEvaluation
from kilobatch.launch.runs.job_history import JobFile
from kilobatch.trainer.evaluate.image_sample import ImageSample
from kilobatch.trainer.monitor.monitor import Monitor
from kilobatch.trainer.monitor.progress_file import Progress

run = Path(sys.argv[1])
monitor = Monitor(run, 10, 0, 1, Console(file=io.StringIO()))
run_folder.set_status(run, "running", 1)
sample = ImageSample(torch.rand(4, 3), torch.zeros(4, dtype=torch.int64), torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
job = JobFile(cluster="local", job_id="1", submitted=job_history.utc_now(), code="code/001")
writers = {
    "metrics.jsonl": lambda: monitor.log(1, {"train/loss": 1.0}),
    "progress.json": lambda: Progress(step=1, steps=2, epoch=0.5, epochs=1, time=0.0).write(run),
    "pictures/views.png": lambda: monitor.images(torch.rand(4, 2, 3, 8, 8), (0, 0, 0), (1, 1, 1)),
    "tensorboard": lambda: monitor.embedding(1, sample, ["a"]),
    "attempts.jsonl": lambda: job_history.record_end(run, 1, "finished"),
    "job.json": lambda: job_history.write_job_file(run, job),
    "evaluation.json": lambda: FinalEvaluation(step=1, parts={}).write(run),
    "state.json": lambda: run_folder.set_status(run, "failed", 1),
}
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
for name, write in writers.items():
    try:
        write()
        print("no refusal")
    except UserError as refusal:
        print(refusal)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("left:", sorted(path.name for path in run.rglob(".*")))
"""


def test_each_file_is_named_with_the_cause_and_the_way_out(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    *said, left = done.stdout.splitlines()
    names = "metrics.jsonl progress.json pictures/views.png tensorboard attempts.jsonl job.json"
    names += " evaluation.json state.json"
    way_out = "no room left (File too large); free some, or move the run folder to another disk"
    assert said == [f"{tmp_path / name} could not be written: {way_out}" for name in names.split()]
    assert left == "left: []", "a file that could not be written takes no room"
