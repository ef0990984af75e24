"""The machines of a plan: data sheets, published rates and assumptions, each with its source. Loads no torch."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kilobatch.data.cpus import has_bf16_units
from kilobatch.data.errors import UserError, choices
from kilobatch.data.files import cache_root, parse_json
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.trainer.options import Precision

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """A kind of GPU and its links. memory: bytes of one GPU; bandwidth: of that memory; inside, between: of a GPU's
    link to the other GPUs of its node and to other nodes, one way; all three in bytes per second. None: not known
    beforehand. usual: the machine that these numbers describe."""

    name: str
    memory: int | None
    bandwidth: float | None
    inside: float | None
    between: float | None
    usual: str


def _gpu(name: str, mib: int, memory_tb: float, inside: float, between: float, usual: str) -> tuple[str, Machine]:
    return name, Machine(name, mib * 2**20, memory_tb * 1e12, inside * 1e9, between * 1e9, usual)


# docs/plan.md names the page behind each number. memory: what nvidia-smi shows, not the round number of the data sheet
# (an L40S of 48 GB has 45.0 GiB).
MACHINES = dict(
    (
        _gpu("h100", 81_559, 3.35, 450, 50, "SXM, NVLink 4; one 400 Gb/s port for each GPU, as in a DGX H100"),
        _gpu("h200", 143_771, 4.8, 450, 50, "SXM, NVLink 4; one 400 Gb/s port for each GPU, as in a DGX H200"),
        _gpu("a100", 81_920, 2.039, 300, 25, "SXM, 80 GB, NVLink 3; one 200 Gb/s port for each GPU, as in a DGX A100"),
        _gpu("a100-40", 40_960, 1.555, 300, 25, "SXM, 40 GB, NVLink 3; one 200 Gb/s port for each GPU, DGX A100"),
        _gpu("v100", 32_510, 0.9, 150, 6.25, "SXM2, 32 GB, NVLink 2; four 100 Gb/s ports for eight GPUs, DGX-1"),
        _gpu("v100-16", 16_160, 0.9, 150, 6.25, "SXM2, 16 GB, NVLink 2; four 100 Gb/s ports for eight GPUs, DGX-1"),
        _gpu("l40s", 46_068, 0.864, 32, 12.5, "PCIe 4.0 x16; one 100 Gb/s port for each GPU (an assumption)"),
        ("cpu", Machine("cpu", None, None, None, None, "this machine's memory; its rates by --measured")),
    )
)

# ResNet-50 at 224 pixels, forward and backward, takes 24.3 GFLOP an image (counted by the same pass as a plan's), of
# which an A100 of 2.039 TB/s trains 2,470 a second in 16 bits and 938 in TF32: NVIDIA's DeepLearningExamples,
# PyTorch/Classification/ConvNets/resnet50v1.5. The same pages have 1,156 in 16 bits and 356 in fp32 for a V100 of
# 0.9 TB/s: 31.2 and 9.6 operations a byte. So memory's bandwidth is taken to be the limit of these networks.
FLOP_PER_BYTE = {"bf16": 29.4, "fp16": 29.4, "fp32": 11.2}

LINK_SHARE = 0.8  # of a link's rate in the data sheet, for a large collective: 235 of an A100's 300 GB/s, by others
# Seconds of a hop from a rank to the next. In a node: an all-reduce of 32 KiB over eight H200 takes 18 µs, 14 hops.
# Between nodes: NCCL's own constant for trees; one over four nodes of eight B200 has been measured at 18 µs a hop.
HOPS = 1.3e-6, 5e-6
RESERVED = 2 * GIB  # of a GPU's memory, for CUDA, NCCL and cuDNN; an assumption
FRAGMENTS = 0.05  # share of a GPU's memory that its allocator cannot use; an assumption
# Views a second of one core, of 224 pixels, two from each JPEG of 256; measured, see docs/plan.md.
VIEWS_PER_CORE = {"cuda": 4352.0, "cpu": 2283.0}

ASSUMED = (
    f"compute: {FLOP_PER_BYTE['bf16']} (16 bits) or {FLOP_PER_BYTE['fp32']} (fp32) operations per byte of the GPU's "
    "memory bandwidth: ResNet-50 on an A100 as NVIDIA publishes it; nothing better is known of other networks",
    f"communication: rings, or trees where quicker, at {LINK_SHARE:.0%} of the slowest link's data sheet, "
    f"{HOPS[0] * 1e6:.1f} µs a hop within a node and {HOPS[1] * 1e6:.0f} between nodes; nothing overlaps with compute",
    f"memory: {RESERVED // GIB} GiB of a GPU for CUDA, NCCL and cuDNN, and {FRAGMENTS:.0%} lost to fragments",
    f"loader: {VIEWS_PER_CORE['cuda']:,.0f} views a second and core for a GPU, {VIEWS_PER_CORE['cpu']:,.0f} with all "
    "operations on a CPU, of 224 pixels from photographs of 256 (measured on one EPYC core); other sizes by pixels",
)


class Measured(BaseModel):
    """Rates a second that `kilobatch bench --out FILE` has measured; a plan uses them instead of the assumed ones."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    device: str
    flops: Annotated[float, Field(gt=0, description="of a training step, floating-point operations")]
    views: Annotated[float, Field(gt=0, description="views of one core, as this device needs them")]
    link: Annotated[float, Field(gt=0, description="bytes that a rank sends in a large all-reduce")] | None = None
    latency: Annotated[float, Field(gt=0, description="seconds from a rank to the next")] | None = None
    gpu: Annotated[str | None, Field(description="the GPU's name, as the driver has it")] = None
    whole: Annotated[bool, Field(exclude=True, description="false: of the encoder alone, without the loader's")] = True
    described: Annotated[str, Field(exclude=True, description="the machine, and when it was measured, in words")] = ""


