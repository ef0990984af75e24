"""A pipeline's table: each stage beside raw pixels, the untrained encoder and chance, and of how many labels."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kilobatch.launch.pipelines.results import conclude, read_results
from tests.helpers.pipeline_results import finished_pipeline
from tests.launch.conftest import CommandResult

TABLE = """\
network               encoder          parameters       labels    k-NN  k-NN, moved  top-1  top-5  top-1, moved
pre-trained           convnet             0.144 M            –  97.5%*       92.8%*      –      –             –
fine-tuned (teacher)  convnet             0.162 M  72 of 1,437       –            –  97.2%  99.0%         93.9%
student               convnet width 8     0.037 M  72 of 1,437       –            –  98.1%  99.0%         94.2%
raw pixels                                                      98.3%*       64.2%*      –      –             –
untrained encoder     convnet                                   90.0%*       33.6%*      –      –             –
untrained encoder     convnet width 8                           80.0%*            –      –      –             –
chance                                                           10.0%        10.0%  10.0%      –         10.0%
* with the labels of all 1,437 training images, however many the network saw
raw pixels, untrained encoder: k-NN (k 5, temperature 0.07; 1,437 training images with their labels; 360 test images)
"""


@pytest.fixture
def finished(kilobatch: Callable[..., CommandResult]) -> Path:
    """A pipeline's folder as its stages would leave it."""
    return finished_pipeline("mine")


def test_the_table(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conclude(finished)
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert printed[:9] == TABLE.splitlines()[:9]
    assert " ".join(printed[9:]) == TABLE.splitlines()[9]  # in as many lines as the terminal's width makes
    row = read_results(finished)[0]
    assert row.baselines["untrained"] == {"knn/top1": 0.9, "moved/moved/trained": 0.336}


def test_results_of_an_earlier_version_have_no_baselines(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in finished.glob("*/baselines.json"):
        file.unlink()
    conclude(finished)
    rows = json.loads((finished / "pipeline.json").read_text())
    for row in rows:
        del row["baselines"], row["knn"]
    (finished / "pipeline.json").write_text(json.dumps(rows))
    assert [row.baselines for row in read_results(finished)] == [{}] * 3
    printed = capsys.readouterr().out
    assert "pre-trained" in printed and "raw pixels" not in printed
