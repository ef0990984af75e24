"""DeepSpeed behind a few verbs: embed, backward, step, and the pieces that a checkpoint keeps."""

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from kilobatch.data.errors import Refusal
from kilobatch.methods import collectives as across
from kilobatch.methods.method import Method, Tensors
from kilobatch.trainer.checkpoint.reader import Saved
from kilobatch.trainer.checkpoint.shard import Piece
from kilobatch.trainer.chunking import Chunking
from kilobatch.trainer.costs.zero_memory import BUCKET
from kilobatch.trainer.optim.lars import LARS
from kilobatch.trainer.optim.zero_partitions import partitions, refresh, restore_state, state_pieces
from kilobatch.trainer.options import EngineOptions

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """One method, its optimizer, and the process group that they train in.

    The process group is initialised and the optimizer built on the method before; the method is moved to the device.
    A step is: embed and backward any number of times, then step. Gradients stay this rank's own until step; at ZeRO 2
    each backward averages its part of them, and a rank keeps the averages that it will update with alone.

    Raises Refusal for chunks that do not divide the batch, or that a norm over the global batch or the method rules
    out, and under ZeRO for an optimizer that needs whole tensors.
    """

    def __init__(
        self, method: Method, optimizer: Optimizer, options: EngineOptions, device: torch.device, batch_per_rank: int
    ) -> None:
        self.chunking = Chunking(options, method, batch_per_rank, device, self.autocast)
        self.method, self.optimizer, self.options, self.device = method, optimizer, options, device
        _refuse_whole_tensors(optimizer, options)
        # At ZeRO 2 gradients are gone after a backward: a sum of their norms, which their infinities and NaNs reach.
        self._seen = torch.zeros((), device=device) if options.zero == 2 else None
        if self._seen is not None:
            for p in method.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(self._see)  # before DeepSpeed's own, which averages
        self.trained = [p for p in method.parameters() if p.requires_grad]
        self._deepspeed = _initialize(method, optimizer, options, device, batch_per_rank)
        # Its average over one rank would be two copies of all gradients.
        self._averages = across.size() > 1 or options.zero > 0
        self._deepspeed.enable_backward_allreduce = self._averages
        names = {p: name for name, p in method.named_parameters()}
        self._parts = partitions(self._deepspeed.optimizer, names) if options.zero else []
        if self._parts and isinstance(optimizer, LARS):
            optimizer.cut(self._parts)
        self._scaler: torch.amp.GradScaler | None = self._deepspeed.torch_autocast_z0_gradscaler
        self.loss_scale = self._scaler.get_scale() if self._scaler else 1.0
        self.skipped = 0  # steps that fp16 overflow left out
        if options.compile:
            self._deepspeed.compile()

    def autocast(self) -> torch.autocast:
        enabled = self.options.precision != "fp32"
        return torch.autocast(self.device.type, AUTOCAST.get(self.options.precision), enabled=enabled)

    def embed(self, views: Tensor) -> Tensors:
        """method.embed under autocast. views (N, V, 3, H, W)."""
        return self._deepspeed(views)

    def target(self, views: Tensor) -> Tensors:
        """method.target under autocast, without gradient."""
        with torch.no_grad(), self.autocast():
            return self.method.target(views)

    def backward(self, loss: Tensor) -> None:
        """Adds the loss's gradient to this rank's own; below ZeRO 2 nothing crosses ranks but what the loss sends."""
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def finite(self) -> Tensor:
        """0-dim bool: whether all of this rank's own gradients since the last step are finite."""
        if self._seen is not None:
            return self._seen.isfinite()
        grads = [p.grad for p in self.trained if p.grad is not None]
        return torch.stack(torch._foreach_norm(grads)).isfinite().all()  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def _see(self, p: Tensor) -> None:
        assert self._seen is not None and p.grad is not None
        self._seen += torch.linalg.vector_norm(p.grad)

    def agree(self, flags: Tensor) -> Tensor:
        """The maximum of each flag over ranks: one small all-reduce. flags: any shape, integer."""
        return across.all_max(flags.to(self.device))

    def step(self, lr: float) -> None:
        """Averages the gradients over ranks, updates with this learning rate, and drops the gradients.

        In fp16 an overflow on any rank leaves the update out on all, and halves the loss scale.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not self._averages:
            for p in self.trained:
                if p.grad is None:  # no loss has reached it: averaging would make it zero, and the optimizer decays it
                    p.grad = torch.zeros_like(p)
        self._deepspeed.step()
        if self._parts:
            assert not self._deepspeed.optimizer.overflow, "DeepSpeed left out a step of finite gradients"
        if self._seen is not None:
            self._seen.zero_()
        if self._scaler:
            before, self.loss_scale = self.loss_scale, self._scaler.get_scale()
            self.skipped += self.loss_scale < before

    def scalars(self) -> dict[str, float | int]:
        """For the monitor."""
        return {"loss_scale": self.loss_scale, "skipped_steps": self.skipped} if self._scaler else {}

    def pieces(self) -> dict[str, Piece]:
        """Everything that training changes, for a checkpoint:

        method.NAME parameters (fp32: ZeRO's masters are equal to them) and persistent buffers; optimizer.KEY.NAME the
        optimizer's state of parameter NAME, under ZeRO this rank's slice of it, under the same name;
        scaler.* the fp16 loss scale; engine.parts what engine.chunks=auto came to, over all ranks.
        """
        own = self.method.own_buffers
        pieces = {f"method.{name}": Piece.of(tensor, own=name in own) for name, tensor in self._state().items()}
        for name, p in self.method.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    pieces[f"optimizer.{key}.{name}"] = Piece.of(value)
        pieces |= state_pieces(self.optimizer, self._parts)
        if parts := self.chunking.parts:
            pieces["engine.parts"] = Piece.of(torch.tensor(parts))
        if self._scaler:
            counters = self._scaler.state_dict()
            pieces["scaler.scale"] = Piece.of(torch.tensor(counters["scale"], dtype=torch.float64))
            pieces["scaler.growth"] = Piece.of(torch.tensor(counters["_growth_tracker"]))
            pieces["scaler.skipped"] = Piece.of(torch.tensor(self.skipped))
        return pieces

    @torch.no_grad()
    def restore(self, saved: Saved) -> None:
        """Takes all that pieces() gave, on any number of ranks and at any ZeRO stage.

        Raises Refusal when the checkpoint lacks a tensor, or has it in another shape, or by rank and not whole, or the
        other way round.
        """
        own, world = self.method.own_buffers, across.size()
        whole, parts = set(saved.names()), set(saved.own_names())
        for name, tensor in self._state().items():
            if f"method.{name}" in (whole if name in own else parts):
                wrote, holds = ("whole", "by rank") if name in own else ("by rank", "whole")
                raise Refusal(
                    f"the checkpoint holds {name} {wrote}, this run {holds}; resume with the placement that it was "
                    "written with"
                )
            if name in own and saved.world != world:
                continue
            stored = saved.own(f"method.{name}", across.rank()) if name in own else saved.whole(f"method.{name}")
            if stored.shape != tensor.shape:
                raise Refusal(
                    f"the checkpoint's {name} is {tuple(stored.shape)}, this run's {tuple(tensor.shape)}; "
                    "resume with the recipe that it was written with"
                )
            tensor.copy_(stored)
        if saved.world != world:
            for name, memory in self.method.sharded.items():
                memory.reshard(saved.world, lambda buffer, rank, of=name: saved.own(f"method.{of}.{buffer}", rank))
        self._restore_optimizer(saved)
        if "engine.parts" in saved.names():
            self.chunking.pin(int(saved.whole("engine.parts")))
        if self._scaler:
            counters = self._scaler.state_dict()
            counters["scale"] = self.loss_scale = saved.whole("scaler.scale").item()
            counters["_growth_tracker"] = int(saved.whole("scaler.growth").item())
            self._scaler.load_state_dict(counters)
            self.skipped = int(saved.whole("scaler.skipped").item())

    def _restore_optimizer(self, saved: Saved) -> None:
        parameters = dict(self.method.named_parameters())
        names = [name.split(".", 2) for name in saved.names() if name.startswith("optimizer.")]
        for _, _, name in names:
            if name not in parameters:
                raise Refusal(f"the checkpoint has optimizer state of '{name}', which this run does not have")
        self.optimizer.state.clear()
        if self._parts:
            refresh(self._deepspeed.optimizer)
            return restore_state(self.optimizer, self._parts, saved)
        for _, key, name in names:
            value, p = saved.whole(f"optimizer.{key}.{name}"), parameters[name]
            # torch's optimizers count steps on the CPU
            self.optimizer.state[p][key] = value if key == "step" else value.to(p.device)
        return None

    def _state(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers, the tensors themselves."""
        return self.method.state_dict(keep_vars=True)


def _initialize(
    method: Method, optimizer: Optimizer, options: EngineOptions, device: torch.device, batch_per_rank: int
) -> Any:
    """deepspeed.initialize, its traps closed."""
    assert dist.is_initialized(), "the process group comes first"
    for name, p in method.named_parameters():
        assert p.dtype == torch.float32, f"{name} is {p.dtype}: low precision is autocast's part"
        assert p.dim() > 0, f"{name} has no dimension, which DeepSpeed cannot broadcast; give it the shape (1,)"
        assert p.is_contiguous(), f"{name} is not contiguous, and DeepSpeed views it flat; channels-last is for inputs"

    # Else it chooses an accelerator that this run may not use, and warns of it.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no CUDA on a CPU machine
    import deepspeed
    import deepspeed.ops

    # Its shared-memory all-reduce for CPUs takes a C++ compiler and up to a minute on first use, and its segments
    # outlive a killed worker; gloo is what the tests hold us to.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch_per_rank,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # gradients stay local until step(), however many backwards
        "gradient_clipping": options.clip,  # its own default is 1.0
        "zero_optimization": {"stage": options.zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device in every step
    }
    if options.zero:
        config["zero_optimization"] |= {
            "round_robin_gradients": False,
            "overlap_comm": False,
            "contiguous_gradients": options.zero == 2,  # at 1 it would copy all gradients once more
            "reduce_bucket_size": BUCKET,  # its own default takes 2 GB
            "compute_grad_norm": options.clip > 0,
        }
    if options.precision != "fp32":
        # Not "bf16"/"fp16": they cast parameters and leave buffers. No module communicates in low precision.
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[options.precision]
        config["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}

    phantom = optimizer.register_step_pre_hook(_refuse_phantom_step)
    logging.getLogger("DeepSpeed").addFilter(_not_of_untested_optimizers)
    engine, *_ = deepspeed.initialize(model=method, optimizer=optimizer, config=config, dist_init_required=False)
    phantom.remove()
    assert engine.device == device or device.index is None and engine.device.type == device.type, engine.device
    return engine


def _refuse_whole_tensors(optimizer: Optimizer, options: EngineOptions) -> None:
    """ZeRO gives the optimizer flat tensors: right for what works by element, and for LARS, which is told of the cuts.

    Raises Refusal for an optimizer that is neither.
    """
    if options.zero and not isinstance(optimizer, LARS | torch.optim.SGD | torch.optim.AdamW):
        raise Refusal(
            f"engine.zero is {options.zero}, under which {type(optimizer).__name__} would take the norms of a rank's "
            "pieces for those of whole tensors; use engine.zero=0, or optimizer.name=lars, sgd or adamw"
        )


def _not_of_untested_optimizers(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()  # the tests have them


def _refuse_phantom_step(*_: Any) -> None:
    # Some of its modes step once with zero gradients, to allocate state: weight decay would move the weights.
    raise AssertionError("DeepSpeed stepped the optimizer while initialising")
