"""`kilobatch verify` of a method of one's own (FILE.py:Class), or of an encoder (timm/NAME, FILE.py:function): ranks x
chunks against one process."""

import ast
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kilobatch.data.errors import UserError
from kilobatch.launch.cli.reports.tables import parity_table
from kilobatch.launch.processes.output import tell
from kilobatch.launch.recipes import method_options
from kilobatch.launch.runs.table_printing import print_table
from kilobatch.methods.backbone_names import check_name, is_foreign
from kilobatch.methods.source_file import is_source, parse_source

if TYPE_CHECKING:
    from kilobatch.trainer.layout_parity import Subject

SIDE = 64  # pixels of the images for an encoder; those for a method are tiny, as its encoder is
OF_EQUATION = """\
A method that agrees does not depend on ranks and chunks. That its equation is the paper's is not shown by this: a wrong
one is as wrong in one process. For a table against the formula, put the file into methods/papers/ and write the formula
in methods/parity/formulas/ (CONTRIBUTING.md, "A method, step by step")."""


def is_layout_subject(name: str) -> bool:
    """Whether verify compares what this names with itself."""
    return is_foreign(name)


def verify_layouts(name: str) -> bool:
    """Prints the table of a method or an encoder. Returns whether all rows agree.

    Raises UserError for a name that there is not, and for what verify cannot build by itself.
    """
    is_method = is_source(name) and _is_class(name)
    subject = _method(name) if is_method else _encoder(name)
    from kilobatch.trainer.layout_parity import layout_rows
    from kilobatch.trainer.parity import LIMIT

    if is_method:
        rows = layout_rows(subject, tell)
    else:
        rows = layout_rows(subject, tell, ranks=(1, 2), precisions=("fp64",))
    title = f"{name}: gradients, and what it keeps, against one process in fp64"
    console = Console(emoji=False)
    print_table(parity_table(title, rows), console)
    console.print(f"agrees: error at most {', '.join(f'{limit:.0e} in {p}' for p, limit in LIMIT.items())}")
    if is_method:
        print(OF_EQUATION)
    return all(row.ok for row in rows)


def _is_class(name: str) -> bool:
    """Whether FILE.py:NAME is a class. Raises UserError where the file has neither a class nor a function of it."""
    source = parse_source(name)
    try:
        tree = ast.parse(source.read())
    except SyntaxError as error:
        raise source.refusal(error.lineno or 1, f"not valid Python: {error.msg}") from error
    kinds = {type(node) for node in tree.body if getattr(node, "name", None) == source.name}
    if not kinds:
        raise UserError(f"{source.path} defines no class (a method) and no function (an encoder) '{source.name}'")
    return ast.ClassDef in kinds


def _method(name: str) -> "Subject":
    declared = method_options.declared(name)
    missing = [key for key, (_, default) in declared.arguments.items() if default is ...]
    if missing:
        raise UserError(
            f"verify builds {name} with its defaults, and its option {missing[0]} has none; give it one in the "
            "constructor, such as the paper's value"
        )
    if declared.needs:
        raise UserError(
            f"{name} needs {', '.join(sorted(declared.needs))} beside images, which verify does not make; put it into "
            "methods/papers/ and write a formula with such a batch (CONTRIBUTING.md)"
        )
    from kilobatch.trainer.layout_parity import Subject

    options = method_options.options_of(name)(name=name)
    arguments: dict[str, Any] = {key: getattr(options, key) for key in declared.arguments}
    return Subject(parse_source(name).name, name, arguments, views=declared.views or 2)


def _encoder(name: str) -> "Subject":
    check_name(name)
    from kilobatch.methods.networks.backbones.backbone import Backbone
    from kilobatch.methods.networks.options import EncoderOptions
    from kilobatch.trainer.layout_parity import Subject

    options = EncoderOptions(name=name)
    Backbone(options, [SIDE], checked=True)
    return Subject(name, encoder=options, side=SIDE, samples=8)
