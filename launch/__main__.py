"""The commands of `kilobatch`: cli/commands/ has their options, the rest of cli/ what they do."""

from functools import partial

import typer

from kilobatch.launch.cli.commands import encoders, machines, runs
from kilobatch.launch.cli.examples import with_examples
from kilobatch.launch.cli.usage_errors import call
from kilobatch.launch.processes.standard_streams import prepare_streams, run_command

app = typer.Typer(
    name="kilobatch",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Trains contrastive image encoders with batches of thousands of images, on one machine or as SLURM jobs. The "
    "number of workers does not change the result, and a killed run goes on from its last checkpoint.",
)

# In the order in which the help lists them.
add = with_examples(app)
add(machines.recipes)
add(machines.init)
add(machines.options)
add(runs.train)
add(runs.submit)
add(runs.pipeline)
add(runs.resume)
add(runs.branch)
add(runs.cancel)
add(runs.status)
add(runs.logs)
add(runs.drill)
add(machines.plan)
add(machines.bench)
add(encoders.evaluate, "eval")
add(encoders.embed)
add(encoders.convert)
add(encoders.export)
add(encoders.weights)
add(encoders.import_checkpoint, "import")
add(machines.verify)
add(machines.new)


def main(argv: list[str] | None = None) -> None:
    """Runs a command. Exits with 0, 1 (a worker or a check failed), 2 (refused) or 130 (interrupted)."""
    prepare_streams()
    run_command(partial(call, app), argv)


if __name__ == "__main__":
    main()
