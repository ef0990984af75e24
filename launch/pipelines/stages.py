"""Reads the recipes of a pipeline's stages and checks them against each other, before the first stage begins. Loads no
torch."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from kilobatch.data.errors import UserError, choices
from kilobatch.data.sources.specs import class_names, describe_class_difference, differing_classes
from kilobatch.launch.pipelines import derived
from kilobatch.launch.pipelines.pipeline import PREDECESSOR_KEY, SCRATCH, STAGES, Pipeline, StageName
from kilobatch.launch.recipes import catalogue, overrides, references
from kilobatch.launch.recipes.data import with_absolute_paths
from kilobatch.launch.recipes.recipe import Recipe, read_recipe
from kilobatch.launch.recipes.settings import Settings
from kilobatch.launch.runs import run_folder

# Raises UserError for a recipe that is wrong. The mapping: recipes of runs that do not exist yet, by their folders.
Check = Callable[[Recipe, Settings, Mapping[str, Recipe]], None]
# keys that a pipeline sets itself, and what to use instead
_SET_BY_PIPELINE = {
    "run.name": "--name NAME",
    "method.start": "--pretrained RUN_OR_FILE",
    "method.teacher": "kilobatch train",
}


@dataclass(frozen=True)
class PipelineRequest:
    """A pipeline as the command line asks for it. labels: 1%, 0.01 or a file with the names of images; None: the
    recipe's own; scratch: whether the fine-tuned network is also trained without a start, to compare; teacher: who
    teaches in the one stage that is left then."""

    recipe: str
    overrides: list[str]
    labels: str | None = None
    pretrained: str | None = None
    self_distill: bool = False
    scratch: bool = False
    teacher: str | None = None


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline. name: one of STAGES, also the name of its run's folder; recipe_name: as a user writes
    it."""

    name: StageName
    recipe_name: str
    recipe: Recipe
    settings: Settings


@dataclass(frozen=True)
class PipelinePlan:
    """A pipeline that has not been created yet. top: the folder that will hold the stages' runs; notes: in words, the
    stages that have no recipe of their own and were derived from shipped ones."""

    top: Path
    pipeline: Pipeline
    stages: list[Stage]
    notes: list[str]


def plan_pipeline(request: PipelineRequest, name: str | None) -> PipelinePlan:
    """Reads the recipes of a pipeline's stages, each of which takes the run of the stage before it. Creates nothing.

    name: of the pipeline's folder; None for the recipe's name and the time. Raises UserError for an error in any of the
    recipes or overrides; the message names the stage.
    """
    names = _stage_names(request)
    overrides_of = _split_overrides(request.overrides, names)
    finetune, label_overrides = ("", []) if request.teacher else _finetune(request)
    recipes_and_overrides: dict[StageName, tuple[str, list[str]]] = {
        "pretrain": (request.recipe, []),
        "finetune": (finetune, label_overrides),
        "distill": (_sibling(request.recipe, "_selfdistill" if request.self_distill else "_distill"), []),
        SCRATCH: (finetune, [*label_overrides, "method.start=null"]),
    }
    given, origin = request.teacher or request.pretrained, "--teacher" if request.teacher else "the stage before"
    predecessor = references.absolute_reference(given) if given else None
    top = Path()
    stages: list[Stage] = []
    notes: list[str] = []
    for stage in names:
        recipe_name, own = recipes_and_overrides[stage]
        if stage == "distill" and stages:  # the student gets no label that its teacher did not have
            own = [f"data.labels={stages[-1].recipe.data.labels.model_dump_json()}"]
        # These stages have the encoder of the first one.
        if stage in ("finetune", SCRATCH) or (stage == "distill" and request.self_distill):
            # Its starting weights are those of its beginning: a later stage begins with what it has made of them.
            first = [text for text in overrides_of.stage.get("pretrain", []) if text.startswith("encoder.")]
            own = [*own, *(text for text in first if not text.startswith("encoder.start"))]
        if predecessor is not None and stage in PREDECESSOR_KEY:
            own = [*own, f"{PREDECESSOR_KEY[stage]}={json.dumps(predecessor)}"]
        if not stages and name is not None:
            own = [*own, f"run.name={json.dumps(name)}"]
        like_finetuned = overrides_of.stage["finetune"] if stage == SCRATCH else []
        changes = [*own, *overrides_of.all, *like_finetuned, *overrides_of.stage[stage]]
        with naming_stage(stage, overrides_of.all):
            found, recipe, settings = _read_stage(request, stage, recipe_name, changes, stages, overrides_of.all)
            if predecessor is not None and stage in PREDECESSOR_KEY:
                settings.origins[tuple(PREDECESSOR_KEY[stage].split("."))] = origin
            recipe = with_absolute_paths(recipe)
        if found != recipe_name:
            notes.append(f"{stage}: {derived.describe(recipe, found, recipe_name, request.recipe)}")
        if not stages:
            top = run_folder.new_run_path(recipe.run, Path(request.recipe).stem)
        options = recipe.run.model_copy(update={"folder": str(top), "name": stage})
        stages.append(Stage(stage, found, recipe.model_copy(update={"run": options}), settings))
        predecessor = str(top.absolute() / stage)
    recipes: dict[StageName, str] = {stage.name: stage.recipe_name for stage in stages}
    pipeline = Pipeline(
        recipes=recipes,
        labels=request.labels,
        pretrained=request.pretrained,
        teacher=request.teacher,
        overrides=request.overrides,
    )
    return PipelinePlan(top, pipeline, stages, notes)


