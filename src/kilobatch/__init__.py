"""kilobatch: contrastive image encoders at thousand-image batches. Each public name is imported at its first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kilobatch.data.batch import Batch as Batch
    from kilobatch.data.errors import UserError as UserError
    from kilobatch.data.loading.loader import Loader as Loader
    from kilobatch.data.sources.convert import convert as convert
    from kilobatch.data.sources.specs import open_source as open_source
    from kilobatch.data.views.options import Views as Views
    from kilobatch.launch.recipes.recipe import Recipe as Recipe
    from kilobatch.launch.recipes.recipe import read_recipe as read_recipe
    from kilobatch.launch.worker.pretrained import load_method as load_method
    from kilobatch.methods.collectives import gather as gather
    from kilobatch.methods.losses.contrastive import clip_loss as clip_loss
    from kilobatch.methods.losses.contrastive import info_nce as info_nce
    from kilobatch.methods.losses.contrastive import nt_xent as nt_xent
    from kilobatch.methods.memories.memory_bank import MemoryBank as MemoryBank
    from kilobatch.methods.memories.momentum_encoder import MomentumEncoder as MomentumEncoder
    from kilobatch.methods.memories.queue import Queue as Queue
    from kilobatch.methods.method import Method as Method
    from kilobatch.methods.networks.batch_norm import BatchNorm as BatchNorm
    from kilobatch.methods.networks.build import build_encoder as build_encoder
    from kilobatch.methods.networks.encoder import Encoder as Encoder
    from kilobatch.trainer.checkpoint.export import export as export
    from kilobatch.trainer.optim.lars import LARS as LARS

# Imported when first asked for, so that `import kilobatch` takes no torch, and the command line answers at once.
_MODULES = {
    "Batch": "data.batch",
    "BatchNorm": "methods.networks.batch_norm",
    "Encoder": "methods.networks.encoder",
    "LARS": "trainer.optim.lars",
    "Loader": "data.loading.loader",
    "MemoryBank": "methods.memories.memory_bank",
    "Method": "methods.method",
    "MomentumEncoder": "methods.memories.momentum_encoder",
    "Queue": "methods.memories.queue",
    "Recipe": "launch.recipes.recipe",
    "UserError": "data.errors",
    "Views": "data.views.options",
    "build_encoder": "methods.networks.build",
    "clip_loss": "methods.losses.contrastive",
    "convert": "data.sources.convert",
    "export": "trainer.checkpoint.export",
    "gather": "methods.collectives",
    "info_nce": "methods.losses.contrastive",
    "load_method": "launch.worker.pretrained",
    "nt_xent": "methods.losses.contrastive",
    "open_source": "data.sources.specs",
    "read_recipe": "launch.recipes.recipe",
}
__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'kilobatch' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"kilobatch.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
