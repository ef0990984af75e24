"""One step of a recipe's own method, on tensors without data: what it holds, computes and sends. Takes no memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kilobatch.data.batch import Batch
from kilobatch.launch.planning.fake_tensors import Sent, pretended
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.recipes.references import recipe_of
from kilobatch.launch.worker.pretrained import build
from kilobatch.methods.memories.momentum_encoder import MomentumEncoder
from kilobatch.methods.method import Memory, Method, Tensors
from kilobatch.methods.networks import batch_norm as norm
from kilobatch.trainer.costs.memory_probe import Watch
from kilobatch.trainer.optim import optimizers

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
Parts = Mapping[str, int]  # bytes by what they are


@dataclass(frozen=True)
class Layout:
    """What a rank computes: `samples` of the global batch of so many `ranks`, in equal chunks."""

    ranks: int
    samples: int
    chunks: int


@dataclass(frozen=True)
class Step:
    """Bytes and floating-point operations of one rank.

    held: all that lives from step to step but the optimizer's state; trained: elements of the parameters that are
    trained, groups: of each of the optimizer's groups, tensors: their number; state: bytes of the optimizer's,
    unsharded; updating: what its step takes for itself, unsharded.
    kept: one chunk's graph, between its forward and its backward; moments: what a step has beside that, by moment, at
    its peak. forward, backward, target: operations of one chunk; loss: of the whole batch.
    in_chunks: whether the batch can be computed in chunks.
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
    sent: Sent
    in_chunks: bool

    def flops(self, layout: Layout, keep: int) -> int:
        """Of a step, `keep` of whose chunks run once."""
        again = max(0, layout.chunks - keep) * self.forward if layout.chunks > 1 else 0
        return layout.chunks * (self.target + self.forward + self.backward) + again + self.loss


def step(recipe: Recipe, layout: Layout, images: int, classes: int) -> Step:
    """images, classes: of data.train. Raises Refusal where the method does, for this many ranks or samples."""
    with pretended(layout.ranks) as sent:
        method = _method(recipe, images, classes)
        # The teacher is no part of the method's state, and is asked for by its reference.
        teachers: list[Method] = []

        def trained(where: str) -> Method:
            teachers.append(_method(recipe_of(where), images, classes).eval().requires_grad_(False))
            return teachers[-1]

        method.take(trained, fresh=False)
        return _run(recipe, layout, method, teachers, sent)


def _method(recipe: Recipe, images: int, classes: int) -> Method:
    options = recipe.method
    queue = getattr(options, "queue", None)
    if queue is not None:  # counted full from the start, for how full it is would be data
        options = options.model_copy(update={"queue": queue.model_copy(update={"start": "random"})})
    return build(recipe.model_copy(update={"method": options}), images, classes)