def _stage_names(request: PipelineRequest) -> tuple[StageName, ...]:
    if request.teacher:
        of_others = {"--pretrained": request.pretrained, "--labels": request.labels, "--scratch": request.scratch}
        if other := next((option for option, given in of_others.items() if given), None):
            raise UserError(f"--teacher leaves the distillation alone, and {other} is of a stage before; leave one out")
        return ("distill",)
    names = STAGES[1:] if request.pretrained else STAGES
    return (*names, SCRATCH) if request.scratch else names


def _read_stage(
    request: PipelineRequest,
    stage: StageName,
    name: str,
    changes: list[str],
    stages: list[Stage],
    overrides_of_all: list[str],
) -> tuple[str, Recipe, Settings]:
    """The recipe of a stage with its changes, and its name: that of a shipped one from which it was derived, where a
    recipe of one's own has none for this stage.

    Raises UserError where there is neither.
    """
    if name == request.recipe or _exists(name):
        return name, *read_recipe(name, changes)
    if not catalogue.is_path(request.recipe):
        raise UserError(_missing_recipe_message(request.recipe, name))
    first = read_recipe(request.recipe, overrides_of_all)[0] if not stages else stages[0].recipe
    if first.method.name != derived.METHOD:
        way_out = f"a recipe of one's own with method.name={derived.METHOD} needs none"
        raise UserError(f"{_missing_recipe_message(request.recipe, name)}; {way_out}")
    shipped, own = derived.derived(first, stage, request.self_distill, changes)
    recipe, settings = read_recipe(shipped, [*own, *changes])
    sources = {*overrides.read_overrides(own).origins.values()}
    place = f"{request.recipe}, for this stage"
    settings.origins |= {key: place for key, origin in settings.origins.items() if origin in sources}
    return shipped, recipe, settings


def create_runs(planned: PipelinePlan, workers: int) -> list[Path]:
    """Creates the pipeline's folder, and in it a run for each stage. Returns the runs. Raises UserError where they
    cannot be written."""
    runs = [
        run_folder.create_run(stage.recipe.run, stage.recipe_name, stage.recipe.dump_yaml(), workers)
        for stage in planned.stages
    ]
    planned.pipeline.write(planned.top)
    return runs


def check_stages(planned: PipelinePlan, check: Check) -> None:
    """Raises UserError for the first stage whose recipe does not fit its data or the stage before it. check: checks one
    stage."""
    awaited: dict[str, Recipe] = {}
    for stage in planned.stages:
        with naming_stage(stage.name):
            check(stage.recipe, stage.settings, awaited)
        awaited[str(planned.top.absolute() / stage.name)] = stage.recipe
    named = {stage.name: stage for stage in planned.stages}
    if "finetune" in named:
        _check_same_classes(named["finetune"], named["distill"])


def _check_same_classes(teacher: Stage, student: Stage) -> None:
    specs = [stage.recipe.data.train for stage in (teacher, student)]
    if specs[0] == specs[1]:
        return
    learned, needed = (class_names(spec, "train") for spec in specs)
    by_place = getattr(student.recipe.method, "classes_by", "name") == "place"
    if len(learned) != len(needed) or (not by_place and differing_classes(learned, needed)):
        raise UserError(
            f"{student.name}: {student.settings.where(('data', 'train'))}: data.train '{specs[1]}' ({len(needed)} "
            f"classes) has other classes than '{specs[0]}' of {teacher.name} ({len(learned)}); only in one of them: "
            f"{describe_class_difference(learned, needed)}"
        )


