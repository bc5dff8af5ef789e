"""A model of a converted checkpoint, with the attention it was trained with, or the reason why not.

transformers starts a tensor that no file holds from random numbers and goes on, with a line among
others in its log. Here such a folder is refused, and so is a sparsity that is not the model's,
before weights are read.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from s2_kernels.record import ARCHITECTURE_PREFIX
from s2megatron.convert.hf_config import read_config
from s2megatron.errors import ConfigError
from s2megatron.serving.model import NAME, recorded_patterns
from s2megatron.serving.saving import save_under_own_name

WITHOUT_TP = (
    "attention 's2' in transformers knows all heads of a layer, which tensor parallelism would "
    "split; spread the layers (device_map='auto'), or serve the model with vLLM"
)


WHICH_FILES = (
    "cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision",
    "subfolder", "token", "trust_remote_code",
)  # fmt: skip
"""Options of from_pretrained that say which files a name stands for, and whose code is run."""


def load_model(folder: str | Path, **from_pretrained):
    """As `s2megatron.hf.load`. Raises ConfigError."""
    inside = Path(folder) / (from_pretrained.get("subfolder") or "")
    local = Path(folder).is_dir()
    config = from_pretrained.pop("config", None)
    if config is None:
        # The weights are read with these options: the sparsity must be of the same files.
        which = {name: from_pretrained[name] for name in WHICH_FILES if name in from_pretrained}
        if local:
            config = _local_config(inside, bool(which.get("trust_remote_code")))
        else:
            config = AutoConfig.from_pretrained(folder, **which)
    elif not isinstance(config, PretrainedConfig):
        raise ConfigError(
            f"config={config!r}: must be a configuration, which transformers would read from the "
            "model's own folder instead: give transformers.AutoConfig.from_pretrained(...)"
        )
    if getattr(config, NAME, None) is not None:
        from_pretrained.setdefault("attn_implementation", NAME)
        if from_pretrained["attn_implementation"] == NAME:
            recorded_patterns(config)
            for name in ("tp_plan", "distributed_config"):
                if from_pretrained.get(name) is not None:
                    raise ConfigError(f"{name}={from_pretrained[name]!r}: {WITHOUT_TP}")
    elif "attn_implementation" not in from_pretrained:
        _refuse_lost_record(config, folder)
    told = from_pretrained.pop("output_loading_info", False)
    with _refused(inside) if local else contextlib.nullcontext():
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, config=config, output_loading_info=True, **from_pretrained
        )
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ConfigError(
            f"{inside}: {', '.join(missing[:3])}{more}: no file holds it, and config.json asks for "
            "it; transformers would start it from random numbers: convert or copy the folder again"
        )
    save_under_own_name(model)
    return (model, found) if told else model


def _refuse_lost_record(config, folder: str | Path) -> None:
    """Raises ConfigError where only the class's name says that the model was trained with S2."""
    for name in config.architectures or ():
        if name.startswith(ARCHITECTURE_PREFIX) and hasattr(
            transformers, name.removeprefix(ARCHITECTURE_PREFIX)
        ):
            raise ConfigError(
                f"{folder}: config.json has architectures: {name} and no 's2' key: nothing says "
                "which tokens are attended to; convert the checkpoint again (s2megatron convert "
                "to-hf), or give attn_implementation='sdpa' to compute it dense"
            )


def _local_config(folder: Path, trust_remote_code: bool):
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder}: holds an adapter, and the s2 key is in its base model's config.json: load "
            "that one, then peft.PeftModel.from_pretrained(model, folder)"
        )
    return read_config(folder, trust_remote_code)


@contextlib.contextmanager
def _refused(folder: Path) -> Iterator[None]:
    """Files that are missing or damaged become a ConfigError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"{folder}: its weights cannot be loaded ({first})") from None
