"""What a run is asked: after its epochs, at its end, and of its newest checkpoint later on."""

import json
from pathlib import Path

from rich.console import Console

from kilobatch.data.beton import verify
from kilobatch.data.errors import Refusal
from kilobatch.data.loading.loader import PlainLoader
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.worker import pretrained as trained
from kilobatch.launch.worker.components import loader_of, method_of, prepared, threads_of
from kilobatch.launch.worker.process_group import World
from kilobatch.methods.method import Method
from kilobatch.trainer.checkpoint.reader import Saved
from kilobatch.trainer.evaluate import linear, moved, picture
from kilobatch.trainer.evaluate.options import Evaluator
from kilobatch.trainer.evaluate.suite import Scene
from kilobatch.trainer.loop import Loop

LABELS = {
    "classify/top1": "top-1 of its classifier",
    "classify/top5": "top-5 of its classifier",
    "classify_moved/top1": "top-1 of its classifier on moved images",
    "classify_moved/top5": "top-5 of its classifier on moved images",
    "knn/top1": "k-NN top-1 (k {knn.k}, temperature {knn.temperature:g})",
    "linear/top1": "linear top-1 (the papers' protocol: SGD on frozen features, augmented)",
    "linear/top5": "linear top-5 (the papers' protocol)",
    "fast_linear/top1": "fast linear top-1 (L-BFGS on cached features; not the papers' protocol)",
    "fast_linear/top5": "fast linear top-5 (L-BFGS on cached features)",
}


def scene_of(run: Path, chosen: Recipe, here: World, method: Method) -> Scene | None:
    """What evaluators look at; None where the recipe has no test set."""
    if chosen.data.test is None:
        return None
    train, test = prepared(chosen.data.train, "train"), prepared(chosen.data.test, "test")
    views, options = chosen.data.views, chosen.evaluate

    def clean(beton: Path) -> PlainLoader:
        return PlainLoader(
            beton,
            views.size,
            views.mean,
            views.std,
            batch=256,
            rank=here.rank,
            world=here.size,
            threads=threads_of(chosen, here),
            device=here.device,
        )

    return Scene(
        method=method,
        untrained=lambda: method_of(chosen).to(here.device),
        train=clean(train),
        test=clean(test),
        probe=lambda: loader_of(chosen, here, linear.probe_views(views), options.linear.batch),
        views=views,
        classes=verify(train).classes,
        options=options,
        folder=run,
    )


def after_epoch(chosen: Recipe, scene: Scene | None, epoch: int) -> dict[str, float]:
    every = chosen.evaluate.every_epochs
    return dict(scene.evaluate(chosen.evaluate.during)) if scene and every and epoch % every == 0 else {}


def final(run: Path, chosen: Recipe, scene: Scene, loop: Loop) -> None:
    """What the recipe asks for when training has ended."""
    values: dict[str, float] = {}
    for name in chosen.evaluate.final:
        values |= dict(scene.evaluate(name))
    seen = scene.gallery(scene.test, picture.ASKED)
    if loop.monitor:
        loop.monitor.log(loop.steps, {f"final/{name}": value for name, value in values.items()})
        loop.monitor.embedding(loop.steps, seen, scene.classes)
        _tell(values, chosen, scene)
        if "picture" in chosen.evaluate.final:
            drawn = run / "pictures" / "neighbours.png"
            loop.monitor.picture(loop.steps, drawn)
            print(f"picture: {drawn}", flush=True)


def evaluate(
    run: Path, chosen: Recipe, here: World, method: Method, saved: Saved | None, evaluators: list[Evaluator]
) -> None:
    """The newest checkpoint's answers, on the terminal and in evaluations.jsonl."""
    scene = scene_of(run, chosen, here, method)
    if saved is None or scene is None:
        raise Refusal(f"{run} has no {'checkpoint' if saved is None else 'test set (data.test is null)'} to evaluate")
    trained.restore(method, saved.whole)
    values = {key: value for name in evaluators for key, value in scene.evaluate(name)}
    if here.rank == 0:
        print(f"{run}, {saved.folder.name}, {chosen.data.test}:")
        _tell(values, chosen, scene)
        with (run / "evaluations.jsonl").open("a") as file:
            asked = chosen.evaluate.model_dump(mode="json", include=set(evaluators))
            line = {"step": saved.step, "test": chosen.data.test, **values, "options": asked}
            file.write(json.dumps(line) + "\n")


def _tell(values: dict[str, float], chosen: Recipe, scene: Scene) -> None:
    console = Console()
    if any(name.startswith("moved/") for name in values):
        console.print(moved.table(values))
    for name, value in values.items():
        if not name.startswith("moved/"):
            console.print(f"{LABELS[name].format(knn=chosen.evaluate.knn)}: {value:.2%}")
