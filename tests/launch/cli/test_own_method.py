"""`kilobatch new method` and `kilobatch verify FILE.py:NAME`: the start passes, what depends on ranks does not, and
what cannot be built is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

GATHERED = "every = collectives.gather(second)"
# Other ranks' rows get no gradient, as in many a SimCLR: in one process nothing is wrong with it.
OTHERS_DETACHED = (
    "every = collectives.gather(second.detach())"
    ".index_copy(0, collectives.local_rows(len(first), first.device), second)"
)


def test_what_verify_and_new_refuse(kilobatch: Callable, tmp_path: Path) -> None:
    assert kilobatch("new", "method", "mine").code == 0
    assert "mine.py exists; choose another name, or replace it with --force" in kilobatch("new", "method", "mine").err
    assert "'My-Method' is no name of" in kilobatch("new", "method", "My-Method").err
    assert "defines no class (a method) and no function (an encoder) 'Nope'" in kilobatch("verify", "mine.py:Nope").err
    assert "which timm does not have; did you mean 'timm/test_vit'?" in kilobatch("verify", "timm/test_vitt").err
    text = (tmp_path / "mine.py").read_text()
    (tmp_path / "open.py").write_text(text.replace("Field(gt=0)] = 0.2", "Field(gt=0)]"))
    assert "its option temperature has none; give it one" in kilobatch("verify", "open.py:Mine").err
    (tmp_path / "fields.py").write_text(
        text.replace("    # The options of", '    needs = frozenset({"tokens"})\n    #')
    )
    assert "needs tokens beside images, which verify does not make" in kilobatch("verify", "fields.py:Mine").err


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_start_passes_and_one_that_sees_its_rank_alone_does_not(kilobatch: Callable, tmp_path: Path) -> None:
    kilobatch("new", "method", "mine")
    passed = kilobatch("verify", "mine.py:Mine")
    assert passed.code == 0 and "That its equation is the paper's is not shown by this" in passed.out
    text = (tmp_path / "mine.py").read_text()
    assert GATHERED in text
    (tmp_path / "wrong.py").write_text(text.replace(GATHERED, OTHERS_DETACHED))
    failed = kilobatch("verify", "wrong.py:Mine")
    assert failed.code == 1 and "differs: wrong" in failed.out
