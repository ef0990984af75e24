"""kilobatch: contrastive image encoders at thousand-image batches. Each public name is imported at its first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kilobatch.data.batch import Batch as Batch
    from kilobatch.data.errors import UserError as UserError
    from kilobatch.data.loading.preprocess import Preprocess as Preprocess
    from kilobatch.data.sources.convert import convert as convert
    from kilobatch.data.sources.specs import open_source as open_source
    from kilobatch.data.views.options import Views as Views
    from kilobatch.launch.python import Run as Run
    from kilobatch.launch.python import embed as embed
    from kilobatch.launch.python import evaluate as evaluate
    from kilobatch.launch.python import train as train
    from kilobatch.launch.recipes.recipe import Recipe as Recipe
    from kilobatch.launch.recipes.recipe import read_recipe as read_recipe
    from kilobatch.launch.worker.encoder import LoadedEncoder as LoadedEncoder
    from kilobatch.launch.worker.encoder import load_encoder as load_encoder
    from kilobatch.launch.worker.pretrained import load_method as load_method
    from kilobatch.launch.worker.view_loader import ViewLoader as ViewLoader
    from kilobatch.methods.collectives import all_reduce_sum as all_reduce_sum
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
    from kilobatch.trainer.checkpoint.feature_file import FeatureTable as FeatureTable
    from kilobatch.trainer.checkpoint.feature_file import read_features as read_features
    from kilobatch.trainer.optim.lars import LARS as LARS

# Imported when first asked for, so that `import kilobatch` takes no torch, and the command line answers at once.
_MODULES = {
    "Batch": "data.batch",
    "BatchNorm": "methods.networks.batch_norm",
    "Encoder": "methods.networks.encoder",
    "FeatureTable": "trainer.checkpoint.feature_file",
    "LARS": "trainer.optim.lars",
    "LoadedEncoder": "launch.worker.encoder",
    "MemoryBank": "methods.memories.memory_bank",
    "Method": "methods.method",
    "MomentumEncoder": "methods.memories.momentum_encoder",
    "Preprocess": "data.loading.preprocess",
    "Queue": "methods.memories.queue",
    "Recipe": "launch.recipes.recipe",
    "Run": "launch.python",
    "UserError": "data.errors",
    "ViewLoader": "launch.worker.view_loader",
    "Views": "data.views.options",
    "all_reduce_sum": "methods.collectives",
    "build_encoder": "methods.networks.build",
    "clip_loss": "methods.losses.contrastive",
    "convert": "data.sources.convert",
    "embed": "launch.python",
    "evaluate": "launch.python",
    "export": "trainer.checkpoint.export",
    "gather": "methods.collectives",
    "info_nce": "methods.losses.contrastive",
    "load_encoder": "launch.worker.encoder",
    "load_method": "launch.worker.pretrained",
    "nt_xent": "methods.losses.contrastive",
    "open_source": "data.sources.specs",
    "read_features": "trainer.checkpoint.feature_file",
    "read_recipe": "launch.recipes.recipe",
    "train": "launch.python",
}
__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'kilobatch' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"kilobatch.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
