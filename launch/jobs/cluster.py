"""What a run asks of a cluster: a person's cluster.yaml with the command line's options on top. Loads no torch."""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kilobatch.data.errors import Refusal, did_you_mean
from kilobatch.launch.recipes import validation_errors as explain
from kilobatch.launch.recipes.settings import Key, Settings, dump, read_file, shown_path

LOCAL = "local"  # the name of the cluster that is this machine
KIND = Literal["slurm", "local"]
# SLURM was seen to send the signal up to a minute early or late: so it is asked for that much earlier.
SIGNAL_SLACK = 60
_HERE = (
    "array_parallelism",
    "nodes",
    "gpus_per_node",
    "workers_per_node",
    "time",
    "signal_lead_seconds",
    "setup",
)  # what this machine understands
_OURS = ("array", "error", "job-name", "mem", "no-requeue", "ntasks", "ntasks-per-node", "open-mode", "output")
_OURS += ("requeue", "signal", "chdir", "cpus-per-task")  # what the job's own working rests on
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")


def _text(value: Any) -> Any:
    """YAML reads `time: 90` and `exclude: 7` as numbers."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _minutes(time: str) -> int:
    """SLURM's forms of a time: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
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
    """Keys as sbatch writes them. Those that have an option, or that a job's working rests on, are not for here."""
    extra = {key.removeprefix("--").replace("_", "-"): value for key, value in extra.items()}
    options = [name.replace("_", "-") for name in Cluster.model_fields]
    for key in extra:
        if key in options:
            raise ValueError(f"'{key}' has an option of its own: --{key}")
        if key in _OURS:
            raise ValueError(f"'{key}' is set for each job; it cannot be changed")
    return extra


Text = Annotated[str, BeforeValidator(_text)]


class Cluster(BaseModel):
    """Keys of cluster.yaml, and options of `submit` and `resume`."""

    model_config = ConfigDict(extra="forbid")

    partition: Text | None = Field(default=None, description="Where to queue.")
    account: Text | None = Field(default=None, description="Who pays.")
    qos: Text | None = Field(default=None, description="Quality of service.")
    constraint: Text | None = Field(default=None, description="Features that nodes must have.")
    exclude: Text | None = Field(default=None, description="Nodes to stay away from.")
    nodes: int = Field(default=1, ge=1, description="Machines.")
    gpus_per_node: int = Field(default=0, ge=0, description="With a worker for each; 0 trains on CPUs.")
    gpu_type: Text | None = Field(default=None, description="Where the cluster asks for it, such as a100.")
    workers_per_node: int | None = Field(default=None, ge=1, description="On CPUs; 1 if not given.")
    cpus_per_worker: int = Field(default=8, ge=1, description="To decode images and, without GPUs, to train; 8.")
    mem_gb: float | None = Field(default=None, ge=0, description="Of each node; 0 for all it has.")
    time: Annotated[Text, AfterValidator(_time)] | None = Field(
        default=None, description="Limit of one job, HH:MM:SS; the run goes on in the next."
    )
    array_parallelism: int = Field(default=256, ge=1, description="Points of a sweep at the same time; 256.")
    comment: Text | None = Field(default=None, description="For the scheduler's books.")
    signal_lead_seconds: int = Field(
        default=120, ge=10, description="Before the time limit, for the last step and its checkpoint; 120."
    )
    interface: Text | None = Field(default=None, description="Network interface of NCCL and gloo, such as ib0.")
    python: Text | None = Field(default=None, description="What starts Python on a node, if not this one.")
    extra: Annotated[dict[str, str | int | float | bool], AfterValidator(_extra)] = Field(
        default={}, description="Another #SBATCH key, KEY=VALUE or KEY; again for more."
    )
    setup: list[str] = Field(default=[], description="A shell line before the run; again for more.")

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
        """On each node."""
        return self.gpus_per_node or self.workers_per_node or 1

    @property
    def minutes(self) -> int | None:
        return None if self.time is None else _minutes(self.time)

    def dump_yaml(self) -> str:
        """What was asked for. `again` reads it back equal."""
        return dump(self.model_dump(mode="json", exclude_unset=True))


def personal() -> Path:
    return Path.home() / ".config" / "kilobatch" / "cluster.yaml"


