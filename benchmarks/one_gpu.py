"""A global batch of 4096 on one GPU: SimCLR's step with ResNet-50, the batch in as many chunks as memory requires.

    python -m benchmarks.one_gpu                                                   # 224 pixels, bf16, synthetic views
    python -m benchmarks.one_gpu --device cpu --batch 64 --pixels 32 --chunks 4    # a quick check of this script

The step is the trainer's own: engine, loss over all samples, LARS, check, running statistics. The last column divides
its rate by that of the encoder's forward and backward alone on one chunk: the rest is the cost of chunks, loss and
update.
"""

import argparse
import tempfile

import torch
import torch.distributed as dist

from kilobatch.methods.networks import build
from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.trainer.bench.rates import best
from kilobatch.trainer.bench.step import encoder_pass, random_batch, train_step
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.optim import optimizers
from kilobatch.trainer.optim.options import OptimizerOptions
from kilobatch.trainer.options import EngineOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--chunks", default="auto")
    parser.add_argument("--encoder", default="resnet50")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if options.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        run(options, torch.device(options.device))
        dist.destroy_process_group()


def run(options: argparse.Namespace, device: torch.device) -> None:
    torch.manual_seed(0)
    on_gpu = device.type == "cuda"
    chunks = options.chunks if options.chunks == "auto" else int(options.chunks)
    encoder = EncoderOptions.model_validate({"name": options.encoder, "norm": "local"})
    method = SimCLR(build.build_encoder(encoder), operands="bf16" if on_gpu else "fp32").to(device)
    optimizer = optimizers.build_optimizer(OptimizerOptions(name="lars", lr=4.8), method, options.batch)
    engine_options = EngineOptions.model_validate(
        {"precision": "bf16" if on_gpu else "fp32", "chunks": chunks, "keep": "auto"}
    )
    engine = Engine(method, optimizer, engine_options, device, options.batch)
    batch = random_batch(options.batch, options.pixels, device)
    seconds = best(lambda: train_step(engine, batch), device)
    count, kept = engine.chunking.decide(batch)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else float("nan")
    part = batch.first(options.batch // count)
    alone = best(lambda: encoder_pass(engine, part), device) * count
    rate = f"{seconds:.3f} {options.batch / seconds:,.0f}"
    print("batch | chunks, kept | seconds a step, images a second | GiB at the peak | of the bare encoder's rate")
    print(f"{options.batch} | {count}, {kept} | {rate} | {peak:.1f} | {alone / seconds:.0%}")


if __name__ == "__main__":
    main()
