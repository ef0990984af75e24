"""Loads methods that other runs have trained: fine-tuning starts from them, and distillation learns from them."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kilobatch.data.errors import UserError, did_you_mean, warn
from kilobatch.data.files import sha256
from kilobatch.launch.recipes import method_options
from kilobatch.launch.recipes.recipe import Recipe, recipe_from
from kilobatch.launch.recipes.references import (
    is_foreign,
    locate_reference,
    locate_weights,
    metadata_of,
    names_of_classes,
    recipe_in,
)
from kilobatch.launch.runs.identity import ReferenceIdentity, add_reference, read_references
from kilobatch.methods import collectives
from kilobatch.methods.backbone_names import NETWORK
from kilobatch.methods.method import DataFacts, Method
from kilobatch.methods.networks import build, keyed_layers
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.methods.networks.weights.network import classifier_of, network_of
from kilobatch.methods.networks.weights.report import StartReport
from kilobatch.methods.networks.weights.start import start_encoder
from kilobatch.methods.networks.weights.state_file import read_places
from kilobatch.methods.papers.finetune import FineTune
from kilobatch.trainer import adversarial
from kilobatch.trainer.checkpoint.description import DESCRIPTION, is_checkpoint
from kilobatch.trainer.checkpoint.exported_file import check_seal
from kilobatch.trainer.checkpoint.reader import newest, open_saved
from kilobatch.trainer.ranks import phase

METHOD, ENCODER = "method.", "encoder."  # prefixes of tensors' names
FOREIGN = (
    "fc.weight",
    "fc.bias",
    "heads.head.weight",
    "heads.head.bias",
    "encoder.pos_embedding",
)  # tensors that only torchvision's networks have


class EncoderAlone(Method):
    """A method of an encoder only, without head and classifier, from a file that holds no more."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder


class PinnedReferences:
    """A run's references, each resolved once, by rank 0, and written into the run's identity.json: so a resumed run
    loads the same weights as at first, although the other run may have been trained on.

    check: called on rank 0 with a reference and what it stands for, before it is loaded; network: encoder.name of
    files of other packages, None: it is found.
    """

    def __init__(self, run: Path, check: Callable[[str, ReferenceIdentity], None], network: str | None = None) -> None:
        self.run, self.check, self.network = run, check, network

    def load(self, where: str) -> Method:
        """Loads the method that a reference stands for; all ranks call it together. Raises UserError, on rank 0, where
        the reference has changed since this run first loaded it."""
        path = collectives.from_rank_0(lambda: self._resolve(where, weights=True)).path
        return load_foreign(path, self.network) if is_foreign(path) else load_resolved(path)

    def load_encoder_start(self, options: EncoderOptions, encoder: Encoder) -> None:
        """Gives an encoder the weights that its options name, and writes into the run's identity.json what was loaded;
        all ranks call it together. Raises UserError where they do not fit."""
        assert options.start is not None
        found = collectives.from_rank_0(lambda: self._resolve(str(options.start), weights=True))
        loaded = start_from(found.path, options, encoder)
        if collectives.rank() == 0:
            phase.announce(f"encoder.start {found.path}: {loaded}")
            add_reference(self.run, options.start, found.model_copy(update={"loaded": loaded}))

    def _resolve(self, where: str, weights: bool = False) -> ReferenceIdentity:
        first = read_references(self.run).get(where)
        if first is None:
            found = resolve_reference(where, weights)
            self.check(where, found)
            add_reference(self.run, where, found)
            return found
        if not first.path.exists():
            raise UserError(
                f"{first.path}, which this run began with ('{where}' at step {first.step}), is not there any more; put "
                "it back, or start a new run"
            )
        if resolve_reference(str(first.path), weights).sha256 != first.sha256:
            raise UserError(
                f"{first.path} has another content than when this run began with it ('{where}' at step {first.step}); "
                "put the old one back, or start a new run"
            )
        self.check(where, first)
        return first


def load_method(where: str) -> Method:
    """A method as training left it: on the CPU, in eval mode, without gradients.

    where: a run's folder or its name under runs/ (the newest whole checkpoint), a checkpoint's folder, or a file that
    `kilobatch export` or import wrote. Memories that each rank keeps its own share of are as at the start.
    Raises UserError where it is absent or damaged.
    """
    return load_resolved(resolve_reference(where).path)


def start_from(path: Path, options: EncoderOptions, encoder: Encoder) -> StartReport:
    """Gives an encoder the weights of a checkpoint's folder or a file that resolve_reference has verified. Raises
    UserError where they do not fit."""
    try:
        if is_foreign(path):
            return start_encoder(encoder, *read_places(path), options.start_share, options.start_prefix)
        tensors = dict(load_resolved(path).kept_encoder.state_dict())
        loaded = start_encoder(encoder, {"": tensors}, [], options.start_share, options.start_prefix)
        return loaded.model_copy(update={"package": "kilobatch"})
    except UserError as error:
        raise UserError(f"encoder.start '{options.start}': {error}") from error


