"""DeepSpeed behind a few methods: embed, backward, step, and the tensors that a checkpoint holds."""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from kilobatch.data import cpus
from kilobatch.data.batch import Batch, Clock
from kilobatch.data.errors import UserError
from kilobatch.methods import collectives
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks import keyed_layers
from kilobatch.trainer.checkpoint.reader import Saved
from kilobatch.trainer.checkpoint.shard import Piece
from kilobatch.trainer.chunking import Chunking
from kilobatch.trainer.costs.zero_memory import BUCKET
from kilobatch.trainer.optim.group_rates import GroupRates
from kilobatch.trainer.optim.lars import LARS
from kilobatch.trainer.optim.tensor_clipping import TensorClipping
from kilobatch.trainer.optim.zero_partitions import rank_partitions, refresh, restore_state, state_pieces
from kilobatch.trainer.options import EngineOptions, zero_problem
from kilobatch.trainer.ranks.import_deepspeed import import_deepspeed

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """One method, its optimizer, and the process group that they train in.

    Before it is built, the process group is initialised, the method is on its device, and the optimizer is built on the
    method. A step is: begin, embed and backward any number of times, then step. Gradients stay this rank's own until
    step; at ZeRO 2 each backward averages its part of them, and a rank keeps only the averages that it updates with.

    Raises UserError for chunks that do not divide the batch, or that a norm over the global batch or the method rules
    out, and under ZeRO for an optimizer that needs whole tensors.
    """

    def __init__(
        self, method: Method, optimizer: Optimizer, options: EngineOptions, device: torch.device, batch_per_rank: int
    ) -> None:
        self.chunking = Chunking(options, method, batch_per_rank, device, self.autocast)
        self.method, self.optimizer, self.options, self.device = method, optimizer, options, device
        problem = zero_problem(options.zero, type(optimizer).__name__.lower())
        if problem and not isinstance(optimizer, LARS | SGD | AdamW):
            raise UserError(problem)
        self._rates = GroupRates(optimizer)
        # At ZeRO 2 a rank's own gradients are gone after a backward, so the sum of their norms is kept for finite():
        # an infinity or NaN in any of them is in the sum as well.
        self._norm_sum = torch.zeros((), device=device) if options.zero == 2 else None
        if self._norm_sum is not None:
            for p in method.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(self._add_norm)  # before DeepSpeed's own, which averages
        self.trained = [p for p in method.parameters() if p.requires_grad]
        self._deepspeed = _initialize(method, optimizer, options, device, batch_per_rank)
        # Averaging over one rank would cost two copies of all gradients and change nothing.
        self._averages = collectives.world_size() > 1 or options.zero > 0
        self._deepspeed.enable_backward_allreduce = self._averages
        names = {p: name for name, p in method.named_parameters()}
        self._parts = rank_partitions(self._deepspeed.optimizer, names) if options.zero else []
        if self._parts and isinstance(optimizer, LARS):
            optimizer.use_partitions(self._parts)
        if options.clip and options.clip_by == "tensor":
            optimizer.register_step_pre_hook(TensorClipping(options.clip, self._parts))
        self._scaler: torch.amp.GradScaler | None = self._deepspeed.torch_autocast_z0_gradscaler
        self.loss_scale = self._scaler.get_scale() if self._scaler else 1.0
        self.skipped = 0  # steps without an update, because fp16 gradients overflowed
        if options.compile:
            self._deepspeed.compile()

    def autocast(self) -> torch.autocast:
        return autocast(self.options.precision, self.device.type)

    def begin(self, clock: Clock) -> None:
        """Begins a step of the training: from which one on a late group of parameters is trained, the clock says."""
        self._rates.begin(clock)

    def embed(self, batch: Batch) -> Tensors:
        """method.embed under autocast, with the draws of these samples."""
        with keyed_layers.drawing(self.method, batch.keys):
            return self._deepspeed(batch)

    def target(self, batch: Batch) -> Tensors:
        """method.target under autocast, without gradient and without draws."""
        with torch.no_grad(), self.autocast(), keyed_layers.off(self.method):
            return self.method.target(batch)

    def backward(self, loss: Tensor) -> None:
        """Adds the loss's gradient to this rank's own gradients.

        Below ZeRO 2 the only communication is that of the loss itself.
        """
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def finite(self) -> Tensor:
        """0-dim bool: all of this rank's own gradients since the last step are finite."""
        if self._norm_sum is not None:
            return self._norm_sum.isfinite()
        grads = [p.grad for p in self.trained if p.grad is not None]
        return torch.stack(torch._foreach_norm(grads)).isfinite().all()  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def _add_norm(self, p: Tensor) -> None:
        assert self._norm_sum is not None and p.grad is not None
        self._norm_sum += torch.linalg.vector_norm(p.grad)

    def agree(self, flags: Tensor) -> Tensor:
        """The maximum of each flag over ranks: one small all-reduce. flags: any shape, integer."""
        return collectives.all_reduce_max(flags.to(self.device))

    def step(self, lr: float, decay: float | None = None) -> None:
        """Averages the gradients over ranks, updates with this learning rate and weight decay, and drops the gradients.

        Of both a group of parameters takes its share, trainer/optim/group_rates.py. decay None: that of the optimizer's
        groups. In fp16 an overflow on any rank skips the update on all, and halves the loss scale.
        """
        self._rates.set(lr, decay)
        if not self._averages:
            for p in self.trained:
                # No loss depends on p. On several ranks averaging makes its gradient zero, and the optimizer decays it.
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
        self._deepspeed.step()
        if self._parts:
            assert not self._deepspeed.optimizer.overflow, "DeepSpeed left out a step of finite gradients"
        if self._norm_sum is not None:
            self._norm_sum.zero_()
        if self._scaler:
            before, self.loss_scale = self.loss_scale, self._scaler.get_scale()
            self.skipped += self.loss_scale < before

    def scalars(self) -> dict[str, float | int]:
        """For the monitor."""
        return {"loss_scale": self.loss_scale, "skipped_steps": self.skipped} if self._scaler else {}

    def pieces(self) -> dict[str, Piece]:
        """Everything that training changes, for a checkpoint.

        method.NAME: parameters (fp32: ZeRO's masters are equal to them) and persistent buffers; optimizer.KEY.NAME: the
        optimizer's state of parameter NAME, under ZeRO this rank's slice of it; scaler.*: the fp16 loss scale;
        engine.parts: the chunks of all ranks, where engine.chunks is auto.
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
        """Reads everything that pieces() wrote, on any number of ranks and at any ZeRO stage.

        Raises UserError when the checkpoint lacks a tensor, has it in another shape, or holds by rank what this run
        holds whole, or the other way round.
        """
        own, world = self.method.own_buffers, collectives.world_size()
        whole, parts = set(saved.names()), set(saved.own_names())
        for name, tensor in self._state().items():
            if f"method.{name}" in (whole if name in own else parts):
                wrote, holds = ("whole", "by rank") if name in own else ("by rank", "whole")
                raise UserError(
                    f"the checkpoint holds {name} {wrote}, this run {holds}; resume with the placement that it was "
                    "written with"
                )
            if name in own and saved.world != world:
                continue
            stored = saved.own(f"method.{name}", collectives.rank()) if name in own else saved.whole(f"method.{name}")
            if stored.shape != tensor.shape:
                raise UserError(
                    f"the checkpoint's {name} is {tuple(stored.shape)}, this run's {tuple(tensor.shape)}; "
                    "resume with the recipe that it was written with"
                )
            tensor.copy_(stored)
        if saved.world != world:
            for name, memory in self.method.sharded.items():
                memory.reshard(saved.world, lambda buffer, rank, of=name: saved.own(f"method.{of}.{buffer}", rank))
        self._restore_optimizer(saved)
        if "engine.parts" in saved.names():
            self.chunking.resume(int(saved.whole("engine.parts")))
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
                raise UserError(f"the checkpoint has optimizer state of '{name}', which this run does not have")
        self.optimizer.state.clear()
        if self._parts:
            refresh(self._deepspeed.optimizer)
            return restore_state(self.optimizer, self._parts, saved)
        for _, key, name in names:
            if not parameters[name].requires_grad:  # frozen since
                continue
            value, p = saved.whole(f"optimizer.{key}.{name}"), parameters[name]
            # torch's optimizers count steps on the CPU
            self.optimizer.state[p][key] = value if key == "step" else value.to(p.device)
        return None

    def _state(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers, not copied."""
        return self.method.state_dict(keep_vars=True)