def _run(recipe: Recipe, layout: Layout, method: Method, teachers: list[Method], sent: Sent) -> Step:
    views, n = recipe.data.views, layout.samples
    small = n // layout.chunks
    batch = Batch(torch.empty(n, views.count, 3, views.size, views.size), *torch.zeros(2, n, dtype=torch.int64))
    chunk = batch.chunks(layout.chunks)[0]
    parameters = [p for p in method.parameters() if p.requires_grad]
    moments: dict[str, Parts] = {}
    for p in parameters:
        if layout.chunks > 1:  # of the chunks before
            p.grad = torch.zeros_like(p)

    with Watch() as watch, FlopCounterMode(display=False) as count:
        for p in parameters:
            p.register_post_accumulate_grad_hook(lambda p: watch.relabel(p.grad, "gradients"))  # pyright: ignore

        @contextmanager
        def doing(label: str, purpose: str) -> Iterator[None]:
            watch.label, sent.purpose = label, purpose
            yield

        with doing("outputs", "targets"), torch.no_grad(), _autocast(recipe):
            t = method.target(chunk.views)
        target = count.get_total_flops()
        moments["targets"] = dict(watch.at_peak)

        watch.restart()
        with doing("activations", "BatchNorm"), _autocast(recipe):
            z = method.embed(chunk.views)
        kept, forward = watch.labelled["activations"], count.get_total_flops() - target
        moments["forward"] = dict(watch.at_peak)

        watch.restart()
        with doing("loss and embeddings", "loss"):
            if layout.chunks == 1:
                loss = method.loss(z, t, batch)
                done = count.get_total_flops()
                watch.label, sent.purpose = "activations", "BatchNorm"
                loss.backward()
                of_loss = done - forward - target
            else:
                leaves, t = _whole(z, n, True), _whole(t, n, False)
                loss = method.loss(leaves, t, batch)
                loss.backward()
                moments["loss"] = dict(watch.at_peak)
                of_loss = count.get_total_flops() - forward - target
                watch.restart()
                watch.label, sent.purpose = "activations", "BatchNorm"
                back = [(x * leaves[name].grad[:small]).sum() for name, x in z.items() if leaves[name].grad is not None]  # pyright: ignore
                torch.stack(back).sum().backward()
                z = leaves
        backward = count.get_total_flops() - forward - target - of_loss
        moments["backward"] = dict(watch.at_peak)
        del loss

        with doing("outputs", "BatchNorm's running statistics"):
            norm.commit(method)
        with doing("outputs", "memories"):
            method.update({name: x.detach() for name, x in z.items()}, t, batch, 0.5)

    groups, state, updating = _update(recipe, method, parameters)
    return Step(
        _held(method, teachers, parameters),
        sum(p.numel() for p in parameters),
        groups,
        len(parameters),
        state,
        updating,
        kept,
        moments,
        forward,
        backward,
        target,
        of_loss,
        sent,
        not (method.whole_batch or norm.requires_whole_batch(method)),
    )


def _autocast(recipe: Recipe) -> torch.autocast:
    precision = recipe.engine.precision
    return torch.autocast("cpu", AUTOCAST.get(precision), enabled=precision != "fp32")


def _whole(x: Tensors, n: int, leaf: bool) -> dict[str, Tensor]:
    """The outputs of all chunks, from one's; as leaves in fp32, as trainer.step has them."""
    every = {name: torch.empty(n, *part.shape[1:], dtype=part.dtype) for name, part in x.items()}
    if not leaf:
        return every
    return {k: x.float().requires_grad_() if x.is_floating_point() else x for k, x in every.items()}


def _update(recipe: Recipe, method: Method, parameters: list[nn.Parameter]) -> tuple[tuple[int, ...], int, int]:
    """Elements of the optimizer's groups, bytes of its state, and what its step takes for itself."""
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer = optimizers.build(recipe.optimizer, method, recipe.data.batch)
    with Watch() as watch:
        optimizer.step()
        held = sum(
            x.numel() * x.element_size() for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)
        )
    groups = tuple(sum(p.numel() for p in group["params"]) for group in optimizer.param_groups)
    return groups, held, watch.peak - held


def _held(method: Method, teachers: list[Method], parameters: list[nn.Parameter]) -> dict[str, int]:
    """What lives on a rank's device from step to step."""
    trained = {id(p) for p in parameters}
    memories = {id(x) for m in method.modules() if isinstance(m, Memory) for x in m.buffers()}
    followers = {id(x) for m in method.modules() if isinstance(m, MomentumEncoder) for x in _tensors(m)}
    held: dict[str, int] = {}

    def add(label: str, x: Tensor) -> None:
        held[label] = held.get(label, 0) + x.numel() * x.element_size()

    for x in _tensors(method):
        if id(x) in trained:
            add("weights", x)
        elif id(x) in memories:
            add("queue or bank", x)
        elif id(x) in followers:
            add("momentum encoder", x)
        else:
            add("frozen weights and statistics", x)
    for teacher in teachers:
        for x in _tensors(teacher):
            add("teacher", x)
    return held


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
