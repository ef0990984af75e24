"""Runs one step of a recipe's method on fake tensors, to count what it holds, computes and sends. Takes no memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kilobatch.data.batch import Batch, Clock, blank
from kilobatch.data.beton_layout import ArrayForm
from kilobatch.launch.planning.fake_parts import FakeParts, Parts
from kilobatch.launch.planning.fake_tensors import FlopCounter, Traffic, fake_ranks
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.recipes.references import is_foreign, is_teacher, locate_weights, recipe_of, references
from kilobatch.launch.worker.pretrained import build_of_recipe, load_foreign
from kilobatch.methods.memories.momentum_encoder import MomentumEncoder
from kilobatch.methods.method import DataFacts, Memory, Method
from kilobatch.methods.networks import batch_norm
from kilobatch.trainer.costs.memory_probe import MemoryTracker
from kilobatch.trainer.optim import optimizers
from kilobatch.trainer.optim.parameter_groups import freeze_parameters
from kilobatch.trainer.ranks.phase import phase


@dataclass(frozen=True)
class StepLayout:
    """The part of a global batch that a rank computes: so many samples, in equal chunks; ranks: of the whole run."""

    ranks: int
    samples: int
    chunks: int


@dataclass(frozen=True)
class Step:
    """Bytes and floating-point operations of a step of one rank.

    held: bytes that live from step to step, without the optimizer's state; trained: elements of the parameters that are
    trained; groups: the same by group of the optimizer; tensors: number of these parameters; state: bytes of the
    optimizer's state, unsharded; updating: bytes that its step allocates for itself, unsharded.
    kept: bytes of one chunk's graph, between its forward and its backward; moments: bytes at the peak of each moment of
    the step, besides `held`. forward, backward, target: operations of one chunk; loss: of the whole batch, with those
    that arrange it. Those that make adversarial views are among target and loss.
    sent: collectives, of one chunk where they are per chunk; in_chunks: whether the batch can be computed in chunks.
    """

    held: Parts
    trained: int
    groups: tuple[int, ...]
    tensors: int
    state: int
    updating: int
    kept: int
    moments: Mapping[str, Parts]
    forward: int
    backward: int
    target: int
    loss: int
    sent: Traffic
    in_chunks: bool

    def flops(self, layout: StepLayout, keep: int) -> int:
        """The operations of a step. keep: chunks that keep their graph; the forward of the others runs twice."""
        repeated = max(0, layout.chunks - keep) * self.forward if layout.chunks > 1 else 0
        return layout.chunks * (self.target + self.forward + self.backward) + repeated + self.loss


def run_fake_step(
    recipe: Recipe, layout: StepLayout, images: int, classes: int, fields: Sequence[ArrayForm] = ()
) -> Step:
    """Runs a step of the recipe on fake tensors. images, classes: of data.train; fields: those that the method reads.

    Raises UserError where the method does, for this many ranks or samples.
    """
    taught_by = [where for option, where in references(recipe).items() if is_teacher(option)]
    foreign = {where: path for where in taught_by if is_foreign(path := locate_weights(where))}
    network = getattr(recipe.method, "teacher_network", None)
    read = {where: load_foreign(path, network) for where, path in foreign.items()}  # files are not read as fake tensors
    with fake_ranks(layout.ranks) as sent:
        method = _method(recipe, images, classes)
        # A teacher is no submodule of the method, so it is noted here when the method loads it.
        teachers: list[Method] = []

        def load(where: str) -> Method:
            taught = as_fake(read[where]) if where in read else _method(recipe_of(where), images, classes)
            teachers.append(taught.eval().requires_grad_(False))
            return teachers[-1]

        method.load_pretrained(load, fresh=False)
        # Half of the training is done, so that the loss has all its terms.
        per_epoch = max(1, images // recipe.data.batch)
        clock = Clock(recipe.schedule.epochs * per_epoch // 2, recipe.schedule.epochs * per_epoch, per_epoch)
        batch = blank(layout.samples, recipe.data.groups, fields).replaced(clock=clock)
        return _run(recipe, layout, batch, method, teachers, sent)


def as_fake(method: Method) -> Method:
    """The method with tensors without data in the place of its own, within fake_ranks."""
    return method._apply(lambda x: torch.empty(x.shape, dtype=x.dtype))


def _method(recipe: Recipe, images: int, classes: int) -> Method:
    options = recipe.method
    queue = getattr(options, "queue", None)
    if queue is not None:  # counted as full from the start: fake tensors hold no number of keys
        options = options.model_copy(update={"queue": queue.model_copy(update={"start": "random"})})
    return build_of_recipe(recipe.model_copy(update={"method": options}), DataFacts(images, classes))


def _run(
    recipe: Recipe, layout: StepLayout, batch: Batch, method: Method, teachers: list[Method], sent: Traffic
) -> Step:
    freeze_parameters(method, recipe.optimizer)
    parameters = [p for p in method.parameters() if p.requires_grad]
    for p in parameters:
        if layout.chunks > 1:  # the gradients of the chunks before
            p.grad = torch.zeros_like(p)

    with MemoryTracker() as tracker, FlopCounter() as counter:
        _tell_progress(method, parameters, layout)
        for p in parameters:
            p.register_post_accumulate_grad_hook(lambda p: tracker.relabel(p.grad, "gradients"))  # pyright: ignore
        parts = FakeParts(method, batch, layout.chunks, recipe.engine.precision, tracker, counter, sent)
        parts.arrange()
        parts.targets()
        if recipe.engine.adversarial:
            parts.attack(recipe.engine.adversarial)
        parts.forward()
        if layout.chunks == 1:
            parts.loss_and_backward()
        else:
            parts.loss_and_backward_in_chunks()
        parts.update()

    groups, state, updating = _optimizer_memory(recipe, method, parameters)
    return Step(
        held=_held(method, teachers, parameters),
        trained=sum(p.numel() for p in parameters),
        groups=groups,
        tensors=len(parameters),
        state=state,
        updating=updating,
        kept=parts.kept,
        moments=parts.moments,
        forward=parts.flops["forward"],
        backward=parts.flops["backward"],
        target=parts.flops["targets"] + parts.flops["attack"],
        loss=parts.flops["loss"] + parts.flops["arrange"],
        sent=sent,
        in_chunks=not (method.whole_batch or batch_norm.requires_whole_batch(method)),
    )


def _tell_progress(method: Method, parameters: list[nn.Parameter], layout: StepLayout) -> None:
    """Tells those who wait how many parameters were used, and how many have a gradient."""
    left, total = {*map(id, parameters)}, 2 * len(parameters)
    chunks = f" in {layout.chunks} chunks" if layout.chunks > 1 else ""
    work, used = f"planning {layout.samples:,} images a rank{chunks}, weights forward and back", 0

    def use(own: set[int], module: nn.Module, inputs: object) -> None:
        nonlocal used
        used += len(own & left)
        left.difference_update(own)
        phase(work, used, total)

    def back(p: Tensor) -> None:
        nonlocal used
        used += 1
        phase(work, min(used, total), total)

    phase(work, 0, total)
    for module in method.modules():
        if own := {id(p) for p in module.parameters(recurse=False)}:
            module.register_forward_pre_hook(partial(use, own))
    for p in parameters:
        p.register_post_accumulate_grad_hook(back)


def _optimizer_memory(
    recipe: Recipe, method: Method, parameters: list[nn.Parameter]
) -> tuple[tuple[int, ...], int, int]:
    """Elements of each of the optimizer's groups, bytes of its state, and bytes that its step allocates for itself."""
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer = optimizers.build_optimizer(recipe.optimizer, method, recipe.data.batch)
    with MemoryTracker() as tracker:
        optimizer.step()
        state = sum(
            x.numel() * x.element_size() for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)
        )
    groups = tuple(sum(p.numel() for p in group["params"]) for group in optimizer.param_groups)
    return groups, state, tracker.peak - state


def _held(method: Method, teachers: list[Method], parameters: list[nn.Parameter]) -> dict[str, int]:
    """Bytes that live on a rank's device from step to step, by label."""
    trained = {id(p) for p in parameters}
    memories = {id(x) for m in method.modules() if isinstance(m, Memory) for x in m.buffers()}
    momentum_encoders = {id(x) for m in method.modules() if isinstance(m, MomentumEncoder) for x in _tensors(m)}
    held: dict[str, int] = {}

    def add(label: str, x: Tensor) -> None:
        held[label] = held.get(label, 0) + x.numel() * x.element_size()

    for x in _tensors(method):
        if id(x) in trained:
            add("weights", x)
        elif id(x) in memories:
            add("queue or bank", x)
        elif id(x) in momentum_encoders:
            add("momentum encoder", x)
        else:
            add("frozen weights and statistics", x)
    for teacher in teachers:
        for x in _tensors(teacher):
            add("teacher", x)
    return held


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
