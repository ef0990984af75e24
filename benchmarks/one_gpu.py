"""A global batch of 4096 on one GPU: SimCLR's step with ResNet-50, the batch in as many chunks as memory asks for.

    python -m benchmarks.one_gpu                                                   # 224 pixels, bf16, synthetic views
    python -m benchmarks.one_gpu --device cpu --batch 64 --pixels 32 --chunks 4    # whether this script runs

The step is the trainer's own: engine, loss over all, LARS, check, running statistics. Beside it stands the bare
encoder's forward and backward on one chunk, so the last column is what chunks, loss and update leave of that rate.
"""

import argparse
import tempfile

import torch
import torch.distributed as dist

from kilobatch.methods.networks import build as encoders
from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.trainer.bench.rates import best
from kilobatch.trainer.bench.step import bare, noise, whole
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
    method = SimCLR(encoders.build(encoder), operands="bf16" if on_gpu else "fp32").to(device)
    optimizer = optimizers.build(OptimizerOptions(name="lars", lr=4.8), method, options.batch)
    asked = EngineOptions.model_validate({"precision": "bf16" if on_gpu else "fp32", "chunks": chunks, "keep": "auto"})
    engine = Engine(method, optimizer, asked, device, options.batch)
    batch = noise(options.batch, options.pixels, device)
    taken = best(lambda: whole(engine, batch), device)
    count, kept = engine.chunking.decided(batch.views)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else float("nan")
    part = batch.views[: options.batch // count]
    alone = best(lambda: bare(engine, part), device) * count
    rate = f"{taken:.3f} {options.batch / taken:,.0f}"
    print("batch | chunks, kept | seconds a step, images a second | GiB at the peak | of the bare encoder's rate")
    print(f"{options.batch} | {count}, {kept} | {rate} | {peak:.1f} | {alone / taken:.0%}")


if __name__ == "__main__":
    main()
