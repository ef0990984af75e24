"""The recipes of a pipeline's stages, read and checked against each other before the first begins. Loads no torch."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from kilobatch.data.beton import verify
from kilobatch.data.errors import Refusal, did_you_mean
from kilobatch.data.sources.specs import open_source, unshared
from kilobatch.launch.pipelines.pipeline import STAGES, TAKES, Pipeline
from kilobatch.launch.recipes import catalogue, overrides, recipe, references
from kilobatch.launch.recipes.data import with_absolute_paths
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.recipes.settings import Settings
from kilobatch.launch.runs import run_folder as runs

Check = Callable[[Recipe, Settings, Mapping[str, Recipe]], None]  # the last: of runs still to come, by their folders
_OURS = {"run.name": "--name NAME", "method.start": "--pretrained RUN_OR_FILE", "method.teacher": "kilobatch train"}


@dataclass(frozen=True)
class Asked:
    """As on the command line. labels: 1%, 0.01 or a file with the images' names; None: the recipe's own."""

    recipe: str
    overrides: list[str]
    labels: str | None = None
    pretrained: str | None = None
    self_distill: bool = False


@dataclass(frozen=True)
class Stage:
    """name: one of STAGES, and of its run's folder; recipe_name: as the user would write it."""

    name: str
    recipe_name: str
    recipe: Recipe
    settings: Settings


@dataclass(frozen=True)
class Plan:
    """top: the folder that will hold the stages' runs."""

    top: Path
    pipeline: Pipeline
    stages: list[Stage]


def plan(asked: Asked, name: str | None) -> Plan:
    """The stages of a pipeline, each taking from the one before. Nothing is made.

    name: of its folder; None: the recipe's and the time. Raises Refusal, which names the stage, for whatever is wrong
    in any of the recipes or overrides.
    """
    names = STAGES[1:] if asked.pretrained else STAGES
    changes = _split(asked.overrides, names)
    finetune, labels = _finetune(asked)
    ours = {
        "pretrain": (asked.recipe, []),
        "finetune": (finetune, labels),
        "distill": (_beside(asked.recipe, "_selfdistill" if asked.self_distill else "_distill"), []),
    }
    before = references.absolute(asked.pretrained) if asked.pretrained else None
    top = Path()
    stages: list[Stage] = []
    for stage in names:
        recipe_name, own = ours[stage]
        if stage == "distill":  # no label that its teacher did not have
            own = [f"data.labels={stages[-1].recipe.data.labels.model_dump_json()}"]
        if stage == "finetune" or (stage == "distill" and asked.self_distill):  # the same network
            own = [*own, *(text for text in changes.of.get("pretrain", []) if text.startswith("encoder."))]
        if before is not None:
            own = [*own, f"{TAKES[stage]}={json.dumps(before)}"]
        if not stages and name is not None:
            own = [*own, f"run.name={json.dumps(name)}"]
        if recipe_name != asked.recipe and not _exists(recipe_name):
            raise Refusal(_no_recipe(asked.recipe, recipe_name, stage))
        with of_stage(stage, changes.everywhere):
            chosen, settings = recipe.read(recipe_name, [*own, *changes.everywhere, *changes.of[stage]])
            if before is not None:
                settings.origins[tuple(TAKES[stage].split("."))] = "the stage before"
            chosen = with_absolute_paths(chosen)
        if not stages:
            top = runs.place(chosen.run, Path(asked.recipe).stem)
        options = chosen.run.model_copy(update={"folder": str(top), "name": stage})
        stages.append(Stage(stage, recipe_name, chosen.model_copy(update={"run": options}), settings))
        before = str(top.absolute() / stage)
    recipes = {stage.name: stage.recipe_name for stage in stages}
    pipeline = Pipeline(recipes=recipes, labels=asked.labels, pretrained=asked.pretrained, overrides=asked.overrides)
    return Plan(top, pipeline, stages)


def make(planned: Plan, workers: int) -> list[Path]:
    """The pipeline's folder, and in it a new run for each stage. Raises Refusal where they cannot be written."""
    made = [
        runs.create(stage.recipe.run, stage.recipe_name, stage.recipe.dump_yaml(), workers) for stage in planned.stages
    ]
    planned.pipeline.write(planned.top)
    return made


def check_all(planned: Plan, check: Check) -> None:
    """Raises Refusal for the first stage that does not fit its data or the stage before it. check: of one stage."""
    awaited: dict[str, Recipe] = {}
    for stage in planned.stages:
        with of_stage(stage.name):
            check(stage.recipe, stage.settings, awaited)
        awaited[str(planned.top.absolute() / stage.name)] = stage.recipe
    _same_classes(*planned.stages[-2:])


