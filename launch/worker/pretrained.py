"""Methods as other runs left them: what fine-tuning starts from, and what distillation learns from."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import BaseModel, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kilobatch.data.errors import Refusal, did_you_mean
from kilobatch.data.files import sha256, write_whole
from kilobatch.launch.recipes import method_options, recipe
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.recipes.references import PINNED, metadata_of, place, recipe_in
from kilobatch.methods.method import Method
from kilobatch.methods.networks import build as encoders
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.trainer.checkpoint.description import DESCRIPTION, is_checkpoint
from kilobatch.trainer.checkpoint.reader import newest, open_saved

METHOD, ENCODER = "method.", "encoder."  # prefixes of names
FOREIGN = ("fc.weight", "fc.bias", "heads.head.weight", "heads.head.bias", "encoder.pos_embedding")  # torchvision's own


class EncoderAlone(Method):
    """What a file that holds an encoder and nothing else gives: no head, no classifier."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder


class Origin(BaseModel):
    """The checkpoint's folder or the file that a reference stands for, its step, and the SHA-256 of its content (of a
    checkpoint: of its description, which holds those of all its files)."""

    path: Path
    step: int
    sha256: str


class Pinned:
    """A run's references, each resolved once, by rank 0, and written into its folder: a resume takes up the very same
    weights, although the other run may have gone on."""

    def __init__(self, run: Path, rank: int, ranks: int) -> None:
        self.file, self.rank, self.ranks = run / PINNED, rank, ranks

    def trained(self, where: str) -> Method:
        """All ranks together. Raises Refusal, on rank 0, where `where` is not what it was at first."""
        found: list[Origin | None] = [self._origin(where) if self.rank == 0 else None]
        if self.ranks > 1:
            dist.broadcast_object_list(found, src=0)
        assert found[0]
        return load(found[0].path)

    def _origin(self, where: str) -> Origin:
        known = self._known()
        if where not in known:
            known[where] = resolve(where)
            listed = {name: origin.model_dump(mode="json") for name, origin in known.items()}
            write_whole(self.file, [json.dumps(listed, indent=1).encode() + b"\n"])
            return known[where]
        then = known[where]
        if not then.path.exists():
            raise Refusal(
                f"{then.path}, which this run began with ('{where}' at step {then.step}), is not there any more; put "
                "it back, or start a new run"
            )
        if resolve(str(then.path)).sha256 != then.sha256:
            raise Refusal(
                f"{then.path} has another content than when this run began with it ('{where}' at step {then.step}); "
                "put the old one back, or start a new run"
            )
        return then

    def _known(self) -> dict[str, Origin]:
        try:
            return TypeAdapter(dict[str, Origin]).validate_json(self.file.read_bytes())
        except FileNotFoundError:
            return {}
        except ValidationError as error:
            raise Refusal(f"{self.file} is damaged ({error.errors()[0]['msg']}); start a new run") from None


def trained(where: str) -> Method:
    """A method as training left it: on the CPU, in eval mode, without gradients.

    where: a run's folder or its name under runs/ (the newest whole checkpoint), a checkpoint's folder, or a file that
    `kilobatch export` or import wrote. Memories that each rank keeps its own share of are as at the start.
    Raises Refusal for what is absent or damaged.
    """
    return load(resolve(where).path)


def resolve(where: str) -> Origin:
    """Reads and checks every byte. Raises Refusal for what is absent or damaged."""
    path = place(where).absolute()
    if path.is_file():
        step = metadata_of(path).get("step", "0")
        return Origin(path=path, step=int(step), sha256=sha256(path))
    if is_checkpoint(path):
        open_saved(path)
    else:
        run, path = path, newest(path / "checkpoints", _warn)
        if path is None:
            raise Refusal(f"{run} has no checkpoint yet; train it first: kilobatch resume {run}")
    return Origin(path=path, step=open_saved(path, verify=False).step, sha256=sha256(path / DESCRIPTION))


def load(path: Path) -> Method:
    """trained(), of a checkpoint's folder or a file that resolve() has checked."""
    method = _from_file(path) if path.is_file() else _from_checkpoint(path)
    return method.eval().requires_grad_(False)


def build(chosen: Recipe, images: int, classes: int) -> Method:
    """The recipe's method, prepared, as torch's random state initialises it."""
    method = method_options.build(chosen.method, encoders.build(chosen.encoder))
    method.prepare(images, classes)
    return method


@torch.no_grad()
def restore(method: Method, read: Callable[[str], Tensor]) -> None:
    """Weights and buffers, read by their names in checkpoints; not memories that each rank keeps its own share of."""
    for name, tensor in method.state_dict().items():
        if name not in method.own_buffers:
            tensor.copy_(read(METHOD + name))


def _warn(damage: str) -> None:
    print(f"kilobatch: warning: {damage}", file=sys.stderr, flush=True)


def _from_checkpoint(path: Path) -> Method:
    saved = open_saved(path, verify=False)
    missing = [name for name in ("recipe", "images", "classes") if name not in saved.meta]
    if missing:
        raise Refusal(f"checkpoint {path} does not say its {' or '.join(missing)}; name one that this version has made")
    with torch.random.fork_rng(devices=[]):
        method = build(recipe.given(saved.meta["recipe"], str(path)), saved.meta["images"], saved.meta["classes"])
    restore(method, saved.whole)
    return method


def _from_file(path: Path) -> Method:
    metadata = metadata_of(path)
    chosen = recipe_in(metadata, path)
    try:
        with safe_open(path, framework="pt") as file, torch.random.fork_rng(devices=[]):
            names = set(file.keys())
            if any(name.startswith(METHOD) for name in names):
                method = build(chosen, int(metadata["images"]), int(metadata["classes"]))
                own = {METHOD + name for name in method.own_buffers}
                _refuse_differing(path, names, {METHOD + name for name in method.state_dict()} - own)
                restore(method, file.get_tensor)
            else:
                method = EncoderAlone(encoders.build(chosen.encoder))
                _refuse_differing(path, names - {*FOREIGN}, set(method.encoder.state_dict()))
                restore(method, lambda name: file.get_tensor(name.removeprefix(METHOD + ENCODER)))
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise Refusal(f"{path} does not hold what its recipe says ({error}); export it again") from None
    return method


def _refuse_differing(path: Path, found: set[str], expected: set[str]) -> None:
    if missing := sorted(expected - found):
        raise Refusal(
            f"{path} lacks {len(missing)} tensors of its recipe's method, such as '{missing[0]}'; export it again"
        )
    if extra := sorted(found - expected):
        raise Refusal(
            f"{path} holds {len(extra)} tensors that its recipe's method has not, such as '{extra[0]}'"
            f"{did_you_mean(extra[0], expected)}; export it again"
        )
