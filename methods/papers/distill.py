"""Distillation with unlabelled images: Chen et al. 2020, SimCLRv2, arxiv.org/abs/2006.10029, section 2.

Authors' code: github.com/google-research/simclr, colabs/distillation_self_training.ipynb.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.data.errors import UserError
from kilobatch.methods.method import LoadMethod, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.teacher import Teacher
from kilobatch.methods.options import Reference, TeacherPrecision, WeightsReference
from kilobatch.methods.papers.finetune import FineTune
from kilobatch.methods.parameter_groups import ParameterGroup


class Distill(FineTune):
    """A student, an encoder and a linear classifier without projection head, learns a teacher's predictions: eq. 3, 4.

    Eq. 4, divided by the number of all images of the batch: L = (1 - alpha) * sum over labelled images of -log P_S(y)
    + alpha * tau^2 * sum over all images of -sum_y P_T(y; tau) log P_S(y; tau), with P(y; tau) = softmax(logits / tau).

    An unlabelled image adds nothing to the first sum. As both sums are divided by the number of all images, the loss is
    a mean over samples on any ranks and chunks. alpha 1 is eq. 3. The factor tau^2 is not in the paper's equations; the
    authors' notebook has it (add_kd_loss), as Hinton et al. 2015 do. At tau = 0.1 and the recipes' rates a training
    without it diverges: what LARS does not adapt would move a hundred times as far. LARS adapts the
    classifier, too, other than in fine-tuning: docs/fidelity.md has what either does.

    teacher: of a method that classifies (fine-tuned or distilled): a run, a checkpoint, an exported file, or a file of
    another package with its classifier. further_teachers: the probabilities P_T are the mean of all teachers'.
    teacher_network: encoder.name of a file of another package; null: found by its tensors. start: run or file whose
    encoder the student starts with; null: from scratch. temperature: tau, which both networks' logits are divided by;
    the authors' 0.1 for self-distillation, 1 for a smaller student. alpha: the weight of the teacher's predictions; the
    labels' is 1 - alpha. teacher_precision: the type that the teacher computes in. teacher_size: pixels that its images
    are resized to on the device, null: the student's. classes_by: the teacher's classes are those of the images by
    their names in order, or by their places alone (folders of the same classes under other names).
    """

    head_layers: ClassVar[int | str] = 0
    teaching: tuple[Teacher, ...] = ()

    def __init__(
        self,
        encoder: Encoder,
        *,
        teacher: WeightsReference,
        further_teachers: tuple[WeightsReference, ...] = (),
        teacher_network: str | None = None,
        start: Reference | None = None,
        temperature: Annotated[float, Field(gt=0)] = 1.0,
        alpha: Annotated[float, Field(ge=0, le=1)] = 1.0,
        teacher_precision: TeacherPrecision = "fp32",
        teacher_size: Annotated[int, Field(gt=0)] | None = None,
        classes_by: Literal["name", "place"] = "name",
    ) -> None:
        super().__init__(encoder, start=start, layer=0)
        self.teachers, self.classes_by, self.teacher_size = (teacher, *further_teachers), classes_by, teacher_size
        self.teacher_precision: TeacherPrecision = teacher_precision
        self.temperature, self.alpha = temperature, alpha

    def load_pretrained(self, load: LoadMethod, fresh: bool) -> None:
        super().load_pretrained(load, fresh)
        self.teaching = tuple(self._load_teacher(load, where) for where in self.teachers)

    def _load_teacher(self, load: LoadMethod, where: str) -> Teacher:
        method = load(where)
        if not method.classifies:
            raise UserError(
                f"method.teacher '{where}' is of {type(method).__name__}, which has no classifier; fine-tune it "
                f"(method.name=finetune method.start={where}) and let that run teach, or use method.name=seed"
            )
        if method.classes != self.classes:
            raise UserError(
                f"method.teacher '{where}' knows {method.classes} classes, and data.train has {self.classes}; "
                "let one teach that was fine-tuned on the same classes"
            )
        return Teacher(method, self.teacher_precision, self.teacher_size)

    def groups(self) -> Sequence[ParameterGroup]:
        return ()  # the authors' notebook adapts all that has more than one dimension

    def target(self, batch: Batch) -> Tensors:
        assert self.teaching, "load_pretrained() comes first"
        logits = [teacher.logits(batch.views[0][:, 0]) for teacher in self.teaching]  # (N, classes) each
        if len(logits) == 1:
            return {"logits": logits[0]}
        shares = torch.stack([(x / self.temperature).softmax(1) for x in logits]).mean(0)
        return {"logits": self.temperature * shares.log()}  # whose P_T(y; tau) are these

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        student, teacher = z["logits"], t["logits"]
        p_teacher = (teacher / self.temperature).softmax(1)  # P_T(y; tau)
        by_teacher = F.cross_entropy(student / self.temperature, p_teacher)
        by_label = F.cross_entropy(student, batch.label, ignore_index=-1, reduction="sum") / len(batch)
        return (1 - self.alpha) * by_label + self.alpha * self.temperature**2 * by_teacher

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distill":
        """Moves the teacher, which is no submodule, to a device together with the student."""
        for teacher in self.teaching:
            teacher.apply(fn)
        return super()._apply(fn, recurse)
