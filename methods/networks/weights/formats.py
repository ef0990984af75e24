"""Table of the packages whose checkpoints are known: where the encoder lies in them, and how they spell its names."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Format:
    """A package's checkpoint. place: a regular expression, of the keys that lead to the encoder's tensors, each with a
    slash, and what stands before each name; beside: one that another name there, or a key at the top, begins with; "":
    none has to."""

    package: str
    place: str
    beside: str = ""


# The first that fits gives the name. Where a file has an encoder twice, such as a momentum encoder, that of the earlier
# row is taken. The keys are those of the authors' repositories.
FORMATS = (
    Format("MoCo v1 or v2", r"state_dict/module\.encoder_q\."),
    Format("MoCo v3", r"state_dict/module\.base_encoder\."),
    Format("DINO's teacher", r"teacher/(module\.)?backbone\."),
    Format("DINO's student", r"student/(module\.)?backbone\."),
    Format("VISSL", r"classy_state_dict/base_model/model/trunk/(_feature_blocks\.|base_model\._feature_blocks\.)"),
    Format("Barlow Twins or VICReg", r"model/(module\.)?backbone\."),
    Format("SimSiam", r"state_dict/module\.encoder\."),
    Format("SwAV", r"(state_dict/)?module\.", r"module\.(prototypes|projection_head)"),
    Format("PyTorch BYOL", r"online_network_state_dict/encoder\.|(state_dict/)?online_encoder\.net\."),
    Format("PyTorch SimCLR", r"(state_dict/)?backbone\.", r"backbone\.fc\."),
    Format("PyTorch SimCLR", r"(state_dict/)?(module\.)?encoder\.", r"(module\.)?projector\."),
    Format("lightly", r"state_dict/backbone\.", r"(projection|prediction)_head"),
    Format("solo-learn", r"state_dict/backbone\.", r"(projector|predictor|classifier|momentum_backbone|prototypes)\."),
    Format("SupContrast", r"model/encoder\.(module\.)?"),
    Format("Lightning", r"state_dict/(\w+\.)*", "pytorch-lightning_version"),
    Format("a state dict", r"((state_dict|model|model_state_dict)/)?(module\.)?"),
)


def format_of(place: str, names: Iterable[str]) -> int:
    """The number of the first format with an encoder in this place; len(FORMATS): none has. names: those beside it, and
    the keys at the file's top."""
    names = list(names)
    for number, known in enumerate(FORMATS):
        if re.fullmatch(known.place, place) and (not known.beside or any(re.match(known.beside, n) for n in names)):
            return number
    return len(FORMATS)


def package_of(number: int) -> str:
    return FORMATS[number].package if number < len(FORMATS) else "an unknown package"


Rules = tuple[tuple[str, str], ...]  # regular expressions, and what to put in the place of what they match


def _numbered(first: int) -> Rules:
    """A ResNet as nn.Sequential of its children, where `first` is the number of layer1: 4 with the ReLU and the
    max-pool in front of it, 3 without the one, 2 without both."""
    return ((r"^conv1\.", "0."), (r"^bn1\.", "1."), *((rf"^layer{i}\.", f"{first + i - 1}.") for i in range(1, 5)))


SHORTCUTS: Rules = ((r"\.downsample\.", ".shortcut."),)  # of lightly's own ResNets and others for CIFAR-10
OF_VIT: Rules = (  # timm's vision transformers, from torchvision's names
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)
EARLIER_VIT: Rules = ((r"\.mlp\.0\.", ".mlp.linear_1."), (r"\.mlp\.3\.", ".mlp.linear_2."))  # torchvision until 0.14


def spellings(names: Iterable[str]) -> Iterator[dict[str, str]]:
    """The names of an encoder's tensors as packages spell them, by the encoder's own names; as they are first."""
    names, found = list(names), list[dict[str, str]]()
    numbers: list[Rules] = [(), *map(_numbered, (4, 3, 2))]
    resnets = [a + b for a, b in product(numbers, ((), SHORTCUTS))]
    for rules in (*resnets, OF_VIT, EARLIER_VIT):
        spelling = {name: _spelled(name, rules) for name in names}
        if spelling not in found:
            found.append(spelling)
            yield spelling


def _spelled(name: str, rules: Rules) -> str:
    for pattern, text in rules:
        name = re.sub(pattern, text, name)
    return name
