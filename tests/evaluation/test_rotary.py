"""Which RoPE base for a longer context: losses under other bases, and what the command refuses."""

import json

import numpy
import pytest
import torch
from convert_models import S2, tokens
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM
from vllm_cases import make_folder

from s2megatron import cli, hf
from s2megatron.data import write_dataset
from s2megatron.errors import ConfigError
from s2megatron.evaluation import rotary
from s2megatron.evaluation.network import Network

LENGTH = 256


@pytest.fixture
def folder(tmp_path):
    """A model of 64 positions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3, rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    texts = ["".join(map(chr, numpy.random.default_rng(1).integers(97, 123, 3000)))]
    write_dataset(texts, str(tmp_path / "text"))
    return tmp_path


def command(folder, *more) -> int:
    given = ["choose-rotary-base", str(folder / "hf"), "--data", str(folder / "text")]
    return cli.main([*given, "--out", str(folder / "bases.json"), "--length", str(LENGTH), *more])


def loss_by_loading(folder, base: float, length: int = LENGTH) -> float:
    """Of the first window, by transformers alone, with the base in its config."""
    config = AutoConfig.from_pretrained(folder / "hf")
    config.rope_parameters = {**config.rope_parameters, "rope_theta": float(base)}
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", config=config).eval()
    ids = torch.tensor(list((folder / "text.bin").read_bytes()[: 2 * length : 2]))[None]
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].double()
    nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    return nats[LENGTH // rotary.SKIPPED :].mean().item()


def test_the_command_takes_the_base_with_the_smallest_loss(folder, capsys):
    assert command(folder, "--windows", "1") == 0
    found = json.loads((folder / "bases.json").read_text())
    assert list(found["bases"]) == ["1000", "2000", "4000", "8000", "16000"]
    losses = {base: row["from"] for base, row in found["bases"].items()}
    for base, loss in losses.items():
        assert loss == pytest.approx(loss_by_loading(folder, float(base)), abs=1e-5)
    assert len({round(loss, 5) for loss in losses.values()}) == 5  # a base makes a difference
    assert losses[str(found["best"])] == min(losses.values())
    assert list(found["bases"]["1000"]["by position"]) == [
        "2 to 32", "32 to 64", "64 to 128", "128 to 256",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert f"rotary_base: {found['best']}" in said
    assert ("try larger ones" in said) == (found["best"] == 16000)


def test_bases_of_ones_own_and_how_sure_the_difference_is(folder):
    assert command(folder, "--bases", "3e3,500", "--windows", "3") == 0
    found = json.loads((folder / "bases.json").read_text())
    other = ({3000, 500} - {found["best"]}).pop()
    best, worse = (found["bases"][str(base)] for base in (found["best"], other))
    lost = numpy.subtract(worse["windows"], best["windows"])
    assert best["above best"]["value"] == 0 and len(lost) == 3
    assert worse["above best"]["value"] == pytest.approx(lost.mean())
    assert worse["above best"]["error"] == pytest.approx(lost.std(ddof=1) / 3**0.5)


@pytest.mark.parametrize("windows, told", [("1", True), ("2", False)])
def test_one_window_tells_no_bases_apart(folder, capsys, windows, told):
    assert command(folder, "--bases", "3e3,500", "--windows", windows) == 0
    assert ("one window: nothing says" in capsys.readouterr().out) is told


@pytest.mark.parametrize(
    "value, error, close", [(0.3, 0.2, [8000]), (0.5, 0.2, []), (0.3, None, [])]
)
def test_bases_that_are_not_apart_are_told(value, error, close):
    best = {"value": 0.0, "error": 0.0}
    other = {"value": value, "error": error}
    found = {"best": 4000, "bases": {4000: {"above best": best}, 8000: {"above best": other}}}
    assert rotary.not_apart(found) == close


def test_an_s2_model_keeps_its_attention(tmp_path):
    make_folder("llama", tmp_path / "hf", S2)
    model = hf.load(tmp_path / "hf").eval()
    ids = tokens()[:1]
    own = Network.of(model).token_losses(ids)
    rotary.use_base(model, 50.0)
    other = Network.of(model).token_losses(ids)
    rotary.use_base(model, rotary.base_of(AutoConfig.from_pretrained(tmp_path / "hf"), "hf"))
    assert model.config._attn_implementation == "s2"
    assert torch.equal(Network.of(model).token_losses(ids), own) and not torch.equal(own, other)


def test_a_model_whose_base_changes_nothing_is_refused(folder):
    """All bases would have one loss, and the first would be the best."""
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    model.model.rotary_emb = torch.nn.Identity()
    with pytest.raises(ConfigError, match="a llama has no rotary embedding"):
        rotary.use_base(model, 2000.0)


def test_the_ladder_and_the_bins():
    assert rotary.ladder(500_000, 32768, 131072) == [500_000 << i for i in range(5)]
    assert rotary.ladder(10_000, 8192, 12_000) == [10_000 << i for i in range(4)]
    bins = [1024, 16384, 32768, 65536, 131072]
    assert rotary.position_bins(32768, 131072) == bins


@pytest.mark.parametrize("more, told", [
    (["--length", "64"], "the model has 64 positions, which its base of 1,000 is for"),
    (["--trained-length", "512"], "512 positions"),
    (["--bases", "1e6,large"], "--bases 1e6,large: must be numbers"),
    (["--bases", "0"], "must be at least 2"),
    (["--windows", "0"], "--windows 0: must be at least 1"),
    (["--length", "100000"], "tokens do not fill a window of 99999 + 1; choose a shorter length"),
    (["--out", "/dev/null/bases.json"], "--out /dev/null/bases.json: cannot be made"),
    (["--attention", "s2"], "has no 's2' key"),
], ids=str)  # fmt: skip
def test_bad_input(folder, capsys, more, told):
    assert command(folder, *more) == 2
    assert told in capsys.readouterr().err
    assert not (folder / "bases.json").exists()


def test_other_kinds_of_positions_are_refused_by_name(folder, capsys):
    config = json.loads((folder / "hf/config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
    (folder / "hf/config.json").write_text(json.dumps(config))
    assert command(folder) == 2
    assert "rope_type 'linear'" in capsys.readouterr().err
    GPT2Config().save_pretrained(folder / "hf")
    assert command(folder) == 2
    assert "config.json of a gpt2 has no single rope_theta" in capsys.readouterr().err


def test_too_little_gpu_memory_is_told_with_the_way_out(folder, capsys, monkeypatch):
    def choose(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 25.00 GiB. GPU 0 has a total capacity of 79 GiB"
        )

    monkeypatch.setattr(rotary, "choose", choose)
    assert command(folder) == 1
    told = capsys.readouterr().err
    assert "Tried to allocate 25.00 GiB: choose less of --length, --device cpu" in told
    monkeypatch.setattr(rotary, "choose", lambda *_: {}["no"])
    with pytest.raises(KeyError):
        command(folder)
