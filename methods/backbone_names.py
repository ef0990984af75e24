"""Names of encoders that are not of this project: timm/NAME, torchvision/NAME, FILE.py:function. Loads no torch."""

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

from kilobatch.data.errors import UserError, nearest
from kilobatch.methods.source_file import check_source, is_source

LIBRARIES = "timm", "torchvision"
NETWORK = "network."  # before the names of such a network's tensors in an encoder's
FORMS = "timm/NAME, torchvision/NAME or FILE.py:function"
# A classifier's arguments and what would fetch weights: the encoder's own business.
RESERVED = ("num_classes", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
RESERVED += (
    "features_only",
    "in_chans",
    "weights",
    "weights_backbone",
    "progress",
    "name",
    "model_name",
    "device",
    "dtype",
)

_REGISTERED = re.compile(r"^@register_model(?:\(\))?$(?:\n.*?)*?\ndef (\w+)\(", re.MULTILINE)


def library_of(name: str) -> str | None:
    """timm or torchvision; None for any other name."""
    library, slash, _ = name.partition("/")
    return library if slash and library in LIBRARIES and not is_source(name) else None


def is_foreign(name: str) -> bool:
    """Whether the name means a network that is not of this project."""
    return is_source(name) or library_of(name) is not None


def check_name(name: str) -> None:
    """Raises UserError unless there is such a network. A file is parsed, and a library's files are searched; neither is
    imported."""
    if is_source(name):
        check_source(name, ast.FunctionDef)
        return
    library, _, model = name.partition("/")
    if importlib.util.find_spec(library) is None:
        extra = "pip install 'kilobatch[timm]'" if library == "timm" else f"pip install {library}"
        raise UserError(f"encoder.name is {name}, but the package {library} is not installed: {extra}")
    known = models(library)
    if model.partition(".")[0] in known:  # what follows a dot names trained weights, which are not loaded
        return
    near = nearest(model, known) or next((other for other in known if other.startswith(model)), None)
    guess = f"; did you mean '{library}/{near}'?" if near else ""
    every = "timm.list_models()" if library == "timm" else "torchvision.models.list_models(torchvision.models)"
    raise UserError(f"encoder.name is {name}, which {library} does not have{guess} ({every} lists its {len(known):,})")


@cache
def models(library: str) -> list[str]:
    """The names of the library's image networks, sorted: from the text of its files, as importing it takes seconds.
    Raises UserError where it is not installed."""
    spec = importlib.util.find_spec(library)
    assert spec is not None and spec.submodule_search_locations, library
    files = (Path(spec.submodule_search_locations[0]) / "models").glob("*.py")
    return sorted(name for file in files for name in _REGISTERED.findall(file.read_text("utf-8")))
