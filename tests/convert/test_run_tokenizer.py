"""The tokenizer of a run, in the folder of each architecture: the same tokens, or a word about it.

transformers 5 reads the files of some models with the class of their model_type.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import transformers
from tokenizers import ByteLevelBPETokenizer

from s2megatron.convert import to_hf
from s2megatron.convert.tokenizer import PROBES, run_tokenizer
from s2megatron.data.tokenizers import BYTE_VOCAB, load_hugging_face, make_tokenizer, train_bpe

LINES = [f"the fox {i} jumps over def f(x): return x * {i}\n\n  don't" for i in range(300)]
SIZES = dict(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, num_key_value_heads=2)
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Megatron's arguments of runs, by the kind of their tokenizer."""
    place = tmp_path_factory.mktemp("tokenizers")
    train_bpe(LINES, 400, place / "own")
    (place / "bare").mkdir()
    shutil.copy(place / "own/tokenizer.json", place / "bare")
    (place / "gpt2").mkdir()
    gpt2 = ByteLevelBPETokenizer()
    gpt2.train_from_iterator(LINES, 400, special_tokens=["<|endoftext|>"], show_progress=False)
    gpt2.save_model(str(place / "gpt2"))  # no tokenizer.json, and the class is config.json's
    (place / "gpt2/config.json").write_text(json.dumps({"model_type": "gpt2"}))
    runs = {
        name: SimpleNamespace(
            tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(place / name)
        )
        for name in ("own", "bare", "gpt2")
    }
    runs["bytes"] = SimpleNamespace(
        tokenizer_type="NullTokenizer",
        tokenizer_model=None,
        vocab_size=BYTE_VOCAB,
        s2_tokenizer="bytes",
    )
    return runs


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("name", ["own", "bare", "gpt2", "bytes"])
def test_tokens_are_those_of_the_run(runs, tmp_path, name, architecture):
    CONFIGS[architecture](**SIZES).save_pretrained(tmp_path)
    run, notes = runs[name], []
    tokenizer = run_tokenizer(run)
    to_hf._write_companions(SimpleNamespace(args=run), tokenizer, None, tmp_path, notes)
    expected = [list(tokenizer.encode(text)) for text in PROBES]
    read = load_hugging_face(tmp_path)  # what generate takes, and evaluate
    assert [read(text, add_special_tokens=False).input_ids for text in PROBES] == expected
    if name != "bare":  # it names no end of a text
        encode = make_tokenizer(f"huggingface:{tmp_path}")[0]
        assert [list(encode(text)) for text in PROBES] == expected
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    same = [auto(text, add_special_tokens=False).input_ids for text in PROBES] == expected
    assert same == (not notes), notes
    if not same:
        assert architecture == "qwen2" and "reads it as Qwen2Tokenizer" in notes[0]
