"""`hf.load` by a name of the hub: the sparsity is of the files that the weights come from."""

import json
import shutil

import pytest
import transformers
from convert_models import S2
from vllm_cases import change_config, make_folder

import s2megatron.hf as s2hf
from s2megatron.errors import ConfigError
from s2megatron.serving import loading
from s2megatron.serving.model import model_patterns, recorded_patterns

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder("llama", tmp_path_factory.mktemp("llama"), S2)


@pytest.fixture
def hub(folder, tmp_path):
    """A cache of the hub: `main` of org/model is dense, `old` has the key, `inner` in a folder."""
    repository = tmp_path / "hub" / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    for number, name in enumerate(("main", "old", "inner"), start=1):
        commit = str(number) * 40
        (repository / "refs" / name).write_text(commit)
        snapshot = repository / "snapshots" / commit
        shutil.copytree(folder, snapshot / "deep" if name == "inner" else snapshot)
        if name == "main":
            fields = json.loads((snapshot / "config.json").read_text())
            del fields["s2"]
            dense = {"architectures": ["LlamaForCausalLM"]}
            (snapshot / "config.json").write_text(json.dumps(fields | dense))
    return dict(cache_dir=tmp_path / "hub", local_files_only=True)


@pytest.mark.parametrize("which", [dict(revision="old"), dict(revision="inner", subfolder="deep")],
                         ids=lambda x: x["revision"])  # fmt: skip
def test_the_sparsity_is_of_the_revision_that_is_asked_for(hub, folder, which):
    loaded = s2hf.load("org/model", **which, **hub)
    assert loaded.config._attn_implementation == "s2"
    assert model_patterns(loaded) == recorded_patterns(
        transformers.AutoConfig.from_pretrained(folder)
    )
    assert s2hf.load("org/model", **hub).config._attn_implementation != "s2"


def test_each_revision_has_patterns_of_its_own(hub):
    main = hub["cache_dir"] / "models--org--model" / "snapshots" / ("1" * 40)
    old = main.parent / ("2" * 40)
    fields = json.loads((old / "config.json").read_text())["s2"]
    change_config(main, s2=fields)
    for group in fields["groups"]:
        for rule in group["rules"]:
            rule.update(bands=[[1, 1]], shift=0)
    change_config(old, s2=fields)
    of_main, of_old = (
        model_patterns(s2hf.load("org/model", revision=name, **hub)) for name in ("main", "old")
    )
    assert {str(rule) for pattern in of_old for rule in pattern.rules} == {"1/1 to 1"}
    assert of_main != of_old


def test_all_that_says_which_files_goes_to_the_configuration_too(hub, monkeypatch):
    asked, stock = [], transformers.AutoConfig.from_pretrained

    class Noting(transformers.AutoConfig):
        @classmethod
        def from_pretrained(cls, name, **options):
            asked.append(options)
            return stock(name, **options)

    monkeypatch.setattr(loading, "AutoConfig", Noting)
    given = dict(token=False, proxies=None, force_download=False, trust_remote_code=False)
    s2hf.load("org/model", revision="old", use_safetensors=True, **given, **hub)
    assert asked == [dict(revision="old", **given, **hub)]


def test_code_beside_a_model_that_transformers_does_not_know(tmp_path, monkeypatch):
    """A dense model of a folder is loaded as transformers would: its code if it may be run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    folder = make_folder("llama", tmp_path / "own", S2)
    fields = json.loads((folder / "config.json").read_text())
    del fields["s2"]
    autos = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    fields |= dict(model_type="own_llama", auto_map=autos, architectures=["OwnModel"])
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    loaded = s2hf.load(folder, trust_remote_code=True)
    assert type(loaded).__name__ == "OwnModel"
    with pytest.raises(ConfigError, match="contains custom code"):
        s2hf.load(folder)


def test_a_configuration_is_no_path(folder):
    """transformers leaves a path out and reads the folder's own, dense and without a word."""
    with pytest.raises(ConfigError, match=r"config=.*give transformers\.AutoConfig"):
        s2hf.load(folder, config=str(folder))


@pytest.mark.parametrize("name", ["S2LlamaForCausalLM", "LlamaForCausalLM"])
def test_a_record_that_was_lost_is_missed(folder, tmp_path, name):
    """As when a tool rewrote config.json: the class's name alone says what it was trained with."""
    lost = tmp_path / "lost"
    shutil.copytree(folder, lost)
    fields = json.loads((lost / "config.json").read_text())
    del fields["s2"]
    (lost / "config.json").write_text(json.dumps(fields | {"architectures": [name]}))
    if name.startswith("S2"):
        with pytest.raises(ConfigError, match=r"S2LlamaForCausalLM and no 's2' key.*convert"):
            s2hf.load(lost)
        assert s2hf.load(lost, attn_implementation="sdpa").config._attn_implementation == "sdpa"
    else:
        assert s2hf.load(lost).config._attn_implementation != "s2"