def _same_classes(teacher: Stage, student: Stage) -> None:
    specs = [stage.recipe.data.train for stage in (teacher, student)]
    if specs[0] == specs[1]:
        return
    mine, other = (_classes(spec) for spec in specs)
    if mine != other:
        raise Refusal(
            f"{student.name}: {student.settings.where(('data', 'train'))}: data.train '{specs[1]}' ({len(other)} "
            f"classes) has other classes than '{specs[0]}' of {teacher.name} ({len(mine)}); only in one of them: "
            f"{unshared(mine, other)}"
        )


def _classes(spec: str) -> list[str]:
    """Their names; decodes no image."""
    return verify(Path(spec).expanduser()).classes if spec.endswith(".beton") else open_source(spec, "train").classes


@dataclass(frozen=True)
class _Changes:
    everywhere: list[str]
    of: dict[str, list[str]]


def _split(texts: list[str], stages: tuple[str, ...]) -> _Changes:
    """`finetune.schedule.epochs=3` for one stage, `optimizer.name=sgd` for all of them. Raises Refusal."""
    changes = _Changes([], {stage: [] for stage in stages})
    for text in texts:
        first, dot, rest = text.partition(".")
        head = first.partition("=")[0]
        if head in STAGES:
            if head not in stages:
                raise Refusal(f"override '{text}': there is no stage {head} here, as --pretrained stands for it")
            if not dot:
                raise Refusal(f"override '{text}' is not of the form stage.section.key=value")
            changes.of[head].append(rest)
        elif head in (*Recipe.model_fields, *overrides.SHORT):
            rest = text
            changes.everywhere.append(text)
        else:
            known = [*STAGES, *Recipe.model_fields]
            raise Refusal(f"override '{text}': '{head}' is neither a stage nor a section{did_you_mean(head, known)}")
        key = rest.partition("=")[0]
        if key in _OURS or (key == "run.folder" and rest != text):
            way = _OURS.get(key, "run.folder=FOLDER for all stages")
            raise Refusal(f"override '{text}': a pipeline sets {key} itself; use {way}")
    return changes


def _finetune(asked: Asked) -> tuple[str, list[str]]:
    """The recipe of the fine-tuning, and what it changes for these labels: BASE_finetune_1pct for 1 % where there is
    one, else BASE_finetune."""
    base = _beside(asked.recipe, "_finetune")
    if asked.labels is None:
        return base, []
    share = _share(asked.labels)
    if share is None:
        if not Path(asked.labels).is_file():
            raise Refusal(f"--labels {asked.labels} is neither a share, such as 1% or 0.01, nor a file that is here")
        return base, [f"data.labels.list={json.dumps(str(Path(asked.labels).absolute()))}"]
    named = _beside(asked.recipe, f"_finetune_{float(share * 100):g}pct")
    if _exists(named):
        return named, []
    return base, [f"data.labels.share={float(share)}"]


def _share(text: str) -> Decimal | None:
    """Of `1%` or `0.01`; None for what is no number. Raises Refusal for one that is no share."""
    try:
        number = Decimal(text.removesuffix("%"))
    except InvalidOperation:
        return None
    share = number / 100 if text.endswith("%") else number
    if not 0 < share <= 1 or (share == 1 and text != "100%"):
        raise Refusal(f"--labels {text}: write 1% or 0.01 for a hundredth of the labels, 100% for all of them")
    return share


def _beside(name: str, suffix: str) -> str:
    """simclr_v2_digits -> simclr_v2_digits_distill; of a file, the one beside it."""
    path = Path(name)
    return str(path.with_name(path.stem + suffix + path.suffix)) if path.suffix in (".yaml", ".yml") else name + suffix


def _no_recipe(base: str, name: str, stage: str) -> str:
    whole = [known for known in catalogue.names() if {f"{known}_finetune", f"{known}_distill"} <= {*catalogue.names()}]
    near = f"recipes with all stages: {', '.join(whole)}"
    return f"a pipeline of {base} needs the recipe '{name}' for its stage {stage}, which is not there; {near}"


def _exists(name: str) -> bool:
    return Path(name).is_file() if name.endswith((".yaml", ".yml")) or "/" in name else name in catalogue.names()


@contextmanager
def of_stage(stage: str, everywhere: Sequence[str] = ()) -> Iterator[None]:
    """Refusals say which stage they are about, and how to change one stage alone."""
    try:
        yield
    except Refusal as refusal:
        said = str(refusal)
        alone = next((text for text in everywhere if f"override '{text}'" in said), None)
        hint = f"; for one stage alone: STAGE.{alone}, with STAGE one of {', '.join(STAGES)}" if alone else ""
        raise Refusal(f"{stage}: {said}{hint}") from refusal
