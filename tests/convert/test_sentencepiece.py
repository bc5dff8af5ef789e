"""The tokenizer.json of a SentencePiece model makes the tokens that the dataset was made of."""

from types import SimpleNamespace

import pytest
import sentencepiece
import transformers

from s2megatron.convert import to_hf
from s2megatron.convert.sentencepiece_files import write_sentencepiece_tokenizer
from s2megatron.convert.tokenizer import run_tokenizer
from s2megatron.data.tokenizers import make_tokenizer
from s2megatron.errors import ConfigError

TEXTS = [
    "the quick brown fox jumps\n  over def f(x):\n\treturn x  the dogs",
    "  leading and trailing  ", "\n\n", " ", "é日本 ﬁ ½ ＡＢＣ", "cats" * 50, "x = 17 ** y[3]",
]  # fmt: skip
CASES = {
    "unigram": dict(model_type="unigram"),
    "unigram-bytes": dict(model_type="unigram", byte_fallback=True),
    "bpe": dict(model_type="bpe"),
    "bpe-bytes-no-prefix": dict(model_type="bpe", byte_fallback=True, add_dummy_prefix=False),
    "bpe-all-blanks": dict(model_type="bpe", remove_extra_whitespaces=False),
    "bpe-as-it-stands": dict(model_type="bpe", normalization_rule_name="identity"),
    "bpe-with-padding": dict(model_type="bpe", pad_id=3),
}


def train(folder, **options):
    text = folder / "text.txt"
    line = "the quick brown fox {0} jumps over def f(x): return x * {0} the lazy dogs and cats"
    text.write_text("\n".join(line.format(i) for i in range(300)))
    sizes = dict(vocab_size=400 if options.get("byte_fallback") else 120, hard_vocab_limit=False)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "sp"), minloglevel=2, **sizes, **options
    )
    return folder / "sp.model"


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_the_dataset(tmp_path, name):
    model = train(tmp_path, **CASES[name])
    encode, end, size = make_tokenizer(f"sentencepiece:{model}")
    write_sentencepiece_tokenizer(model, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tokenizer(text).input_ids == list(encode(text)), text
    assert (tokenizer.eos_token_id, len(tokenizer)) == (end, size)
    assert (tokenizer.pad_token_id == 3) == (name == "bpe-with-padding")
    words = list(encode("the quick brown fox"))
    assert tokenizer.decode(words) == "the quick brown fox"
    default = make_tokenizer(f"huggingface:{tmp_path}")[0]  # what evaluate takes
    assert [list(default(text)) for text in TEXTS] == [list(encode(text)) for text in TEXTS]


def companions(model, folder) -> tuple[set[str], list[str]]:
    """What convert writes beside the weights of a run with this model, and what it says."""
    folder.mkdir()
    transformers.LlamaConfig(num_hidden_layers=1).save_pretrained(folder)
    args = SimpleNamespace(tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=str(model))
    notes = []
    to_hf._write_companions(SimpleNamespace(args=args), run_tokenizer(args), None, folder, notes)
    return {file.name for file in folder.iterdir() if file.name.startswith("token")}, notes


def test_a_converted_run_has_its_tokenizer(tmp_path):
    files, notes = companions(train(tmp_path, model_type="bpe"), tmp_path / "hf")
    assert files == {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"} and not notes


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(model_type="bpe", user_defined_symbols=["<tool>"]), "make other tokens of"),
        (dict(model_type="char"), "has no tokenizer.json"),
    ],
)
def test_what_cannot_be_written_out_is_left_out_and_told(tmp_path, options, reason):
    """A tokenizer.model alone would be taken by transformers, and give other tokens."""
    model = train(tmp_path, **options)
    files, notes = companions(model, tmp_path / "hf")
    assert files == set() and len(notes) == 1
    assert reason in notes[0] and str(model) in notes[0] and "--like" in notes[0]
    with pytest.raises(ConfigError, match=reason):
        write_sentencepiece_tokenizer(model, tmp_path)
