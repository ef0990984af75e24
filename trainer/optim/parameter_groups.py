"""Sorts a module's parameters into an optimizer's groups: by the recipe's rules, and by the method's exceptions."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Any

from torch import nn

from kilobatch.data.errors import UserError, did_you_mean
from kilobatch.methods.method import Method
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.parameter_groups import ParameterGroup, rule_of
from kilobatch.trainer.optim.options import OptimizerOptions

RULE = "rule"  # the key of an optimizer's group under which its ParameterGroup stands, with decay and adapt decided


def freeze_parameters(module: nn.Module, options: OptimizerOptions) -> None:
    """Takes the gradient from all parameters that are never updated, so that no backward computes it, no average over
    ranks includes it and no optimizer holds a state of it.

    Raises UserError where nothing is left to train, or an exception of the recipe does not fit.
    """
    rules = _rules(module, options)
    for name, p in module.named_parameters():
        if rules[name].from_epoch == inf:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in module.parameters()):
        raise UserError(f"optimizer.freeze {list(options.freeze)} leaves nothing to train; name fewer parts")


def parameter_groups(module: nn.Module, options: OptimizerOptions) -> list[dict[str, Any]]:
    """The groups of the trainable parameters, none of them empty; the base learning rate is added by the optimizer.

    Without exceptions these are up to three: what has more than one dimension; with options.decay_norms the rest, which
    LARS and LAMB do not adapt; else the rest without decay. Parameters for which an exception says the same are in one
    group.
    """
    rules = _rules(module, options)
    members: dict[tuple[Any, ...], list[tuple[str, nn.Parameter]]] = {}
    by_place: dict[tuple[Any, ...], ParameterGroup] = {}
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        rule, vector = rules[name], p.ndim <= 1
        decay = float(options.decay_norms or not vector) if rule.decay is None else rule.decay
        rule = replace(rule, prefix="", decay=decay, adapt=not vector if rule.adapt is None else rule.adapt)
        place = (rule.from_epoch, not rule.schedule, -rule.lr, vector, not rule.adapt, -decay)
        by_place[place] = rule
        members.setdefault(place, []).append((name, p))
    return [
        {
            "params": [p for _, p in members[place]],
            "names": [name for name, _ in members[place]],
            "weight_decay": options.weight_decay * (by_place[place].decay or 0.0),
            "adapt": by_place[place].adapt,
            RULE: by_place[place],
        }
        for place in sorted(members)
    ]


def _rules(module: nn.Module, options: OptimizerOptions) -> dict[str, ParameterGroup]:
    """The first exception that holds each parameter, by name; REST where none does."""
    names = [name for name, _ in module.named_parameters()]
    own = module.groups() if isinstance(module, Method) else ()
    for group in own:
        where = f"{type(module).__name__}.groups() has the prefix '{group.prefix}'"
        assert any(map(group.holds, names)), f"{where}, which no parameter has"
    exceptions = [*own, *_frozen(names, own, options), *_layers(module, options)]
    return {name: rule_of(name, exceptions) for name in names}


def _frozen(names: Sequence[str], own: Sequence[ParameterGroup], options: OptimizerOptions) -> list[ParameterGroup]:
    """What optimizer.freeze names. Raises UserError for a name that nothing has, or that the method has a group of."""
    groups = [ParameterGroup(prefix, from_epoch=inf) for prefix in options.freeze]
    for group in groups:
        held = [name for name in names if group.holds(name)]
        if not held:
            known = {".".join(parts[:n]) for name in names for parts in [name.split(".")] for n in range(1, len(parts))}
            known |= {name.partition(".")[0] for name in names}
            short = {part for part in known if part.count(".") <= group.prefix.count(".")}
            raise UserError(
                f"optimizer.freeze has '{group.prefix}', and no parameter's name begins so"
                f"{did_you_mean(group.prefix, short)}"
            )
        taken = [name for name in held if any(other.holds(name) for other in own)]
        if taken:
            raise UserError(
                f"optimizer.freeze has '{group.prefix}', but the method says itself how {taken[0]} is trained; freeze "
                "parts beside it"
            )
    return groups


def _layers(module: nn.Module, options: OptimizerOptions) -> list[ParameterGroup]:
    """The encoder's parts with the rates of optimizer.layer_decay, a power of it for each, the last part's being 1; the
    head, and what the encoder has after its last part, keep the whole rate.

    As in BEiT's and MAE's fine-tuning: facebookresearch/mae, util/lr_decay.py. Raises UserError for an encoder that
    does not say the order of its parts.
    """
    if options.layer_decay == 1:
        return []
    encoder = getattr(module, "encoder", None)
    if not isinstance(encoder, Encoder):
        raise UserError(
            f"optimizer.layer_decay is {options.layer_decay:g}, but a {type(encoder).__name__} does not say the order "
            "of its parts; use optimizer.layer_decay=1"
        )
    parts = encoder.by_depth()
    return [
        ParameterGroup(f"encoder.{prefix}", lr=options.layer_decay ** (len(parts) - k))
        for k, part in enumerate(parts)
        for prefix in part
    ]
