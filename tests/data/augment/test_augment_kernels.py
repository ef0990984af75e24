"""Triton's kernels of augmentation: the images of torch_ops in the interpreter, and compilation for GPUs."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kilobatch.data.augment import torch_ops
from kilobatch.data.augment.device import augment
from kilobatch.data.tensor_rng import keys
from kilobatch.data.views import columns
from kilobatch.data.views.draws import draw_values
from kilobatch.data.views.options import Blur, Jitter, Second, Solarize, Views
from tests.data.augment.test_augment import EVERYTHING, PHOTOMETRIC, photos
from tests.helpers.process_groups import run_ranks

pytest.importorskip("triton", reason="no triton for this system", exc_type=ImportError)

COUNT = 6
OURS = EVERYTHING.model_copy(update={"affine": None})
CASES: dict[str, Views] = {
    "everything": OURS.model_copy(update={"size": 34}),  # 1,156 pixels: two blocks
    "a second view of its own": OURS.model_copy(
        update={"size": 9, "second": Second(blur=Blur(probability=1, kernel=17, sigma=(3, 4)), solarize=Solarize())}
    ),
    "nothing": Views(size=8, jitter=None, grey=0, blur=None),
    "all blurred": Views(size=8, jitter=Jitter(probability=1), blur=Blur(probability=1, kernel=3)),
    "borders that differ": OURS.model_copy(
        update={
            "size": 9,
            "blur": Blur(probability=1, kernel=17, sigma=(3, 4), border="zero"),
            "second": Second(blur=Blur(probability=1, kernel=9, border="edge")),
        }
    ),
    "bytes without jitter": OURS.model_copy(update={"size": 34, "jitter": None, "photometric": PHOTOMETRIC}),
}


def images(views: Views, channels_last: bool) -> Tensor:
    bytes_ = photos(COUNT * views.count, views.size).reshape(COUNT, views.count, views.size, views.size, 3)
    views_of_bytes = torch.from_numpy(bytes_).permute(0, 1, 4, 2, 3)  # as the loader gives them
    return views_of_bytes if channels_last else views_of_bytes.contiguous()


def differences() -> dict[tuple[str, bool], float]:
    """The largest differences by case and layout: from torch's images, of 255; and of bf16 from fp32, relative."""
    torch.set_num_threads(1)
    found = {}
    for name, views in CASES.items():
        view_keys = keys(1, 2, torch.arange(COUNT), views.count)
        for channels_last in (True, False) if name == "everything" else (True,):
            x = images(views, channels_last)
            got, want = augment(x, view_keys, views), torch_ops.augment_by_torch(x, view_keys, views)
            assert got.shape == want.shape and got.stride() == want.stride()
            found[name, channels_last] = (
                (255 * torch.tensor(views.std)[:, None, None] * (got - want).abs()).max().item()
            )
            if name == "nothing":
                half = augment(x, view_keys, views, torch.bfloat16)
                assert half.dtype == torch.bfloat16
                found["bf16", channels_last] = ((half.float() - got).abs() / got.abs()).max().item()
    moved = EVERYTHING.model_copy(update={"size": 8})  # no kernel moves images
    x, view_keys = images(moved, True), keys(1, 2, torch.arange(COUNT), 2)
    assert torch.equal(augment(x, view_keys, moved), torch_ops.augment_by_torch(x, view_keys, moved))
    return found


def test_kernels_give_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = run_ranks(1, differences, timeout=300)[0]
    assert 0 < found.pop(("bf16", True)) <= 2**-7  # the interpreter cuts off instead of rounding
    assert len(found) == len(CASES) + 1
    assert max(found.values()) < 2e-3, found


def test_every_operation_was_among_those_compared() -> None:
    view_keys = keys(1, 2, torch.arange(COUNT), 2)
    values = draw_values(view_keys, torch.from_numpy(CASES["everything"].plans())).flatten(0, 1)
    for operation in (columns.JITTER, columns.GREY, columns.BLUR, columns.SOLARIZE):
        done = values[:, operation] > 0
        assert done.any() and not done.all()
    first = columns.ORDERS[values[values[:, columns.JITTER] > 0, columns.ORDER].long().numpy(), 0]
    assert len(np.unique(first)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("out", ["*fp32", "*bf16"])
def test_kernels_compile_for_gpus(out: str, capability: int) -> None:
    from kilobatch.data.augment.kernels.blur import blur
    from kilobatch.data.augment.kernels.colour import colour, grey_means
    from tests.helpers.ptxas import SHARED_MEMORY, build

    types = dict.fromkeys(("parameters", "means", "planes", "weights", "mean_r", "mean_g", "mean_b"), "*fp32")
    types |= {"images": "*u8", "which": "*i64", "reaches": "*i32", "out": out}
    types |= {f"{of}_{channel}": "fp32" for of in ("mean", "std") for channel in "rgb"}
    for kernel, values in (
        (grey_means, {}),
        (colour, {"FINISH": True}),
        (colour, {"FINISH": False}),
        (blur, {"DOWN": True}),
        (blur, {"DOWN": False}),
    ):
        built = build(kernel, types, {"BLOCK": 1024, **values}, capability)
        assert built.shared <= SHARED_MEMORY[capability] and built.stack == 0, (kernel, built.shared, built.stack)