@dataclass(frozen=True)
class _Overrides:
    """Overrides of a pipeline. all: for all stages; stage: by stage, for that one alone."""

    all: list[str]
    stage: dict[str, list[str]]


def _split_overrides(texts: list[str], stages: tuple[StageName, ...]) -> _Overrides:
    """Separates overrides of one stage (`finetune.schedule.epochs=3`) from those of all stages (`optimizer.name=sgd`).
    Raises UserError."""
    split = _Overrides([], {stage: [] for stage in stages})
    for text in texts:
        first, dot, rest = text.partition(".")
        head = first.partition("=")[0]
        if head in (*STAGES, SCRATCH):
            if head not in stages:
                why = "--scratch adds it" if head == SCRATCH else "as --teacher or --pretrained stands for it"
                raise UserError(f"override '{text}': there is no stage {head} here, {why}")
            if not dot:
                raise UserError(f"override '{text}' is not of the form stage.section.key=value")
            split.stage[head].append(rest)
        elif head in (*Recipe.model_fields, *overrides.SHORT):
            rest = text
            split.all.append(text)
        else:
            known = [*STAGES, *Recipe.model_fields]
            raise UserError(f"override '{text}': '{head}' is neither a stage nor a section{choices(head, known)}")
        key = rest.partition("=")[0]
        if key in _SET_BY_PIPELINE or (key == "run.folder" and rest != text):
            alternative = _SET_BY_PIPELINE.get(key, "run.folder=FOLDER for all stages")
            raise UserError(f"override '{text}': a pipeline sets {key} itself; use {alternative}")
    return split


def _finetune(request: PipelineRequest) -> tuple[str, list[str]]:
    """The name of the fine-tuning's recipe, and its overrides for the labels. For 1 % of them the recipe is
    BASE_finetune_1pct where that exists, else BASE_finetune."""
    base = _sibling(request.recipe, "_finetune")
    if request.labels is None:
        return base, []
    share = _share(request.labels)
    if share is None:
        if not Path(request.labels).is_file():
            raise UserError(
                f"--labels {request.labels} is neither a share, such as 1% or 0.01, nor a file that is here"
            )
        return base, [f"data.labels.list={json.dumps(str(Path(request.labels).absolute()))}"]
    name = _sibling(request.recipe, f"_finetune_{float(share * 100):g}pct")
    if _exists(name):
        return name, []
    return base, [f"data.labels.share={float(share)}"]


def _share(text: str) -> Decimal | None:
    """The share that `1%` or `0.01` means; None for text that is not a number. Raises UserError for a number that is
    not a share."""
    try:
        number = Decimal(text.removesuffix("%"))
    except InvalidOperation:
        return None
    share = number / 100 if text.endswith("%") else number
    if not 0 < share <= 1 or (share == 1 and text != "100%"):
        raise UserError(f"--labels {text}: write 1% or 0.01 for a hundredth of the labels, 100% for all of them")
    return share


def _sibling(name: str, suffix: str) -> str:
    """The recipe whose name has the suffix, such as simclr_v2_digits_distill; for a file, in the same folder."""
    path = Path(name)
    return str(path.with_name(path.stem + suffix + path.suffix)) if path.suffix in (".yaml", ".yml") else name + suffix


def _missing_recipe_message(base: str, name: str) -> str:
    names = catalogue.recipe_names()
    complete = [known for known in names if {f"{known}_finetune", f"{known}_distill"} <= {*names}]
    near = f"recipes with all stages: {', '.join(complete)}"
    return f"a pipeline of {base} needs the recipe '{name}', which is not there; {near}"


def _exists(name: str) -> bool:
    return Path(name).is_file() if catalogue.is_path(name) else name in catalogue.recipe_names()


@contextmanager
def naming_stage(stage: str, overrides_of_all: Sequence[str] = ()) -> Iterator[None]:
    """Adds to the message of a UserError the stage that it is about, and how to change that stage alone."""
    try:
        yield
    except UserError as error:
        message = str(error)
        override = next((text for text in overrides_of_all if f"override '{text}'" in message), None)
        hint = f"; for one stage alone: STAGE.{override}, with STAGE one of {', '.join(STAGES)}" if override else ""
        raise UserError(f"{stage}: {message}{hint}") from error
