"""DeepSpeed behind a few verbs: embed, backward, step, and the pieces that a checkpoint keeps."""

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from data.refusal import Refusal
from methods import across, norm
from methods.method import Method, Tensors
from trainer.options import EngineOptions
from trainer.saved import Saved
from trainer.shard import Piece

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """One method, its optimizer, and the process group that they train in.

    The process group is initialised and the optimizer built on the method before; the method is moved to the device.
    A step is: embed and backward any number of times, then step. Gradients stay this rank's own until step.

    Raises Refusal for chunks that do not divide the batch, or that a norm over the global batch or the method rules
    out.
    """

    def __init__(
        self, method: Method, optimizer: Optimizer, options: EngineOptions, device: torch.device, batch_per_rank: int
    ) -> None:
        if batch_per_rank % options.chunks:
            raise Refusal(
                f"engine.chunks is {options.chunks}, which does not divide the {batch_per_rank} samples of a rank"
            )
        if options.chunks > 1 and norm.requires_whole_batch(method):
            raise Refusal(
                f"engine.chunks is {options.chunks}, but the BatchNorm is 'global': its statistics need the whole batch"
                " at once; use engine.chunks=1 or encoder.norm=local"
            )
        if options.chunks > 1 and method.whole_batch:
            raise Refusal(f"engine.chunks is {options.chunks}, but {method.whole_batch}; use engine.chunks=1")
        self.method, self.optimizer, self.options, self.device = method, optimizer, options, device
        self._deepspeed = _initialize(method, optimizer, options, device, batch_per_rank)
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
        """Adds the loss's gradient to this rank's own; nothing crosses ranks here but what the loss itself sends."""
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def agree(self, flags: Tensor) -> Tensor:
        """The maximum of each flag over ranks: one small all-reduce. flags: any shape, integer."""
        return across.all_max(flags.to(self.device))

    def step(self, lr: float) -> None:
        """Averages the gradients over ranks, updates with this learning rate, and drops the gradients.

        In fp16 an overflow on any rank leaves the update out on all, and halves the loss scale.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._deepspeed.step()
        if self._scaler:
            before, self.loss_scale = self.loss_scale, self._scaler.get_scale()
            self.skipped += self.loss_scale < before

    def scalars(self) -> dict[str, float | int]:
        """For the monitor."""
        return {"loss_scale": self.loss_scale, "skipped_steps": self.skipped} if self._scaler else {}

    def pieces(self) -> dict[str, Piece]:
        """Everything that training changes, for a checkpoint:

        method.NAME parameters and persistent buffers; optimizer.KEY.NAME the optimizer's state of parameter NAME;
        scaler.* the fp16 loss scale.
        """
        own = self.method.own_buffers
        pieces = {f"method.{name}": Piece.of(tensor, own=name in own) for name, tensor in self._state().items()}
        for name, p in self.method.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    pieces[f"optimizer.{key}.{name}"] = Piece.of(value)
        if self._scaler:
            counters = self._scaler.state_dict()
            pieces["scaler.scale"] = Piece.of(torch.tensor(counters["scale"], dtype=torch.float64))
            pieces["scaler.growth"] = Piece.of(torch.tensor(counters["_growth_tracker"]))
            pieces["scaler.skipped"] = Piece.of(torch.tensor(self.skipped))
        return pieces

    @torch.no_grad()
    def restore(self, saved: Saved) -> None:
        """Takes all that pieces() gave, on any number of ranks. Raises Refusal when the checkpoint lacks a tensor, or
        has it in another shape, or by rank and not whole, or the other way round."""
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
        parameters = dict(self.method.named_parameters())
        self.optimizer.state.clear()
        for stored_name in saved.names():
            if stored_name.startswith("optimizer."):
                _, key, name = stored_name.split(".", 2)
                if name not in parameters:
                    raise Refusal(f"the checkpoint has optimizer state of '{name}', which this run does not have")
                value, p = saved.whole(stored_name), parameters[name]
                # torch's optimizers count steps on the CPU
                self.optimizer.state[p][key] = value if key == "step" else value.to(p.device)
        if self._scaler:
            counters = self._scaler.state_dict()
            counters["scale"] = self.loss_scale = saved.whole("scaler.scale").item()
            counters["_growth_tracker"] = int(saved.whole("scaler.growth").item())
            self._scaler.load_state_dict(counters)
            self.skipped = int(saved.whole("scaler.skipped").item())

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
    if options.precision != "fp32":
        # Not "bf16"/"fp16": they cast parameters and leave buffers. No module communicates in low precision.
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[options.precision]
        config["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}

    phantom = optimizer.register_step_pre_hook(_refuse_phantom_step)
    engine, *_ = deepspeed.initialize(model=method, optimizer=optimizer, config=config, dist_init_required=False)
    phantom.remove()
    assert engine.device == device or device.index is None and engine.device.type == device.type, engine.device
    return engine


def _refuse_phantom_step(*_: Any) -> None:
    # Some of its modes step once with zero gradients, to allocate state: weight decay would move the weights.
    raise AssertionError("DeepSpeed stepped the optimizer while initialising")
