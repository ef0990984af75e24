"""Resources that a run asks a cluster for: those of cluster.yaml, with the command line's options on top. Loads no
torch."""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kilobatch.data.errors import Mistakes, UserError, choices
from kilobatch.data.files import read_record
from kilobatch.launch.recipes import validation_errors
from kilobatch.launch.recipes.catalogue import is_path
from kilobatch.launch.recipes.settings import Key, Settings, dump, format_path, read_file

LOCAL = "local"  # the name of the cluster that is this machine
ClusterKind = Literal["slurm", "local"]
# SLURM was seen to send the signal up to a minute early or late, so it is asked for it that much earlier.
SIGNAL_MARGIN_SECONDS = 60
_LOCAL_FIELDS = (
    "array_parallelism",
    "nodes",
    "gpus_per_node",
    "workers_per_node",
    "time",
    "signal_lead_seconds",
    "setup",
)  # those that have a meaning on this machine
_RESERVED = ("array", "error", "job-name", "mem", "no-requeue", "ntasks", "ntasks-per-node", "open-mode", "output")
_RESERVED += ("requeue", "signal", "chdir", "cpus-per-task")  # kilobatch sets them, and does not work with others
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")


def _text(value: Any) -> Any:
    """Numbers as text, since YAML reads `time: 90` and `exclude: 7` as numbers."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _minutes(time: str) -> int:
    """Minutes, rounded up, of a time as SLURM writes it: minutes, minutes:seconds, hours:minutes:seconds or
    days-hours[:minutes[:seconds]]."""
    match = _TIME.fullmatch(time)
    if match is None:
        raise ValueError(f"'{time}' is no time; write HH:MM:SS, D-HH:MM:SS or minutes")
    parts = [int(part) for part in match["clock"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        hours += 24 * int(match["days"])
    else:
        hours, minutes, seconds = (0, *parts, 0)[:3] if len(parts) < 3 else parts
    return hours * 60 + minutes + math.ceil(seconds / 60)


def _time(time: str) -> str:
    if _minutes(time) < 1:
        raise ValueError(f"'{time}' is no time to run in")
    return time


def _extra(extra: dict[str, Any]) -> dict[str, Any]:
    """Keys as sbatch writes them. Raises ValueError for a key that has an option of its own, and for a reserved one."""
    extra = {key.removeprefix("--").replace("_", "-"): value for key, value in extra.items()}
    options = [name.replace("_", "-") for name in Cluster.model_fields]
    for key in extra:
        if key in options:
            raise ValueError(f"'{key}' has an option of its own: --{key}")
        if key in _RESERVED:
            raise ValueError(f"'{key}' is set for each job; it cannot be changed")
    return extra


Text = Annotated[str, BeforeValidator(_text)]


class Cluster(BaseModel):
    """The resources of a job: keys of cluster.yaml, and options of `submit`, `pipeline`, `resume` and `drill`. The
    descriptions are the options' help texts."""

    model_config = ConfigDict(extra="forbid")

    partition: Text | None = Field(default=None, description="Partition to queue the job in.")
    account: Text | None = Field(default=None, description="Account that the job is charged to.")
    qos: Text | None = Field(default=None, description="Quality of service.")
    constraint: Text | None = Field(default=None, description="Features that nodes must have.")
    exclude: Text | None = Field(default=None, description="Nodes that must not be used.")
    nodes: int = Field(default=1, ge=1, description="Number of machines. Default: 1.")
    gpus_per_node: int = Field(
        default=0,
        ge=0,
        description="Number of GPUs on each machine, with one worker for each. Default: 0, which trains on CPUs.",
    )
    gpu_type: Text | None = Field(default=None, description="Type of GPU, such as a100, if the cluster wants it named.")
    workers_per_node: int | None = Field(
        default=None, ge=1, description="Number of workers on each machine, where they train on CPUs. Default: 1."
    )
    cpus_per_worker: int = Field(
        default=8,
        ge=1,
        description="CPU cores for each worker, which decode images and, without GPUs, train. Default: 8.",
    )
    mem_gb: float | None = Field(default=None, ge=0, description="Memory on each node, in GB; 0 for all that it has.")
    time: Annotated[Text, AfterValidator(_time)] | None = Field(
        default=None,
        description="Time limit of the job, HH:MM:SS. At the limit it is queued again, and the run goes on.",
    )
    array_parallelism: int = Field(
        default=256, ge=1, description="Runs of a sweep that may run at the same time. Default: 256."
    )
    comment: Text | None = Field(default=None, description="A comment, which the scheduler keeps with the job.")
    signal_lead_seconds: int = Field(
        default=120,
        ge=10,
        description="Seconds before the time limit at which the job has to stop and save. Default: 120.",
    )
    interface: Text | None = Field(default=None, description="Network interface for NCCL and gloo, such as ib0.")
    python: Text | None = Field(
        default=None, description="Command that starts Python on a node, if not the path of the Python that submits."
    )
    extra: Annotated[dict[str, str | int | float | bool], AfterValidator(_extra)] = Field(
        default={}, description="Another #SBATCH option, as KEY=VALUE or KEY. Can be given several times."
    )
    setup: list[str] = Field(
        default=[], description="Shell command to run before the workers start. Can be given several times."
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.gpus_per_node and self.workers_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"workers_per_node {self.workers_per_node} with gpus_per_node {self.gpus_per_node}: "
                "each GPU has one worker; leave workers_per_node out, or gpus_per_node 0"
            )
        if self.gpu_type and not self.gpus_per_node:
            raise ValueError(f"gpu_type {self.gpu_type} with gpus_per_node 0; say how many")
        return self

    @property
    def workers(self) -> int:
        """Workers on each node."""
        return self.gpus_per_node or self.workers_per_node or 1

    @property
    def minutes(self) -> int | None:
        return None if self.time is None else _minutes(self.time)

    def dump_yaml(self) -> str:
        """The fields that were set. `cluster_again` reads an equal Cluster back."""
        return dump(self.model_dump(mode="json", exclude_unset=True))