def autocast(precision: str, device: str) -> torch.autocast:
    """The autocast context of engine.precision ("fp32", "bf16" or "fp16") on this kind of device; off in fp32."""
    dtype = None if precision == "fp32" else AUTOCAST[precision]
    return torch.autocast(device, dtype, enabled=dtype is not None)


def has_bf16_units(device: torch.device) -> bool:
    """Whether this device of the process multiplies bfloat16 by units of its own, NVIDIA's from sm_80 on."""
    return torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda" else cpus.has_bf16_units()


def _initialize(
    method: Method, optimizer: Optimizer, options: EngineOptions, device: torch.device, batch_per_rank: int
) -> Any:
    """deepspeed.initialize with this project's configuration; parameters and device are checked around it."""
    assert dist.is_initialized(), "the process group comes first"
    _check_parameters(method)
    deepspeed = import_deepspeed(device)
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    initial_step = optimizer.register_step_pre_hook(_refuse_initial_step)
    logging.getLogger("DeepSpeed").addFilter(_is_other_than_untested_optimizer)
    engine, *_ = deepspeed.initialize(
        model=method, optimizer=optimizer, config=_config(options, batch_per_rank), dist_init_required=False
    )
    initial_step.remove()
    assert engine.device == device or device.index is None and engine.device.type == device.type, engine.device
    return engine