# Of a GPU's full name, as nvidia-smi has it, these parts say nothing that its model and memory do not.
_MAKER = re.compile(r"nvidia|tesla|gpu|sxm\d?|nvlink|hbm\w*")


def find_machine(name: str) -> Machine:
    """The machine that a name means, such as a100, A100-SXM4-80GB or "NVIDIA H100 80GB HBM3". Raises UserError for an
    unknown one."""
    if (found := _known(name)) is None:
        raise UserError(f"--gpu is '{name}'{choices(name, MACHINES)}")
    return found


def _known(name: str) -> Machine | None:
    if (found := MACHINES.get(name.strip().lower())) is not None:
        return found
    parts = [part for part in re.split(r"[\s_-]+", name.strip().lower()) if part and not _MAKER.fullmatch(part)]
    model, *sizes = parts or [""]
    fitting = [machine for known, machine in MACHINES.items() if known.partition("-")[0] == model]
    gigabytes = [int(size[1]) for part in sizes if (size := re.fullmatch(r"(\d+)(gb|gib|g)?", part))]
    if len(gigabytes) != len(sizes) or len(sizes) > 1:
        return None
    if gigabytes:  # 80 GB are written for 80 GiB, and for the 79.6 that are left of them
        fitting = [one for one in fitting if one.memory and abs(one.memory / GIB / gigabytes[0] - 1) < 0.07]
    return fitting[0] if fitting else None


def ranks_per_node(where: str, cpu: bool, gpus: int | None, workers: int | None) -> int | None:
    """The ranks of a machine, by --gpus-per-node and --workers-per-node; None: neither was given.

    where: what trains, as a clause; cpu: it has no GPU. Raises UserError for the one that has no meaning there, and for
    less than 1.
    """
    option, count = ("--workers-per-node", workers) if cpu else ("--gpus-per-node", gpus)
    other, meant = ("--gpus-per-node", gpus) if cpu else ("--workers-per-node", workers)
    if meant is not None:
        why = "it trains on CPUs" if cpu else "each GPU has one worker"
        raise UserError(f"{other} is {meant}, and {where}: {why}; use {option} {meant}")
    if count is not None and count < 1:
        raise UserError(f"{option} is {count}; it should be 1 or more")
    return count


def read_measured(file: Path) -> Measured:
    """Reads the rates in a file. Raises UserError for a file that `kilobatch bench --out` has not written."""
    try:
        return _read_bench(file, f"the machine of {file}")
    except OSError as error:
        raise UserError(f"--measured {file}: {error.strerror}; kilobatch bench --out {file} makes one") from error
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"--measured {file} is not what kilobatch bench --out writes; make it anew") from error


def kept_bench(device: str) -> Path:
    """The file in which `kilobatch bench` keeps its newest result on this machine: of its "cpu", or of its "cuda"."""
    return cache_root() / "bench" / f"{device}.json"


def read_kept(machine: Machine) -> Measured | None:
    """The rates that this machine has measured of itself; None: none, or of another kind of GPU. Raises UserError for a
    file that is damaged."""
    file = kept_bench("cpu" if machine.bandwidth is None else "cuda")
    if not file.is_file():
        return None
    try:
        measured = _read_bench(file, "this machine")
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{file} is not what kilobatch bench writes; remove it, or run kilobatch bench anew") from error
    return measured if machine.bandwidth is None or _known(measured.gpu or "") is machine else None


def _read_bench(file: Path, machine: str) -> Measured:
    content = parse_json(file.read_bytes())
    when = f" on {content['time']}" if "time" in content else ""
    return Measured.model_validate({**content["rates"], "described": f"{machine}{when}"})


def precision_on(machine: Machine) -> Precision:
    """What engine.precision auto is on this machine: bf16 where it has units for it. A CPU is this machine's."""
    if machine.bandwidth is None:
        return "bf16" if has_bf16_units() else "fp32"
    return "fp32" if machine.name.startswith("v100") else "bf16"


def on_machine(recipe: Recipe, machine: Machine) -> Recipe:
    """The recipe with the precision that it has on this machine."""
    return recipe.model_copy(update={"engine": recipe.engine.decided(precision_on(machine))})
