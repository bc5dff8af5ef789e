"""`save_pretrained` of a model with an `s2` key, under the name that `convert to-hf` writes.

transformers writes the model's class under `architectures` of config.json, and a server without S2
attention serves such a folder dense, without a word. Here the name has "S2" in front.
"""

import contextlib
import functools
from collections.abc import Iterator

from transformers import PreTrainedModel

from s2_kernels.record import ARCHITECTURE_PREFIX
from s2megatron.serving.model import NAME


def save_under_own_name(model: PreTrainedModel) -> None:
    """From now on the model's `save_pretrained` puts "S2" in front of its name while it has an `s2`
    key. Copies of the model do the same, pickled ones included."""
    model.save_pretrained = functools.partial(save_pretrained, model)


def save_pretrained(model: PreTrainedModel, *arguments, **options) -> None:
    """transformers' `save_pretrained`, arguments and errors included."""
    sparse = getattr(model.config, NAME, None) is not None
    with _renamed(model) if sparse else contextlib.nullcontext():
        type(model).save_pretrained(model, *arguments, **options)


@contextlib.contextmanager
def _renamed(model: PreTrainedModel) -> Iterator[None]:
    """transformers takes the name from the class, and may upload the folder before it returns."""
    own = type(model)
    model.__class__ = _subclass(own)
    try:
        yield
    finally:
        model.__class__ = own


@functools.cache
def _subclass(own: type[PreTrainedModel]) -> type[PreTrainedModel]:
    return type(ARCHITECTURE_PREFIX + own.__name__, (own,), {"__module__": own.__module__})
