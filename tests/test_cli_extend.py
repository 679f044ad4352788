"""`rolling-diffusion extend`: a picture carried on, its own pixels untouched."""

import numpy as np
import pytest
from PIL import Image

from rolling_diffusion.cli import main
from rolling_diffusion.cli.files import read_record

TINY = ("--steps", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("own.png")
    return tmp_path


def pixels(file) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def test_every_side_is_carried_on_and_the_picture_stays(here, capsys):
    sides = ("--left", "5", "--right", "16", "--top", "20", "--bottom", "1")
    assert main(["extend", "own.png", *sides, "a red ball", *TINY]) == 0
    assert capsys.readouterr().out.split() == ["own-extended.png"]
    wider = pixels("own-extended.png")
    assert wider.shape == (40 + 20 + 1, 50 + 5 + 16, 3)
    assert np.array_equal(wider[20:60, 5:55], pixels("own.png"))
    assert wider[:20].std() > 0 and wider[:, :5].std() > 0
    record = read_record(here / "own-extended.png")
    assert record["said"] == {
        **{"prompt": "a red ball", "picture": "own.png", "left": 5, "right": 16, "top": 20, "bottom": 1},
        **{"steps": 2, "seed": 0},
    }
    assert main(["extend", "own.png", "--right", "16", "a red ball", *TINY]) == 0
    assert capsys.readouterr().out.split() == ["own-extended-2.png"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["own.png"], ["PROMPT"]),
        (["own.png", "a ball"], ["a side is needed", "--right 256"]),
        (["own.png", " ", "--left", "9"], ["the prompt is empty"]),
        (["no.png", "a ball", "--left", "9"], ["PICTURE no.png: there is no such file"]),
        ([__file__, "a ball", "--left", "9"], ["is not a picture that can be read"]),
        (["small.png", "a ball", "--left", "9"], ["8 × 64 pixels", "16 at least"]),
        (["own.png", "a ball", "--left", "0"], ["--left", "at least 1"]),
        (["own.png", "a ball", "--left", "99999999999"], ["GiB of memory", "extend it by less"]),
        (["own.png", "a ball", "--left", "9", "-o", "x.tif"], ["x.tif must end in .png"]),
        (["own.png", "a ball", "--left", "9", "--order", "raster"], ["no option --order"]),
        (["own.png", "a ball", "--left", "9", "--window", "1"], ["window is 1 cells"]),
    ],
)
def test_bad_input_is_one_sentence(here, capsys, argv, words):
    Image.new("RGB", (8, 64)).save("small.png")
    before = sorted(file.name for file in here.iterdir())
    assert main(["extend", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert sorted(file.name for file in here.iterdir()) == before
