"""Prints a plan on the terminal."""

from rich.console import Console
from rich.table import Table

from kilobatch.launch.planning.machines import ASSUMED, GIB
from kilobatch.launch.planning.plan import Plan
from kilobatch.launch.runs.table_printing import print_table


def print_plan(plan: Plan) -> None:
    console = Console(emoji=False)
    for table in (_memory(plan), _stages(plan), _sent(plan)):
        print_table(table, console)
    console.print("\n".join(_time(plan)))
    console.print(
        "\nassumed, not measured (docs/plan.md has the sources):", *[f"  {line}" for line in ASSUMED], sep="\n"
    )
    if plan.measured:
        console.print(f"measured, in their place: {plan.measured.model_dump(exclude_none=True)}")


def _memory(plan: Plan) -> Table:
    fit, layout = plan.fit, plan.fit.layout
    chunks = f", {layout.chunks} chunks of which {fit.keep} keep their graph" if layout.chunks > 1 else ""
    title = f"memory of a rank ({layout.ranks} ranks, {layout.samples} images each{chunks}), in the {fit.memory.moment}"
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
    for column in ("calls", "MB", "ms"):
        table.add_column(column, justify="right")
    for collective in plan.time.collectives:
        ms = "" if collective.seconds is None else f"{collective.seconds * 1e3:.2f}"
        megabytes = f"{collective.sent / 1e6:,.2f}"
        table.add_row(collective.purpose, collective.kind, f"{collective.calls}", megabytes, ms)
    if not plan.time.collectives:
        table.add_row("nothing: there is one rank", "", "", "", "")
    return table


def _time(plan: Plan) -> list[str]:
    time, ranks = plan.time, plan.fit.layout.ranks
    lines = [f"a step: {time.flops / 1e12:,.3f} TFLOP a rank; {plan.steps:,} steps to the end"]
    if time.step is None or plan.seconds is None:
        return [*lines, "time: not estimated, for no rate is known; kilobatch bench --json FILE, then --measured FILE"]
    loader = "" if time.loader is None else f", loader {_ms(time.loader)}"
    lines.append(
        f"time of a step: {_ms(time.step)} (compute {_ms(time.compute)}, communication {_ms(time.communication)}"
        f"{loader}); {time.binds} binds"
    )
    lines.append(f"loader: {time.cores:,.1f} cores of each node keep up with that")
    hours = f"{plan.seconds / 3600 * ranks:,.1f} GPU-hours"
    lines.append(f"to the end: {plan.seconds / 86_400:.2f} days, {hours}, without evaluations")
    if plan.machine.name.startswith("v100") and plan.recipe.engine.precision == "bf16":
        lines.append("engine.precision is bf16, for which a V100 has no tensor cores: use fp16")
    return lines


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.1f} ms"
