"""Parts of a recipe that do not fit each other are refused."""

import pytest

from kilobatch.data.errors import UserError
from kilobatch.launch.recipes.checks import check
from kilobatch.launch.recipes.recipe import read_recipe

ADVERSARIAL = "engine.adversarial.epsilon=0.03"


def test_adversarial_views_are_for_methods_of_pairs():
    recipe, settings = read_recipe("moco_v3_cifar10", [ADVERSARIAL])
    with pytest.raises(UserError) as refused:
        check(recipe, 1, settings, images=50_000)
    for part in (f"override '{ADVERSARIAL}'", "method moco_v3 ", "these do: simclr)", "use engine.adversarial=null"):
        assert part in str(refused.value)
    recipe, settings = read_recipe("simclr_cifar10", [ADVERSARIAL])
    check(recipe, 1, settings, images=50_000)


def test_a_compiled_network_is_not_computed_again_by_blocks():
    recipe, settings = read_recipe("simclr_cifar10", ["encoder.checkpoint=true", "engine.compile=true"])
    with pytest.raises(UserError, match="override 'encoder.checkpoint=true': .*use engine.compile=false"):
        check(recipe, 1, settings, images=50_000)


def test_blocks_are_computed_again_where_there_are_blocks():
    with pytest.raises(UserError, match="checkpoint true for convnet: it has no blocks"):
        read_recipe("demo", ["encoder.name=convnet", "encoder.checkpoint=true"])