def personal_file() -> Path:
    """The cluster.yaml of the person who submits."""
    return Path.home() / ".config" / "kilobatch" / "cluster.yaml"


def choose_cluster(cluster_name: str | None, options: dict[str, Any]) -> tuple[ClusterKind, Cluster]:
    """The kind of cluster that a submission goes to, and the resources that it asks for.

    cluster_name: a YAML file, a name among the `clusters` of the person's own file, `local`, or None for that file's
    `default`; options: those of the command line, by field, None or [] where not given, `extra` as a list of KEY=VALUE.
    Raises UserError for whatever is wrong in either.
    """
    is_file = cluster_name is not None and is_path(cluster_name)
    path = Path(cluster_name) if is_file and cluster_name else personal_file()
    settings = read_file(path) if is_file or path.is_file() else Settings()
    clusters, default = (settings.values.pop(key, None) for key in ("clusters", "default"))
    clusters = {} if clusters is None else clusters
    if not isinstance(clusters, dict) or not all(isinstance(values, dict) for values in clusters.values()):
        raise UserError(
            f"{settings.where(('clusters',))}: clusters holds a name for each cluster, and its keys below it"
        )
    name, where = (
        (cluster_name, "--cluster") if cluster_name and not is_file else (default, settings.where(("default",)))
    )
    if name not in (None, LOCAL, *clusters):
        hint = choices(str(name), sorted([LOCAL, *clusters]))
        raise UserError(f"{where}: there is no cluster '{name}' in {format_path(path)}{hint}")
    if name is None and clusters and not settings.values:
        several = ", ".join([*sorted(clusters), LOCAL])
        raise UserError(f"{format_path(path)} has several clusters and no default; give --cluster ({several})")
    # The keys outside `clusters` describe SLURM: cluster local takes none of them.
    base = Settings() if name == LOCAL else _section(settings, ())
    if name is not None and name in clusters:
        base = base.under(_section(settings, ("clusters", name), clusters[name]))
    cluster = _validated(base.under(_from_command_line(options, base)))
    kind: ClusterKind = "local" if name == LOCAL else "slurm"
    return kind, _checked(kind, cluster)