def load_foreign(path: Path, network: str | None) -> Method:
    """A method of an encoder, and a classifier where there is one, from a file of another package. network: its
    encoder.name; None: it is found. Raises UserError where the file does not say the network, or lacks a part of it."""
    try:
        places, top = read_places(path)
        with torch.random.fork_rng(devices=[]):
            options = network_of(places, top) if network is None else EncoderOptions.model_validate({"name": network})
            encoder = build.build_encoder(options)
            report = start_encoder(encoder, places, top, 1.0)
            linear = classifier_of(places, report)
            method = EncoderAlone(encoder) if linear is None else FineTune(encoder, layer=0)
            if linear is not None:
                method.prepare(DataFacts(0, len(linear[0])))
                method.load_state_dict({"classifier.weight": linear[0], "classifier.bias": linear[1]}, strict=False)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return method.eval().requires_grad_(False)


def resolve_reference(where: str, weights: bool = False) -> ReferenceIdentity:
    """Finds the checkpoint or file of a reference, and verifies every byte of it; weights: a file may be of another
    package. Raises UserError where it is absent or damaged."""
    path = (locate_weights(where) if weights else locate_reference(where)).absolute()
    if weights and is_foreign(path):
        return ReferenceIdentity(path=path, step=0, sha256=sha256(path))
    if path.is_file():
        metadata = metadata_of(path)
        check_seal(path)
        step, classes = int(metadata.get("step", "0")), names_of_classes(metadata)
        return ReferenceIdentity(path=path, step=step, sha256=sha256(path), classes=classes)
    if is_checkpoint(path):
        open_saved(path)
    else:
        run, path = path, newest(path / "checkpoints", warn)
        if path is None:
            raise UserError(f"{run} has no checkpoint yet; train it first: kilobatch resume {run}")
    saved = open_saved(path, verify=False)
    return ReferenceIdentity(
        path=path, step=saved.step, sha256=sha256(path / DESCRIPTION), classes=names_of_classes(saved.meta)
    )


def load_resolved(path: Path) -> Method:
    """Loads a method, as load_method does, from a checkpoint's folder or a file that resolve_reference has verified."""
    method = _from_file(path) if path.is_file() else _from_checkpoint(path)
    return method.eval().requires_grad_(False)


def build_of_recipe(recipe: Recipe, data: DataFacts, start: Callable[[Encoder], None] | None = None) -> Method:
    """The recipe's method, prepared, initialised from torch's random state. start: gives the encoder its weights before
    the method is made around it, which may copy it, as a momentum encoder does."""
    encoder = build.build_encoder(recipe.encoder, recipe.data.sizes)
    if start is not None:
        start(encoder)
    method = method_options.build_method(recipe.method, encoder)
    method.prepare(data)
    keyed_layers.use_keyed_layers(method, "method")  # those of heads, too
    if recipe.engine.adversarial:
        adversarial.add_norms(method)
    return method


@torch.no_grad()
def restore(method: Method, read: Callable[[str], Tensor]) -> None:
    """Sets weights and buffers to what `read` returns for their names in checkpoints; leaves out the memories of which
    each rank keeps a share."""
    for name, tensor in method.state_dict().items():
        if name not in method.own_buffers:
            tensor.copy_(read(METHOD + name))


def _from_checkpoint(path: Path) -> Method:
    saved = open_saved(path, verify=False)
    missing = [name for name in ("recipe", "images", "classes") if name not in saved.meta]
    if missing:
        raise UserError(
            f"checkpoint {path} does not say its {' or '.join(missing)}; name one that this version has made"
        )
    with torch.random.fork_rng(devices=[]):
        facts = DataFacts(saved.meta["images"], saved.meta["classes"])
        method = build_of_recipe(recipe_from(saved.meta["recipe"], str(path)), facts)
    restore(method, saved.whole)
    return method


def _from_file(path: Path) -> Method:
    metadata = metadata_of(path)
    recipe = recipe_in(metadata, path)
    try:
        with safe_open(path, framework="pt") as file, torch.random.fork_rng(devices=[]):
            names = set(file.keys())
            if any(name.startswith(METHOD) for name in names):
                method = build_of_recipe(recipe, DataFacts(int(metadata["images"]), int(metadata["classes"])))
                own = {METHOD + name for name in method.own_buffers}
                _refuse_differing(path, names, {METHOD + name for name in method.state_dict()} - own)
                restore(method, file.get_tensor)
            else:
                method = EncoderAlone(build.build_encoder(recipe.encoder, recipe.data.sizes))
                # A file has the names that the network's own library gives.
                before = NETWORK if recipe.encoder.foreign else ""
                expected = {name.removeprefix(before) for name in method.kept_encoder.state_dict()}
                _refuse_differing(path, names - {*FOREIGN}, expected)
                restore(method, lambda name: file.get_tensor(name.removeprefix(METHOD + ENCODER + before)))
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} does not hold what its recipe says ({error}); export it again") from None
    return method


def _refuse_differing(path: Path, found: set[str], expected: set[str]) -> None:
    if missing := sorted(expected - found):
        raise UserError(
            f"{path} lacks {len(missing)} tensors of its recipe's method, such as '{missing[0]}'; export it again"
        )
    if extra := sorted(found - expected):
        raise UserError(
            f"{path} holds {len(extra)} tensors that its recipe's method has not, such as '{extra[0]}'"
            f"{did_you_mean(extra[0], expected)}; export it again"
        )
