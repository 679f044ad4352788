"""What is not installed is named."""

import importlib.util
import json

import pytest
from tiny_pipeline import pipeline
from tokenizers import Tokenizer
from tokenizers.models import Unigram

from rolling_diffusion.loading import load


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed here")
def test_a_tokenizer_without_its_json_names_the_packages_that_read_it(tmp_path):
    pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["tokenizer_2"] = ["transformers", "T5TokenizerFast"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    folder = tmp_path / "tokenizer_2"
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "T5Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "spiece.model").write_bytes(b"pieces")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0)]
    Tokenizer(Unigram(pieces, unk_id=2)).save(str(folder / "tokenizer.json"))
    assert type(load(tmp_path).tokenizer_2).__name__.startswith("T5Tokenizer")  # none are needed, with the file
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"without a tokenizer\.json.*: pip install sentencepiece protobuf$"):
        load(tmp_path)