def cluster_again(kind: ClusterKind, path: Path, options: dict[str, Any]) -> Cluster:
    """The resources of a run's last submission (its cluster.yaml), with the command line's options on top. Raises
    UserError where the file is missing or damaged."""
    try:
        asked_for_nothing = read_record(path).strip() in (b"", b"{}")
    except FileNotFoundError:
        raise UserError(f"{path} is missing, so that the resources are not known; give --cluster NAME") from None
    base = Settings() if asked_for_nothing else _section(read_file(path), ())
    return _checked(kind, _validated(base.under(_from_command_line(options, base))))


def _section(settings: Settings, key: Key, values: dict[str, Any] | None = None) -> Settings:
    """The section at `key`, moved below the key `cluster`, which the messages name."""
    origins = {("cluster", *at[len(key) :]): place for at, place in settings.origins.items() if at[: len(key)] == key}
    return Settings({"cluster": settings.values if values is None else values}, origins)


def _from_command_line(options: dict[str, Any], base: Settings) -> Settings:
    """The command line's options as settings."""
    values = {name: value for name, value in options.items() if value not in (None, [])}
    origins: dict[Key, str] = {("cluster", name): flag(name) for name in values}
    if "extra" in values:
        pairs = [text.partition("=") for text in values["extra"]]
        values["extra"] = {key: value if equals else True for key, equals, value in pairs}
        origins |= {("cluster", "extra", key): flag("extra") for key in values["extra"]}
    if "setup" in values:
        setup = base.values.get("cluster", {}).get("setup")
        values["setup"] = [*(setup if isinstance(setup, list) else []), *values["setup"]]
    return Settings({"cluster": values}, origins)


def flag(name: str) -> str:
    """The command line's option for a field: --gpu and --signal-lead for gpu_type and signal_lead_seconds."""
    return "--" + name.removesuffix("_seconds").removesuffix("_type").replace("_", "-")


def names_cluster(workers: int | None, cluster_name: str | None, resources: dict[str, Any], verb: str) -> bool:
    """Returns whether the command line names a cluster or resources of one. verb: what a run with --workers does, for
    the message. Raises UserError where both --workers and a cluster are given."""
    options = [flag(name) for name, value in resources.items() if value not in (None, [])]
    options += ["--cluster"] if cluster_name else []
    if workers is not None and options:
        raise UserError(f"--workers {verb} here, {options[0]} on a cluster; give one of them")
    return bool(options)


class _Whole(BaseModel):
    model_config = ConfigDict(extra="forbid")
    cluster: Cluster


def _validated(settings: Settings) -> Cluster:
    try:
        return _Whole.model_validate_json(json.dumps(settings.values), strict=True).cluster
    except ValidationError as error:
        mistakes = Mistakes()
        validation_errors.note(error, settings, _Whole, mistakes)
        mistakes.refuse()
        raise


def _checked(kind: ClusterKind, cluster: Cluster) -> Cluster:
    """The same cluster. Raises UserError for resources that its kind of cluster does not have, or cannot do without."""
    if kind == "local":
        if foreign := sorted(cluster.model_fields_set - set(_LOCAL_FIELDS)):
            raise UserError(f"{flag(foreign[0])} means nothing to cluster local, which is this machine; leave it out")
        if cluster.nodes != 1:
            raise UserError(f"nodes is {cluster.nodes}, but cluster local is this machine alone; use 1")
    elif cluster.minutes is None:
        raise UserError("a job has a time limit: give --time HH:MM:SS, or time: in cluster.yaml")
    lead = lead_seconds(kind, cluster)
    if cluster.minutes is not None and cluster.minutes * 60 <= lead:
        raise UserError(
            f"time {cluster.time} has no room to train: the job is asked to stop {lead} s before its end "
            f"(signal_lead_seconds {cluster.signal_lead_seconds}); use more time"
        )
    return cluster


def lead_seconds(kind: ClusterKind, cluster: Cluster) -> int:
    """Seconds before the time limit at which the scheduler is asked to signal."""
    return cluster.signal_lead_seconds + (SIGNAL_MARGIN_SECONDS if kind == "slurm" else 0)
