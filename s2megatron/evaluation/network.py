"""A model as the evaluation sees it: tokens to hidden states, hidden states to logits.

Logits of 128k tokens over a vocabulary do not fit into memory, so they are made in pieces, and only
where somebody asks for them.

Shape letters: b sequences, n tokens, c hidden size, m chosen positions, v vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from s2_kernels import LayerPattern
from s2_kernels.record import read_record
from s2megatron.errors import ConfigError, as_config_error

ATTENTIONS = ("s2", "dense")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_LOGITS = 1 << 27  # numbers held at once: 0.5 GB in float32


@dataclass(frozen=True)
class Network:
    """A causal language model, without a KV cache."""

    hidden: Callable[[Tensor], Tensor]
    """Token ids [b, n] on `device` -> what the output layer reads, [b, n, c]."""
    head: Callable[[Tensor], Tensor]
    """[m, c] -> logits [m, v]."""
    vocab_size: int
    device: torch.device
    attention: str
    """Its name, for the report."""
    patterns: tuple[LayerPattern, ...] = ()
    """What each layer was trained to attend to, whichever attention is computed; () if unknown."""
    positions: int | None = None
    """The longest sequence in tokens; None where there is no limit."""

    @classmethod
    def of(cls, model) -> "Network":
        """Of a transformers model with an output layer; puts it into eval mode."""
        model.eval()
        config, attention = model.config, model.config._attn_implementation
        saved = getattr(config, "s2", None)
        return cls(
            hidden=lambda tokens: (
                model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            ),
            head=model.get_output_embeddings(),
            vocab_size=config.vocab_size,
            device=model.device,
            attention=attention if attention == "s2" else f"dense ({attention})",
            patterns=() if saved is None else read_record(saved),
            positions=getattr(config, "max_position_embeddings", None),
        )

    @torch.no_grad()
    def token_losses(self, tokens: Tensor) -> Tensor:
        """Cross entropy in nats of every token but the first, [b, n] -> float32 [b, n - 1]."""
        tokens = tokens.to(self.device)
        hidden = self.hidden(tokens[:, :-1]).flatten(0, 1)
        parts = [
            torch.nn.functional.cross_entropy(logits, target, reduction="none")
            for logits, target in self._logits(hidden, tokens[:, 1:].flatten())
        ]
        return torch.cat(parts).view(len(tokens), -1).cpu()

    @torch.no_grad()
    def predictions(self, tokens: Tensor, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Of chosen tokens, what the model makes of all that stands before each.

        Args:
            tokens: [b, n].
            rows, places: int64 [m]: sequence and position of each chosen token; places from 1.

        Returns:
            whether its argmax is the token, bool [m], and its cross entropy in nats, float32 [m].
        """
        tokens = tokens.to(self.device)
        rows, places = rows.to(self.device), places.to(self.device)
        hidden = self.hidden(tokens)[rows, places - 1]
        right, nats = [], []
        for logits, target in self._logits(hidden, tokens[rows, places]):
            right.append(logits.argmax(-1) == target)
            nats.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
        return torch.cat(right).cpu(), torch.cat(nats).cpu()

    def _logits(self, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(float32 logits [m', v], targets [m']), piece by piece."""
        size = max(1, _LOGITS // self.vocab_size)
        for part, target in zip(hidden.split(size), targets.split(size), strict=True):
            yield self.head(part).float(), target


def load_network(
    folder: str | Path,
    attention: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> Network:
    """The model in a Hugging Face folder, as a network; arguments and errors are `load_model`'s."""
    return Network.of(load_model(folder, attention, device=device, dtype=dtype))


def load_model(
    folder: str | Path,
    attention: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
):
    """The transformers model in a Hugging Face folder, on its device.

    Args:
        attention: "s2" (as trained; needs the `s2` key that `s2megatron convert to-hf` writes) or
            "dense" (as transformers computes it). Left out: "s2" where there is the key.
        device: left out: "cuda" where there is a GPU, else "cpu".
        dtype: one of DTYPES; left out: "bf16" on a GPU and "fp32" on the CPU.

    Raises:
        ConfigError: no such folder, not a model, or an option that does not fit.
    """
    config = load_model_config(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("fp32" if device == "cpu" else "bf16")
    for name, value, known in (("--attention", attention, (None, *ATTENTIONS)),
                               ("--dtype", dtype, tuple(DTYPES))):  # fmt: skip
        if value not in known:
            raise ConfigError(f"{name} {value}: must be {' or '.join(filter(None, known))}")
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: no GPU is found here; choose cpu")
    from s2megatron import hf

    recorded = getattr(config, hf.NAME, None) is not None
    attention = attention or ("s2" if recorded else "dense")
    if attention == "s2" and not recorded:
        raise ConfigError(
            f"--attention s2: config.json of {folder} has no 's2' key, so the sparsity is not "
            "known; convert the checkpoint with `s2megatron convert to-hf`, or choose dense"
        )
    implementation = {"s2": hf.NAME, "dense": "sdpa"}[attention]
    with as_config_error(f"{folder}: the model cannot be loaded"):
        model = hf.load(folder, attn_implementation=implementation, dtype=DTYPES[dtype])
    return model.to(device)


def load_model_config(folder: str | Path):
    """transformers' config of the model in a Hugging Face folder. Raises ConfigError."""
    from s2megatron.convert.hf_config import read_config

    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(
            f"{folder}: there is no config.json in it; name a Hugging Face folder, as "
            "`s2megatron convert to-hf` makes them"
        )
    return read_config(Path(folder))
