"""The fast linear probe: softmax regression on cached features by L-BFGS. It is no paper's protocol, as
those of linear.py are.

Features stay on the rank that computed them. Each evaluation of the objective sums loss and gradient over ranks, so
that every rank takes the same steps.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kilobatch.methods import collectives
from kilobatch.trainer.evaluate.features import Features, Images, Represent, count_rows, extract
from kilobatch.trainer.evaluate.linear import top_accuracies
from kilobatch.trainer.evaluate.options import FastLinearOptions
from kilobatch.trainer.ranks.heartbeat import heartbeat


def evaluate(
    represent: Represent,
    train: Images,
    test: Images,
    classes: int,
    options: FastLinearOptions,
    among: Sequence[int] | None = None,
) -> Iterator[tuple[str, float]]:
    """Yields fast_linear/top1 and fast_linear/top5 (0..1). among: the classes that may be predicted; None: all."""
    bank, queries = extract(represent, train), extract(represent, test)
    mean, scale = moments(bank.x)
    weight, bias = fit(Features((bank.x - mean) / scale, bank.label), classes, options)
    logits = (queries.x - mean) / scale @ weight.T + bias
    for k, share in top_accuracies(logits, queries.label, among).items():
        yield f"fast_linear/top{k}", share


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of all ranks' rows; a constant feature's deviation is 1."""
    rows = sum(count_rows(len(x), x.device))
    mean = (collectives.all_reduce_sum(x.double().sum(0)) / rows).float()
    deviation = (collectives.all_reduce_sum((x - mean).double().square().sum(0)) / rows).sqrt().float()
    return mean, torch.where(deviation > 1e-6 * mean.abs().clamp(min=1e-6), deviation, 1)


def fit(bank: Features, classes: int, options: FastLinearOptions) -> tuple[Tensor, Tensor]:
    """Minimises mean cross-entropy + l2 / 2 · |W|² (biases free). Returns weight (C, D) and bias (C,)."""
    rows = sum(count_rows(len(bank.x), bank.x.device))
    weight = bank.x.new_zeros(classes, bank.x.shape[1], requires_grad=True)
    bias = bank.x.new_zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=options.iterations,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        heartbeat()
        total = bank.x.new_zeros(())
        weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
        for x, label in zip(bank.x.split(65536), bank.label.split(65536), strict=True):
            loss = cross_entropy(x @ weight.T + bias, label, reduction="sum") / rows
            loss.backward()
            total += loss.detach()
        packed = collectives.all_reduce_sum(torch.cat([total.view(1), weight.grad.flatten(), bias.grad]))
        weight.grad = packed[1 : 1 + weight.numel()].view_as(weight) + options.l2 * weight.detach()
        bias.grad = packed[1 + weight.numel() :]
        return packed[0] + options.l2 / 2 * weight.detach().square().sum()

    solver.step(objective)
    return weight.detach(), bias.detach()
