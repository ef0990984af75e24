"""Pictures of any test images, whatever their classes are called, in installed fonts that have the letters."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager, style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from kilobatch.data.sources.path_names import without_wnid
from kilobatch.trainer.evaluate import fonts, picture
from kilobatch.trainer.evaluate.fonts import Typeface, typeface_for
from kilobatch.trainer.evaluate.image_sample import ImageSample
from kilobatch.trainer.ranks import phase

HAN, THAI = "\u4e2d\u6587", "\u0e44\u0e17\u0e22"
NAMES = ["$_$", "_x", "a\nb\tc", "\\frac{a", "${x}^_", "n" * 300, "", "%s", "#", "[red]", HAN, "\udce9", "\u200f", "{"]


def sample(count: int, classes: int = 2, different: int | None = None, width: int = 16) -> ImageSample:
    """different: of how many rows the features differ."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, width, generator=generator)
    if different is not None:
        x = x[torch.arange(count) % different]
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator).to(torch.uint8)
    return ImageSample(x, torch.arange(count) % classes, images)


def font(path: Path, letters: str, *, shape: bool = True) -> None:
    """Writes a font in which each letter is a square, or nothing."""
    pen = TTGlyphPen(None)
    if shape:
        pen.moveTo((0, 0))
        for corner in ((0, 700), (700, 700), (700, 0)):
            pen.lineTo(corner)
        pen.closePath()
    glyphs = [".notdef", *(f"u{ord(letter):04X}" for letter in letters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({ord(letter): f"u{ord(letter):04X}" for letter in letters})
    builder.setupGlyf(dict.fromkeys(glyphs, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the only installed fonts, beside matplotlib's own."""
    monkeypatch.setattr(font_manager, "X11FontDirectories", [str(tmp_path / "fonts")])
    monkeypatch.setattr(font_manager, "_get_fontconfig_fonts", list)
    own = [entry for entry in font_manager.fontManager.ttflist if "mpl-data" in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    fonts._warn_of_missing.cache_clear()
    fonts._family_of.cache_clear()
    return tmp_path / "fonts"


@pytest.mark.parametrize(
    ("count", "different", "how"),
    [
        (1, 1, "principal components (all features are the same)"),
        (2, 2, "principal components (only 2 different features)"),
        (3, 3, "principal components (only 3 different features)"),
        (60, 1, "principal components (all features are the same)"),
        (60, 3, "principal components (only 3 different features)"),
        (4, 4, "t-SNE"),
        (60, 4, "t-SNE"),
        (60, 60, "t-SNE"),
    ],
)
def test_few_and_equal_images_have_places(count: int, different: int, how: str):
    points = torch.nn.functional.normalize(sample(count, different=different).x, dim=1).double().numpy()
    places, words = picture._flatten(points)
    assert places.shape == (count, 2)
    assert np.isfinite(places).all()
    assert how in words
    if "principal" in words:  # distances are kept in the plane of up to three points
        for i in range(count):
            assert np.linalg.norm(places[i] - places[0]) == pytest.approx(np.linalg.norm(points[i] - points[0]))


def test_nearly_equal_and_infinite_features_have_places():
    x = sample(50, different=1).x
    for scale in (1e-7, 1e-5):
        places, _ = picture._flatten((x + scale * sample(50).x).double().numpy())
        assert np.isfinite(places).all()
    x[3] = torch.nan
    places, words = picture._flatten(x.double().numpy())
    assert (places == 0).all() and "infinite" in words


def test_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """By what t-SNE prints, of which nothing else is seen."""
    monkeypatch.setattr(phase, "FIRST", 0.0)
    with phase.shown_with(print, every=0.0):
        picture._flatten(sample(50).x.double().numpy())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3
    for number, line in enumerate(lines, 1):
        assert re.fullmatch(rf"picture: iterations of t-SNE: {50 * number:,} of 1,000, \d:\d\d:\d\d to go", line)


def test_any_names_are_drawn(tmp_path: Path, installed: Path):
    for bank, queries in ((sample(40, 14), sample(40, 14)), (sample(1, 1), sample(1, 1))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            picture.draw(bank, queries, NAMES, "run $_$", tmp_path / "p.png")
        assert Image.open(tmp_path / "p.png").size == (1650, 880)


def test_mathematics_is_not_read_whatever_the_users_settings(tmp_path: Path, installed: Path):
    with style.context({"text.usetex": True}):
        picture.draw(sample(8), sample(8), ["$_$", "$\\alpha$"], "$x$", tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").size == (1650, 880)


def test_the_legend_has_all_names_inside_the_picture(installed: Path):
    names = ["_x", "$_$", "W" * 200, HAN * 30, "", "x\ny"]
    typeface = typeface_for(names)
    with style.context(["default", {**typeface.settings()}]):
        figure = Figure(figsize=(15, 8))
        canvas = FigureCanvasAgg(figure)
        right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.12, 1))[0, 1]
        picture._draw_embedding(right, sample(30, 6), names, typeface)
        canvas.draw()
        legend = right.axes[0].get_legend()
        assert legend is not None
        texts = [text.get_text() for text in legend.get_texts()]
        assert texts == ["_x", "$_$", "W" * 8 + "…" + "W" * 7, "U+4E2D U…U+6587", "''", "x\\ny"]
        assert all(text.get_window_extent().x1 <= figure.bbox.x1 for text in legend.get_texts())


def test_an_installed_font_with_the_letters_is_used(installed: Path, capsys: pytest.CaptureFixture[str]):
    font(installed / "LastResortHE.ttf", HAN + THAI)  # has a box for every letter there is
    font(installed / "Blank.ttf", HAN + THAI, shape=False)
    font(installed / "Some.ttf", HAN[:1])
    font(installed / "All.ttf", HAN)
    (installed / "Damaged.ttf").write_bytes(b"\0\1\0\0 and no more")
    found = typeface_for([HAN, "plain"])
    assert found.families == ("DejaVu Sans", f"kilobatch {installed / 'All.ttf'}")
    assert (found.absent, found.text(HAN, 12)) == (frozenset(), HAN)
    assert capsys.readouterr().err == ""
    inks: list[int] = []
    for text in ("", HAN):
        with style.context(["default", {**found.settings()}]), warnings.catch_warnings():
            warnings.simplefilter("error")  # matplotlib warns of a letter without a shape
            figure = Figure(figsize=(1, 1), dpi=100)
            figure.text(0.1, 0.4, text, fontsize=20, fontweight="bold")
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
        inks.append(int((np.asarray(canvas.buffer_rgba())[..., 0] < 128).sum()))
    side = 0.7 * 20 * 100 / 72  # pixels of each of the two squares
    assert inks[0] == 0
    assert inks[1] == pytest.approx(2 * side**2, rel=0.15)


def test_letters_that_no_font_has_are_code_points_and_said_once(installed: Path, capsys: pytest.CaptureFixture[str]):
    font(installed / "Some.ttf", HAN[:1])
    found = typeface_for([HAN, THAI, "\udce9\x07"])
    assert typeface_for([HAN, THAI]) == found
    assert found.text(HAN, 12) == f"{HAN[0]}U+6587"
    assert found.text(THAI, 30) == "U+0E44 U+0E17 U+0E22"
    assert found.text("\udce9\x07", 20) == "\\udce9\\u0007"
    (line,) = capsys.readouterr().err.splitlines()
    assert "no installed font has \u0e17 (U+0E17)" in line and "\u6587 (U+6587)" in line
    assert "install Noto Sans CJK (Debian: fonts-noto-cjk), Noto Sans Thai (Debian: fonts-noto-core)" in line


def test_what_only_changes_its_neighbours_is_left_out_where_no_font_has_it(
    installed: Path, capsys: pytest.CaptureFixture[str]
):
    red_heart, tag, joined = "\u2764\ufe0f", "a\U000e0067b", "x\U000e0100y"
    found = typeface_for([red_heart, tag, joined])
    assert [found.text(name, 12) for name in (red_heart, tag, joined)] == ["\u2764", "ab", "xy"]
    assert found.text("\ufe0f", 12) == "''"
    assert capsys.readouterr().err == ""  # there is no font to install for them


def test_names_are_cut_to_columns():
    typeface = Typeface(("DejaVu Sans",), frozenset())
    assert typeface.text("twelve chars", 12) == "twelve chars"
    assert typeface.text("thirteen char", 12) == "thirte…char"
    assert typeface.text("great white shark", 12) == "great…shark"
    assert typeface.text(HAN * 5, 12) == HAN + HAN[0] + "…" + HAN  # each takes two columns
    assert typeface.text("ninety e\u0301\u0301\u0301\u0301\u0301\u0301\u0301abcde", 10) == "ninet…bcde"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("n01440764 tench", "tench"),
        ("n01440764_great_white", "great_white"),
        ("n01440764", "n01440764"),
        ("n01440764 ", "n01440764 "),
        ("n014 tench", "n014 tench"),
    ],
)
def test_wordnet_numbers_are_not_shown(name: str, shown: str):
    assert without_wnid(name) == shown
    with style.context("default"):
        figure = Figure()
        names = [name, "plain"]
        picture._draw_embedding(figure.subfigures(1, 2, squeeze=False)[0, 1], sample(30, 2), names, typeface_for(names))
        legend = figure.subfigs[1].axes[0].get_legend()
        assert legend is not None and legend.get_texts()[0].get_text() == shown.strip()
