"""Runs a recipe's evaluators once its training has finished, each by itself: one that fails leaves the others' results.

Their state is kept in evaluation.json (launch.runs.final_evaluation), so that a part in which the process ends is known
by name. Workers of their own then ask only what has no result yet: they have neither optimizer nor training loop, so
that they hold less, and may be of any number.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from kilobatch.data.errors import UserError
from kilobatch.launch.recipes.data import PreparedData, labelled_of
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.runs.final_evaluation import (
    LAST_EPOCH,
    PROJECTOR,
    FinalEvaluation,
    PartResult,
    read_final_evaluation,
)
from kilobatch.launch.worker import pretrained
from kilobatch.launch.worker.baselines import with_baselines
from kilobatch.launch.worker.evaluation import after_epoch, baseline_values, describe_work, print_values, suite_of
from kilobatch.launch.worker.process_group import World
from kilobatch.methods import collectives
from kilobatch.methods.method import Method
from kilobatch.trainer.checkpoint.reader import Saved
from kilobatch.trainer.evaluate import picture
from kilobatch.trainer.evaluate.options import Evaluator
from kilobatch.trainer.evaluate.suite import EvaluationSuite
from kilobatch.trainer.monitor.learning import LearningFacts
from kilobatch.trainer.monitor.monitor import Monitor
from kilobatch.trainer.ranks import phase


class EvaluationFailed(RuntimeError):
    """A part of the evaluation has failed on one of several ranks, and the others may wait for it in a collective."""


@dataclass(frozen=True)
class _Outcome:
    """What a part has found. logged: values for metrics.jsonl; show: draws or writes it, on rank 0 alone."""

    logged: dict[str, float]
    show: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class EvaluationAfterTraining:
    """The evaluation of a training that is done and saved. All ranks make one and call run() together.

    step: of its end; monitor: rank 0's, None on the others.
    """

    run_folder: Path
    recipe: Recipe
    suite: EvaluationSuite
    step: int
    steps_per_epoch: int
    monitor: Monitor | None
    world: World

    def run(self, rest: bool) -> None:
        """Evaluates, logs and prints. rest: only what has no result yet, according to evaluation.json.

        A part that fails is noted there and told in one line. Raises EvaluationFailed where it cannot be left out, as
        other ranks may wait for this one.
        """
        record = self._record(rest)
        for name, part in record.parts.items():
            if part.state == "finished" and part.logged and self.monitor:  # the monitor has cut it off
                self.monitor.log(self.step, part.logged)
            if part.state == "due":
                phase.announce(self._describe(name))
                self._note(record, name, PartResult(state="running"))
                self._note(record, name, self._result(name))
        if self.world.rank == 0:
            values = {key: value for part in record.parts.values() for key, value in part.logged.items()}
            final = {key.removeprefix("final/"): value for key, value in values.items() if key.startswith("final/")}
            print_values(final, self.recipe, self.suite)

    def _record(self, rest: bool) -> FinalEvaluation:
        """The record that rank 0 makes, on every rank."""
        return collectives.from_rank_0(lambda: self._make_record(rest))

    def _make_record(self, rest: bool) -> FinalEvaluation:
        names = [*([LAST_EPOCH] if self._epoch_ended() else []), *dict.fromkeys(self.recipe.evaluate.final), PROJECTOR]
        new = FinalEvaluation(step=self.step, parts={name: PartResult() for name in names})
        before = read_final_evaluation(self.run_folder) if rest else None
        if before is not None and before.step == new.step:
            new.parts |= {name: part for name, part in before.parts.items() if name in new.parts}
        return new

    def _note(self, record: FinalEvaluation, name: str, result: PartResult) -> None:
        record.parts[name] = result
        if self.world.rank == 0:
            record.write(self.run_folder)

    def _result(self, name: str) -> PartResult:
        try:
            outcome = self._evaluate(name)
        except Exception as error:
            if self.world.size > 1:
                raise EvaluationFailed(f"the evaluation '{name}' failed: {_one_line(error)}") from error
            return self._failed(name, error)
        if self.monitor:
            try:  # no other rank waits for rank 0 here
                outcome.show()
                if outcome.logged:
                    self.monitor.log(self.step, outcome.logged)
            except Exception as error:
                return self._failed(name, error)
        return PartResult(state="finished", logged=outcome.logged)

    def _describe(self, name: str) -> str:
        if name == LAST_EPOCH:
            return f"evaluating: {describe_work(self.recipe.evaluate.during, self.recipe)}, after the last epoch"
        if name == PROJECTOR:
            return "writing the embedding for TensorBoard"
        return f"evaluating: {describe_work(name, self.recipe)}"

    def _failed(self, name: str, error: Exception) -> PartResult:
        why = _one_line(error)
        assert self.monitor is not None
        self.monitor.say(f"kilobatch: warning: the evaluation '{name}' failed: {why}")
        return PartResult(state="failed", why=why)

    def _epoch_ended(self) -> bool:
        every, (epoch, within) = self.recipe.evaluate.every_epochs, self._epoch()
        return within == 0 and every > 0 and epoch % every == 0

    def _epoch(self) -> tuple[int, int]:
        return divmod(self.step, self.steps_per_epoch)

    def _evaluate(self, name: str) -> _Outcome:
        """One part, on all ranks together."""
        suite, monitor, step = self.suite, self.monitor, self.step
        if name == LAST_EPOCH:
            epoch = self._epoch()[0]
            return _Outcome({"epoch": epoch, **after_epoch(self.recipe, suite, epoch)})
        if name == PROJECTOR:
            sample = suite.image_sample(suite.test, picture.QUERY_IMAGES)
            return _Outcome({}, lambda: monitor.embedding(step, sample, suite.classes) if monitor else None)
        if name == "picture":
            bank, queries = suite.picture_samples()
            return _Outcome({}, lambda: self._draw(bank, queries))
        values = suite.evaluate(cast(Evaluator, name))
        return _Outcome({f"final/{key}": value for key, value in values} | baseline_values(suite))

    def _draw(self, bank: picture.ImageSample, queries: picture.ImageSample) -> None:
        file = self.suite.draw(bank, queries)
        assert self.monitor is not None
        self.monitor.picture(self.step, file)
        print(f"picture: {file}", flush=True)


def evaluate_rest(
    run: Path, recipe: Recipe, data: PreparedData, world: World, method: Method, saved: Saved | None
) -> None:
    """Evaluates what has no result yet, in workers that have not trained. All ranks call it together.

    method: as the run's seed initialises it, on the device; saved: the newest checkpoint, of the training's end.
    """
    suite = suite_of(run, recipe, data, world, method, labelled_of(recipe, data))
    if saved is None or suite is None:
        raise UserError(f"{run} has no {'checkpoint' if saved is None else 'test set (data.test is null)'} to evaluate")
    per_epoch, epochs, monitor = saved.meta["steps_per_epoch"], recipe.schedule.epochs, None
    if saved.step < epochs * per_epoch:
        raise UserError(
            f"the newest whole checkpoint of {run} is {saved.folder.name}, and its training ends at step "
            f"{epochs * per_epoch}; remove the damaged ones, then: kilobatch resume {run}"
        )
    suite = with_baselines(suite, recipe, data, world, in_use=True)
    pretrained.restore(method, saved.whole)
    if world.rank == 0:
        facts = LearningFacts(knn=suite.baselines.conditions() if suite.baselines else "")
        monitor = Monitor(run, epochs * per_epoch, saved.step, epochs, facts=facts)
        phase.show_with(monitor.say)
        monitor.say(f"evaluating {saved.folder.name}: what has no result yet")
    try:
        EvaluationAfterTraining(run, recipe, suite, saved.step, per_epoch, monitor, world).run(rest=True)
        if monitor:
            monitor.conclude()
    finally:
        if monitor:
            monitor.close()


def _one_line(error: Exception) -> str:
    """An error in one line; with the place in the code that raised it where the user cannot mend it."""
    if isinstance(error, UserError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message} ({Path(place.filename).name}, line {place.lineno})"
