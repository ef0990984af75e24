"""Distillation by unlabelled images: Chen et al. 2020, SimCLRv2, arxiv.org/abs/2006.10029, section 2.

Authors' code: github.com/google-research/simclr, colabs/distillation_self_training.ipynb.
"""

from collections.abc import Callable
from typing import Annotated, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.data.errors import Refusal
from kilobatch.methods.method import Tensors, Trained
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.teacher import Teacher
from kilobatch.methods.options import Reference, TeacherPrecision
from kilobatch.methods.papers.finetune import FineTune


class Distill(FineTune):
    """A student, encoder and linear classifier without a projection head, learns what a teacher says: eq. 3 and 4.

    L = (1 - alpha) * sum over labelled images of -log P_S(y) + alpha * sum over all images of
    -sum_y P_T(y; t) log P_S(y; t), with P(y; t) = softmax(logits / t), over the number of all images.

    That is eq. 4, whose sums run over labelled and over all images, so that an unlabelled image adds nothing to the
    first; divided by the batch, labelled or not, a mean over samples stays one on any ranks and chunks. alpha 1 is eq.
    3. The authors' notebook multiplies the second sum by t^2, at t = 1; here it is the paper's.

    teacher: run or file of a method that classifies (a fine-tuned one, or a distilled one). start: run or file whose
    encoder the student begins with. temperature: t; the authors' 0.1 for self-distillation, 1 for a smaller student.
    """

    head_layers: ClassVar[int | str] = 0
    teaches: Teacher | None = None

    def __init__(
        self,
        encoder: Encoder,
        *,
        teacher: Reference,
        start: Reference | None = None,
        temperature: Annotated[float, Field(gt=0)] = 1.0,
        alpha: Annotated[float, Field(ge=0, le=1)] = 1.0,
        teacher_precision: TeacherPrecision = "fp32",
    ) -> None:
        super().__init__(encoder, start=start, layer=0)
        self.teacher = teacher
        self.teacher_precision: TeacherPrecision = teacher_precision
        self.temperature, self.alpha = temperature, alpha

    def take(self, trained: Trained, fresh: bool) -> None:
        super().take(trained, fresh)
        method = trained(self.teacher)
        if not method.classifies:
            raise Refusal(
                f"method.teacher '{self.teacher}' is of {type(method).__name__}, which has no classifier; fine-tune it "
                f"(method.name=finetune method.start={self.teacher}) and let that run teach"
            )
        if method.classes != self.classes:
            raise Refusal(
                f"method.teacher '{self.teacher}' knows {method.classes} classes, and data.train has {self.classes}; "
                "let one teach that was fine-tuned on the same classes"
            )
        self.teaches = Teacher(method, self.teacher_precision)

    def target(self, views: Tensor) -> Tensors:
        assert self.teaches, "take() comes first"
        return {"logits": self.teaches.logits(views[:, 0])}  # (N, classes)

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        student, teacher = z["logits"], t["logits"]
        by_teacher = F.cross_entropy(student / self.temperature, (teacher / self.temperature).softmax(1))
        by_label = F.cross_entropy(student, batch.label, ignore_index=-1, reduction="sum") / len(batch)
        return (1 - self.alpha) * by_label + self.alpha * by_teacher

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distill":
        """The teacher, no submodule, goes to the devices that the student goes to."""
        if self.teaches:
            self.teaches.apply(fn)
        return super()._apply(fn, recurse)
