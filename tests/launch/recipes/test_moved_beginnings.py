"""Parts of a method that begin late: a resume does not move their beginning across the steps that are done."""

from math import inf

from torch import nn

from kilobatch.launch.recipes.continuation import moved_beginning
from kilobatch.methods.method import Method
from kilobatch.methods.parameter_groups import ParameterGroup


class Beginning(Method):
    def __init__(self, epoch: float) -> None:
        super().__init__()
        self.encoder, self.head, self.epoch = nn.Linear(2, 2), nn.Linear(2, 2), epoch

    def groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("head", from_epoch=self.epoch)]


def moved(before: float, after: float) -> str:
    """Of a run of 3 steps an epoch, of which 5 are done."""
    return moved_beginning(Beginning(before), Beginning(after), 5, 3) or ""


def test_a_beginning_is_not_moved_across_the_steps_that_are_done():
    assert [moved(*epochs) for epochs in ((2, 2), (2, 5 / 3), (2, 9), (1, 0), (1, 4 / 3), (inf, 1), (1, inf))] == [
        ""
    ] * 7
    lowered, raised = moved(2, 1), moved(1, 2)
    assert "head.weight is not trained before epoch 2, and would be from epoch 1 on, while step 5 of 3 an" in lowered
    assert "let it begin at epoch 1.67 or later, or branch from a checkpoint before both" in lowered
    assert "head.weight has been trained since epoch 1, and would be from epoch 2 on" in raised
    assert "let it begin at epoch 1.33 or before" in raised
