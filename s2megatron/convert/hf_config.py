"""Reads config.json of a Hugging Face folder, by transformers, with errors that name a field."""

import contextlib
import json
import reprlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from s2megatron.errors import ConfigError


def read_json(file: Path) -> dict:
    """A JSON object of a model folder. Raises ConfigError when it is missing or damaged."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: is missing; is this a Hugging Face model folder?") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: holds {reprlib.repr(data)}, not a JSON object; it is damaged")
    return data


def write_json(file: Path, data: dict) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path, trust_remote_code: bool = False):
    """The transformers configuration of a folder.

    Args:
        trust_remote_code: run the code of a model that transformers does not know.

    Raises:
        ConfigError: transformers does not know the model, or refuses a field, which is named.
    """
    file = folder / "config.json"
    fields = read_json(file)
    with _refused(fields, file):
        return _load(folder, trust_remote_code)


def _load(folder: Path, trust_remote_code: bool = False):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _refusals() -> tuple[type[Exception], ...]:
    """What transformers raises over a config.json.

    transformers 5 checks types; of a value that it does not check, Python says what it can. A
    class of its own is in newer huggingface_hubs, and is no ValueError.
    """
    from huggingface_hub import errors

    checked = getattr(errors, "StrictDataclassError", ValueError)
    plain = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
    return (*plain, checked)


@contextlib.contextmanager
def _refused(fields: dict, file: Path) -> Iterator[None]:
    """What transformers raises within becomes a ConfigError that names the field."""
    try:
        yield
    except _refusals() as error:
        said = str(error.__cause__ or error).strip()
        said = said.splitlines()[0] if said else type(error).__name__
        names = [f"{name}={reprlib.repr(fields[name])}" for name in _culprits(fields)]
        at = f"{' or '.join(names)}: " if names else ""
        raise ConfigError(f"{file}: {at}transformers refuses it: {said}") from None


def _culprits(fields: dict) -> list[str]:
    """The fields without any one of which transformers reads the rest."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in fields:
            rest = {key: value for key, value in fields.items() if key != name}
            write_json(Path(folder) / "config.json", rest)
            with contextlib.suppress(*_refusals()):
                _load(Path(folder))
                found.append(name)
    return found
