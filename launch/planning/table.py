"""Prints a plan on the terminal."""

from rich.console import Console
from rich.table import Table

from kilobatch.launch.planning.duration import in_range, in_words
from kilobatch.launch.planning.machines import ASSUMED, GIB, Measured
from kilobatch.launch.planning.plan import Plan
from kilobatch.launch.runs.table_printing import print_lines, print_table


def print_plan(plan: Plan) -> None:
    console = Console(emoji=False)
    of_several = (_stages(plan), _sent(plan)) if plan.fit.layout.ranks > 1 else ()
    for table in (_memory(plan), *of_several):
        print_table(table, console)
    assumed = ["assumed, not measured (docs/plan.md has the sources):", *(f"  {line}" for line in _assumed(plan))]
    measured = ["", _measured(plan.measured)] if plan.measured else []
    print_lines([*_time(plan), "", *assumed, *measured], console)


def _assumed(plan: Plan) -> list[str]:
    """The assumptions that count for this machine and so many ranks."""
    without = set() if plan.machine.bandwidth else {"compute", "memory"}
    without |= set() if plan.fit.layout.ranks > 1 else {"communication"}
    return [line for line in ASSUMED if line.partition(":")[0] not in without]


def _memory(plan: Plan) -> Table:
    fit, layout = plan.fit, plan.fit.layout
    chunks = f", {layout.chunks} chunks of which {fit.keep} keep their graph" if layout.chunks > 1 else ""
    ranks = f"a rank ({layout.ranks} ranks, {layout.samples:,} images each" if layout.ranks > 1 else ""
    whose = ranks or f"one rank ({layout.samples:,} images"
    title = f"memory of {whose}{chunks}), in the {fit.memory.moment}"
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for label, size in sorted(fit.memory.parts.items(), key=lambda item: -item[1]):
        table.add_row(label, f"{size / GIB:.3f}")
    table.add_section()
    table.add_row("in all", f"{fit.memory.total / GIB:.3f}")
    table.add_row(f"{plan.machine.name} has", f"{fit.limit / GIB:.3f}")
    return table


def _stages(plan: Plan) -> Table:
    table = Table("ZeRO stage", title="optimizer by ZeRO stage", title_justify="left")
    table.add_column("optimizer and ZeRO, GiB", justify="right")
    table.add_column("in all, GiB", justify="right")
    for zero, (own, total) in plan.stages.items():
        note = " (this recipe)" if zero == plan.fit.zero else ""
        table.add_row(f"{zero}{note}", f"{own / GIB:.3f}", f"{total / GIB:.3f}")
    return table


def _sent(plan: Plan) -> Table:
    table = Table("collective", "", title="sent by a rank in a step", title_justify="left")
    for column in ("calls", "megabytes", "milliseconds"):
        table.add_column(column, justify="right")
    for collective in plan.time.collectives:
        ms = "" if collective.seconds is None else f"{collective.seconds * 1e3:.2f}"
        megabytes = f"{collective.sent / 1e6:,.2f}"
        table.add_row(collective.purpose, collective.kind, f"{collective.calls}", megabytes, ms)
    return table


def _time(plan: Plan) -> list[str]:
    time, ranks, duration = plan.time, plan.fit.layout.ranks, plan.duration
    lines = [f"a step: {time.flops / 1e12:,.3f} trillion operations a rank (TFLOP); {plan.steps:,} steps to the end"]
    if duration is None or time.step is None:
        return [*lines, "time: not estimated, as no rate of this machine is known; kilobatch bench measures it"]
    loader = "" if time.loader is None else f", loader {_ms(time.loader)}"
    rate = "measured" if plan.measured else "published"
    communication = f", communication {_ms(time.communication)}" if ranks > 1 else ""
    lines.append(
        f"time of a step at the {rate} rate: {_ms(time.step)} (compute {_ms(time.compute)}{communication}{loader}); "
        f"{time.binds} binds"
    )
    if (not plan.machine.bandwidth or time.loader is None) and time.cores and time.cores >= 0.05:
        lines.append(f"loader: {time.cores:,.1f} cores of each node keep up with that")
    lines.append(f"speed: {duration.images.least:,.0f} to {duration.images.most:,.0f} images per second")
    lines += [
        "",
        f"training: {in_words(duration.training)}",
        f"evaluations: {in_words(duration.evaluations) if duration.evaluations.most else 'none'}",
        f"to the end: {in_words(duration.whole)}",
    ]
    if plan.machine.bandwidth and ranks > 1:
        hours = duration.whole.times(ranks / 3600)
        shown = "less than 0.1" if hours.most < 0.1 else f"about {in_range(hours)}"
        lines.append(f"for all {ranks} GPUs: {shown} GPU hours")
    lines += ["", "this rests on:", *(f"  {line}" for line in duration.rests_on)]
    if plan.machine.name.startswith("v100") and plan.recipe.engine.precision == "bf16":
        lines.append("engine.precision is bf16, for which a V100 has no tensor cores: use fp16")
    return lines


def _measured(measured: Measured) -> str:
    link = f", {measured.link / 1e9:,.2f} GB/s between ranks" if measured.link else ""
    rate = f"{measured.flops / 1e9:,.1f} GFLOP per second"
    if not measured.whole:
        return f"measured on {measured.described}: {rate} in this encoder; kilobatch bench measures more, and keeps it"
    return (
        f"measured, in their place, on {measured.described}: {rate} in a step, "
        f"{measured.views:,.0f} views per second and core{link}"
    )


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:,.1f} seconds" if seconds >= 2 else f"{seconds * 1e3:,.1f} milliseconds"