def choose(given: str | None, options: dict[str, Any]) -> tuple[KIND, Cluster]:
    """The resources that a submission asks for.

    given: a YAML file, a name among the `clusters` of the person's own file, `local`, or None: that file's `default`.
    options: the command line's, by field; None and [] where not given. `extra` is a list of KEY=VALUE.
    Raises Refusal for whatever is wrong in either.
    """
    is_file = given is not None and (given.endswith((".yaml", ".yml")) or "/" in given)
    path = Path(given) if is_file and given else personal()
    settings = read_file(path) if is_file or path.is_file() else Settings()
    named, default = (settings.values.pop(key, None) for key in ("clusters", "default"))
    named = {} if named is None else named
    if not isinstance(named, dict) or not all(isinstance(one, dict) for one in named.values()):
        raise Refusal(f"{settings.where(('clusters',))}: clusters holds a name for each cluster, and its keys below it")
    name, where = (given, "--cluster") if given and not is_file else (default, settings.where(("default",)))
    if name not in (None, LOCAL, *named):
        known = did_you_mean(str(name), [LOCAL, *named])
        raise Refusal(f"{where}: there is no cluster '{name}' in {shown_path(path)}{known}")
    if name is None and named and not settings.values:
        several = ", ".join([*sorted(named), LOCAL])
        raise Refusal(f"{shown_path(path)} has several clusters and no default; give --cluster ({several})")
    # What stands outside `clusters` describes SLURM, and so none of it is for this machine.
    base = Settings() if name == LOCAL else _below(settings, ())
    if name is not None and name in named:
        base = base.under(_below(settings, ("clusters", name), named[name]))
    chosen = _validated(base.under(_asked(options, base)))
    kind: KIND = "local" if name == LOCAL else "slurm"
    return kind, _for(kind, chosen)


def again(kind: KIND, path: Path, options: dict[str, Any]) -> Cluster:
    """The resources of a run's last submission (its cluster.yaml), with the command line's options on top."""
    base = _below(read_file(path), ()) if path.read_bytes().strip() not in (b"", b"{}") else Settings()
    return _for(kind, _validated(base.under(_asked(options, base))))


def _below(settings: Settings, key: Key, values: dict[str, Any] | None = None) -> Settings:
    """One section, moved below the key `cluster`, which the messages name."""
    origins = {("cluster", *at[len(key) :]): place for at, place in settings.origins.items() if at[: len(key)] == key}
    return Settings({"cluster": settings.values if values is None else values}, origins)


def _asked(options: dict[str, Any], base: Settings) -> Settings:
    """The command line's options as settings."""
    given = {name: value for name, value in options.items() if value not in (None, [])}
    origins: dict[Key, str] = {("cluster", name): flag(name) for name in given}
    if "extra" in given:
        pairs = [text.partition("=") for text in given["extra"]]
        given["extra"] = {key: value if equals else True for key, equals, value in pairs}
        origins |= {("cluster", "extra", key): flag("extra") for key in given["extra"]}
    if "setup" in given:
        before = base.values.get("cluster", {}).get("setup")
        given["setup"] = [*(before if isinstance(before, list) else []), *given["setup"]]
    return Settings({"cluster": given}, origins)


def flag(name: str) -> str:
    """The command line's option for a field."""
    return "--" + name.removesuffix("_seconds").replace("_", "-")


def named(workers: int | None, given: str | None, resources: dict[str, Any], does: str) -> bool:
    """Whether the command line names a cluster or resources of one. does: what a run with --workers does here, for the
    message. Raises Refusal where it names both."""
    options = [flag(name) for name, value in resources.items() if value not in (None, [])]
    options += ["--cluster"] if given else []
    if workers is not None and options:
        raise Refusal(f"--workers {does} here, {options[0]} on a cluster; give one of them")
    return bool(options)


class _Whole(BaseModel):
    model_config = ConfigDict(extra="forbid")
    cluster: Cluster


def _validated(settings: Settings) -> Cluster:
    try:
        return _Whole.model_validate_json(json.dumps(settings.values), strict=True).cluster
    except ValidationError as error:
        raise explain.refusal(error, settings, _Whole) from error


def _for(kind: KIND, cluster: Cluster) -> Cluster:
    """The cluster, once it is known to be of its kind."""
    if kind == "local":
        if foreign := sorted(cluster.model_fields_set - set(_HERE)):
            raise Refusal(f"{flag(foreign[0])} means nothing to cluster local, which is this machine; leave it out")
        if cluster.nodes != 1:
            raise Refusal(f"nodes is {cluster.nodes}, but cluster local is this machine alone; use 1")
    elif cluster.minutes is None:
        raise Refusal("a job has a time limit: give --time HH:MM:SS, or time: in cluster.yaml")
    lead = lead_seconds(kind, cluster)
    if cluster.minutes is not None and cluster.minutes * 60 <= lead:
        raise Refusal(
            f"time {cluster.time} has no room to train: the job is asked to stop {lead} s before its end "
            f"(signal_lead_seconds {cluster.signal_lead_seconds}); use more time"
        )
    return cluster


def lead_seconds(kind: KIND, cluster: Cluster) -> int:
    """How long before the time limit the scheduler is told to signal."""
    return cluster.signal_lead_seconds + (SIGNAL_SLACK if kind == "slurm" else 0)
