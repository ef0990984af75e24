"""TensorFlow's checkpoints: files that TensorFlow wrote, and outputs of the authors' network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kilobatch.data.errors import UserError
from kilobatch.launch.cli.convert import import_tensorflow
from kilobatch.launch.worker.pretrained import load_method
from kilobatch.methods.method import DataFacts
from kilobatch.methods.networks.build import build_encoder
from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.methods.networks.resnet import ResNet
from kilobatch.methods.papers.finetune import FineTune
from kilobatch.methods.papers.simclr_v2 import SimCLRV2
from kilobatch.trainer.tf_import.bundle import Bundle, find_checkpoint
from kilobatch.trainer.tf_import.crc32c import crc32c
from kilobatch.trainer.tf_import.variables import read_variables
from tests.helpers.tf_checkpoints import Array, Authors, write_bundle

REAL = Path(__file__).parent / "tensorflow_checkpoint"
NAME = "model.ckpt-250228"


def test_crc32c() -> None:
    """RFC 3720, B.4."""
    assert crc32c(b"123456789") == 0xE3069283 and crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C and crc32c(b"") == 0


def test_what_tensorflow_wrote() -> None:
    bundle = Bundle(find_checkpoint(REAL))
    expected: dict[str, Array] = {
        "base_model/conv2d/kernel": np.arange(72, dtype="f4").reshape(3, 3, 2, 4),
        "base_model/conv2d/kernel/Momentum": np.zeros((3, 3, 2, 4), "f4"),
        "half": np.arange(5).astype("f2"),
        "double": np.arange(6, dtype="f8").reshape(2, 3),
        "global_step": np.array(250228),
        "empty": np.zeros((0, 3), "f4"),
        "small": np.arange(7, dtype="i4"),
    }
    expected |= {f"many/variables/with_long_names/number_{i}": np.full((3,), i, "f4") for i in range(120)}
    assert {*bundle.entries} == {*expected, "flags"}
    for name, value in expected.items():
        assert (read := bundle.read(name)).dtype == value.dtype and np.array_equal(read, value), name
    with pytest.raises(
        UserError, match="variable 'flags' of checkpoint .* is of TensorFlow's type 10, which is not read"
    ):
        bundle.read("flags")


def test_several_data_files(tmp_path: Path) -> None:
    variables: dict[str, Array] = {f"v/{i}": np.full((i,), i, "f4") for i in range(40)}
    write_bundle(tmp_path / "model", variables, shards=3)
    bundle = Bundle(find_checkpoint(tmp_path / "model.data-00001-of-00003"))
    assert all(np.array_equal(bundle.read(name), value) for name, value in variables.items())


def copied(tmp_path: Path) -> Path:
    for path in REAL.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / NAME


def test_every_flipped_byte_of_an_index_is_noticed(tmp_path: Path) -> None:
    whole = Bundle(copied(tmp_path)).entries
    index = tmp_path / f"{NAME}.index"
    good = index.read_bytes()
    for at in range(0, len(good), 5):
        index.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        try:
            assert Bundle(tmp_path / NAME).entries == whole, at  # of the footer's padding
        except UserError as error:
            assert "is no whole index of a TensorFlow checkpoint: " in str(error)
    for length in (0, 20, 47, 48, 200, len(good) - 1):
        index.write_bytes(good[:length])
        with pytest.raises(UserError, match="is no whole index"):
            Bundle(tmp_path / NAME)


def test_damaged_and_missing_data(tmp_path: Path) -> None:
    prefix = copied(tmp_path)
    data = tmp_path / f"{NAME}.data-00000-of-00001"
    good, bundle = data.read_bytes(), Bundle(prefix)
    at = bundle.entries["double"].offset
    data.write_bytes(good[: at + 3] + b"\x07" + good[at + 4 :])
    with pytest.raises(UserError, match="the checksum of variable 'double' does not match its bytes; copy it anew"):
        bundle.read("double")
    assert len(bundle.read("half")) == 5
    data.write_bytes(good[: at + 8])
    with pytest.raises(UserError, match="variable 'double' has 8 bytes there instead of 48"):
        bundle.read("double")
    with pytest.raises(UserError, match="has no variable 'globalstep'; did you mean 'global_step'"):
        bundle.read("globalstep")
    data.unlink()
    with pytest.raises(UserError, match="data-00000-of-00001 is missing in .*: the checkpoint has 1 data files"):
        Bundle(prefix)


def test_find_checkpoint(tmp_path: Path) -> None:
    for path in (REAL, REAL / NAME, REAL / f"{NAME}.index", REAL / f"{NAME}.data-00000-of-00001"):
        assert find_checkpoint(path) == REAL / NAME
    refused: dict[Path, str] = {
        tmp_path: "holds no TensorFlow checkpoint: no file there ends in .index",
        tmp_path / "model.ckpt-1": "there is no TensorFlow checkpoint .*: model.ckpt-1.index is missing",
        REAL / "README.md": "is one file; a TensorFlow checkpoint has an index beside its data, README.md.index",
    }
    for path, message in refused.items():
        with pytest.raises(UserError, match=message):
            find_checkpoint(path)
    copied(tmp_path)
    (tmp_path / "checkpoint").unlink()
    (tmp_path / "other.index").write_bytes(b"")
    with pytest.raises(UserError, match=f"holds 2 checkpoints; name one of them: {NAME}, other"):
        find_checkpoint(tmp_path)


def imported(checkpoint: Path, **options: Any) -> Any:
    out = checkpoint.with_name("out.safetensors")
    import_tensorflow(checkpoint, out, **({"classifier_after": None, "projections": False, "force": True} | options))
    return load_method(str(out))


IMAGES = np.random.default_rng(1).random((1, 34, 23, 3))  # 17 and 12 pixels before the max-pool


def agree(got: torch.Tensor, want: Array) -> None:
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@torch.no_grad()
def test_selective_kernels_with_both_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    authors = Authors((3, 4, 6, 3), 0.0625, layers=3, classes=5, selector=1)
    wanted = authors(IMAGES)
    ours = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float()
    slots: dict[str, Array] = {"global_step": np.array(7), "base_model/conv2d/kernel/Momentum": np.zeros(3, "f4")}
    write_bundle(tmp_path / "model", authors.variables | slots)
    with pytest.raises(
        UserError, match="a projection head of 3 layers and a classifier of 5 classes; say which is meant"
    ):
        imported(tmp_path / "model")
    with pytest.raises(UserError, match="can stand on 0 to 3 of them; --classifier-after is 4"):
        imported(tmp_path / "model", classifier_after=4)
    method = imported(tmp_path / "model", projections=True)
    assert isinstance(method, SimCLRV2)
    agree(method.encoder(ours), wanted["features"])
    agree(method.head(method.encoder(ours)), wanted["projections"])
    assert "left out: global_step, head_supervised/linear_layer/dense/bias, " in capsys.readouterr().out
    found = read_variables(Bundle(tmp_path / "model"), 1, False)
    fine_tuned = FineTune(build_encoder(EncoderOptions.model_validate(found.encoder)), layer=1)
    fine_tuned.prepare(DataFacts(0, 5))
    fine_tuned.load_state_dict({name.removeprefix("method."): tensor for name, tensor in found.tensors.items()})
    agree(fine_tuned.eval().logits(ours), wanted["logits"])


@torch.no_grad()
def test_a_classifier_on_the_projections(tmp_path: Path) -> None:
    """ft_proj_selector 2 of a head of 2 layers."""
    authors = Authors((3, 4, 6, 3), 0.0, layers=2, classes=5, selector=2)
    wanted = authors(IMAGES)
    write_bundle(tmp_path / "model", authors.variables)
    method = imported(tmp_path / "model", classifier_after=2)
    assert isinstance(method, FineTune) and (method.layer, method.dim) == (2, 24)
    ours = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float()
    agree(method.represent(ours), wanted["projections"])
    agree(method.logits(ours), wanted["logits"])


@torch.no_grad()
def test_plain_ones_pool_as_tensorflow_does(tmp_path: Path) -> None:
    authors = Authors((3, 4, 6, 3), 0.0, layers=0, classes=4, selector=0)
    wanted = authors(IMAGES)
    ours = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float()
    write_bundle(tmp_path / "model", authors.variables)
    method = imported(tmp_path / "model")
    assert isinstance(method, FineTune) and method.layer == 0
    agree(method.logits(ours), wanted["logits"])
    assert isinstance(method.encoder, ResNet)
    method.encoder.pads_as_tensorflow = False  # torchvision's padding gives other features
    assert np.abs(method.logits(ours).numpy() - wanted["logits"]).max() > 1e-3 * np.abs(wanted["logits"]).max()


def shapes(depths: tuple[int, ...] = (3, 4, 6, 3)) -> dict[str, Array]:
    """The variables of a plain network with a classifier."""
    authors = Authors(depths, 0.0, layers=0, classes=4, selector=0)
    authors(IMAGES[:1])
    return authors.variables


def test_other_networks_are_refused(tmp_path: Path) -> None:
    def renamed(variables: dict[str, Array], old: str, new: str) -> dict[str, Array]:
        return {name.replace(old, new): value for name, value in variables.items()}

    small, cases = shapes((1, 1, 1, 1)), list[tuple[dict[str, Array], str]]()
    cases.append((small, "has 17 convolutions, the last of shape .1, 1, 512, 2048.: none of resnet50, "))
    cases.append(
        (renamed(small, "base_model", "resnet"), "has no variables base_model/conv2d…, .*; it has head_superv")
    )
    cases.append(({"w": np.zeros(2, "f4")}, "has no variables base_model/conv2d…, .*; it has w"))
    whole = shapes()
    without = {name: value for name, value in whole.items() if not name.startswith("head")}
    cases.append((without, "has neither head_contrastive/nl_… nor head_supervised/linear_layer/dense/kernel"))
    change: Callable[[str, Array], dict[str, Array]] = lambda name, value: whole | {name: value}  # noqa: E731
    cases.append(
        (change("base_model/conv2d_7/bias", np.zeros(4, "f4")), "1 variables of an encoder that are not under")
    )
    cases.append((change("base_model/batch_normalization_3/gamma", np.zeros(9, "f4")), "_3/gamma' .* has shape .9,., "))
    cases.append(
        ({k: v for k, v in whole.items() if "ation_9/beta" not in k}, "lacks variable .*_9/beta'; copy it anew")
    )
    cases.append(
        ({k: v for k, v in whole.items() if "ation_52/" not in k}, "has too few norms: none for encoder.layer4")
    )
    for variables, message in cases:
        write_bundle(tmp_path / "model", variables, hollow=True)
        with pytest.raises(UserError, match=message):
            imported(tmp_path / "model")
    assert not (tmp_path / "out.safetensors").exists()
