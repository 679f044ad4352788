"""Files of prompts: what each line says, and what is wrong with it, without any model."""

import pytest

from rolling_diffusion.cli.batch import OF_LINE, name_of
from rolling_diffusion.cli.main import make_parser
from rolling_diffusion.cli.prompts import read_lines

PARSER = make_parser().strict(["batch", "p.txt", "-o", "out"]).parser


def lines(path, content: bytes) -> dict:
    path.write_bytes(content)
    return dict(read_lines(path, PARSER, OF_LINE))


def test_the_three_kinds_of_files_say_the_same(tmp_path):
    said = {1: {"prompt": "a red ball"}, 3: {"prompt": "ein Häuschen, 雪"}}
    texts = lines(tmp_path / "p.txt", "\ufeffa red ball\r\n\r\n  ein Häuschen, 雪 \n".encode())
    objects = lines(tmp_path / "p.jsonl", '{"prompt": "a red ball"}\n\n{"prompt": "ein Häuschen, 雪"}'.encode())
    table = lines(tmp_path / "p.CSV", 'seed,prompt\n,a red ball\n,"ein Häuschen, 雪"\n'.encode())
    assert texts == objects == said
    assert table == {2: said[1], 3: said[3]}


def test_a_line_says_more_than_its_prompt(tmp_path):
    said = {"prompt": "a ball", "seed": 2**64 - 1, "width": 96, "order": "spiral-out", "negative_prompt": "blue"}
    said |= {"persistence": 0.5, "lookahead": "all", "lag": 0}
    row = '{"prompt": "a ball", "seed": 18446744073709551615, "width": 96, "order": "spiral-out", "cfg": null, '
    row += '"negative-prompt": "blue", "persistence": 0.5, "lookahead": "all", "lag": 0}'
    assert lines(tmp_path / "p.jsonl", row.encode()) == {1: said}
    table = "prompt,seed,width,order,negative_prompt,persistence,lookahead,lag,cfg\n"
    table += "a ball,18446744073709551615,96,spiral-out,blue,0.5,all,0,\n"
    assert lines(tmp_path / "p.csv", table.encode()) == {2: said}


def test_a_row_of_several_lines_is_named_by_its_first(tmp_path):
    found = lines(tmp_path / "p.csv", b'prompt,seed\n"a ball\nabove a boat",1\na house,x\n')
    assert found[2] == {"prompt": "a ball\nabove a boat", "seed": 1}
    assert str(found[4]).startswith("its seed must be a whole number")


@pytest.mark.parametrize(
    "line, words",
    [
        ("nonsense", "it is not valid JSON"),
        ("[" * 100_000, "it is not valid JSON"),
        ("[1]", "it must be an object"),
        ('"a red ball"', 'it must be an object, such as {"prompt": "a red ball"}'),
        ("{}", "it has no prompt"),
        ('{"prompt": ""}', "it has no prompt"),
        ('{"prompt": 7}', "its prompt is 7, and must be a text"),
        ('{"prompt": ["a"]}', "its prompt is"),
        ('{"prompt": "a", "sed": 7}', "it knows no 'sed' (did you mean 'seed'?)"),
        ('{"prompt": "a", "seed": -1}', "its seed must be a whole number from 0"),
        ('{"prompt": "a", "seed": true}', "its seed is true, and must be"),
        ('{"prompt": "a", "seed": 1.5}', "its seed must be a whole number"),
        ('{"prompt": "a", "order": "top"}', "its order knows no 'top'"),
        ('{"prompt": "a", "model": "other"}', "model is for all pictures: say it as --model"),
        ('{"prompt": "a", "output": "/etc/passwd"}', "output is for all pictures"),
    ],
    ids=range(15),
)
def test_what_is_wrong_with_a_line_is_one_sentence_and_the_next_is_read(tmp_path, line, words):
    found = lines(tmp_path / "p.jsonl", f'{line}\n{{"prompt": "a ball"}}\n'.encode())
    assert words in str(found[1]) and found[2] == {"prompt": "a ball"}


def test_rows_that_are_none_are_named(tmp_path):
    found = lines(tmp_path / "p.csv", b"prompt,seed\na ball,1,2\n,\na house,2\n")
    assert str(found[2]) == "it has 3 cells, and there are 2 columns" and found[4]["seed"] == 2 and len(found) == 2


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("p.doc", b"", r"p\.doc must end in \.jsonl, \.csv or \.txt"),
        ("p.csv", b"seed\n1\n", "must name its columns in the first line, and one of them prompt"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, name, content, words):
    with pytest.raises(ValueError, match=words):
        lines(tmp_path / name, content)


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*: No such file"):
        list(read_lines(tmp_path / "no.txt", PARSER, OF_LINE))


def test_a_name_is_of_what_makes_the_picture_and_of_nothing_else(tmp_path):
    said = {"prompt": "a ball", "seed": 1}
    same = [said | {"device": "cpu"}, said | {"order": "top-to-bottom"}, said | {"cpu_offload": "model"}]
    other = [{"prompt": "a ball"}, said | {"prompt": "a boat"}, said | {"order": "raster"}, said | {"dtype": "float16"}]
    assert {name_of(one, "model") for one in same} == {name_of(said, "model")}
    assert len({name_of(one, "model") for one in [said, *other]} | {name_of(said, "another")}) == 6
    assert name_of({"prompt": "a ball"}, "model") == name_of({"prompt": "a ball", "seed": 0}, "model")
    start = tmp_path / "start.png"
    start.write_bytes(b"one")
    (tmp_path / "copy.png").write_bytes(b"one")
    (tmp_path / "two.png").write_bytes(b"two")
    names = [name_of(said | {"image": str(tmp_path / f"{n}.png")}, "model") for n in ("start", "copy", "two")]
    assert names[0] == names[1] != names[2]