def _check_parameters(method: Method) -> None:
    for name, p in method.named_parameters():
        assert p.dtype == torch.float32, f"{name} is {p.dtype}: low precision is autocast's part"
        assert p.dim() > 0, f"{name} has no dimension, which DeepSpeed cannot broadcast; give it the shape (1,)"
        assert p.is_contiguous(), f"{name} is not contiguous, and DeepSpeed views it flat; channels-last is for inputs"


def _config(options: EngineOptions, batch_per_rank: int) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    clip = options.clip if options.clip_by == "global" else 0.0
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch_per_rank,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # gradients stay local until step(), however many backwards
        "gradient_clipping": clip,  # DeepSpeed's own default is 1.0
        "zero_optimization": {"stage": options.zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # this timer waits for the device in every step
    }
    if options.zero:
        config["zero_optimization"] |= {
            "round_robin_gradients": False,
            "overlap_comm": False,
            "contiguous_gradients": options.zero == 2,  # at stage 1 it would copy all gradients once more
            "reduce_bucket_size": BUCKET,  # DeepSpeed's own default takes 2 GB
            "compute_grad_norm": clip > 0,
        }
    if options.precision != "fp32":
        # Not DeepSpeed's "bf16" or "fp16" sections: they cast parameters and leave buffers. The empty list: no module
        # communicates in low precision.
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[options.precision]
        config["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    return config


def _is_other_than_untested_optimizer(record: logging.LogRecord) -> bool:
    """A log filter that drops DeepSpeed's warning of optimizers that it has not tested; this project's tests do."""
    return "untested optimizer" not in record.getMessage()


def _refuse_initial_step(*_: Any) -> None:
    # Some of DeepSpeed's modes step once with zero gradients, to allocate state: weight decay would move the weights.
    raise AssertionError("DeepSpeed stepped the optimizer while initialising")
