"""Exact S2 attention in transformers: attention `"s2"`, registered by importing this module.

    import s2megatron.hf
    model = s2megatron.hf.load("runs/my-model-hf")              # what was trained
    model = AutoModelForCausalLM.from_pretrained("runs/my-model-hf", attn_implementation="s2")

`s2megatron convert to-hf` writes the sparsity of every layer under the `s2` key of config.json.
transformers never saves which attention a model was loaded with: a plain `from_pretrained` computes
*dense* attention over weights that were trained sparse, without a word. `load` reads the key.

The block grid starts at the first token of each sequence, as in training. Left-padded batches are
computed one sequence at a time from its first real token; whatever else a mask can say (sliding
windows, packed sequences, 4-D masks, holes, static caches) is refused by name.

    text = s2megatron.hf.generate(model, ids, max_new_tokens=200)

generates with a `PagedCache`, which frees every block of keys and values that no later token
attends to (docs/inference.md). transformers' own `model.generate` keeps all of them.
"""

import copy
import functools

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import AttentionInterface

from s2_kernels import LayerPattern, s2_attention
from s2_kernels.record import read_record, record
from s2megatron.errors import ConfigError, as_config_error
from s2megatron.serving.cache import PagedCache
from s2megatron.serving.loading import WITHOUT_TP, load_model
from s2megatron.serving.model import CACHE, NAME, recorded_patterns
from s2megatron.serving.saving import save_under_own_name
from s2megatron.serving.tokens import Tokens


def load(folder, **from_pretrained):
    """The model of a converted checkpoint with the attention it was trained with.

    Args:
        folder: made by `s2megatron convert to-hf`. Without an `s2` key the model was trained dense
            and is loaded as transformers would.
        from_pretrained: handed on to AutoModelForCausalLM.from_pretrained.

    Raises:
        ConfigError: config.json cannot be read, its sparsity is not of this model, a file or a
            tensor is missing, or the folder is an adapter's.
    """
    return load_model(folder, **from_pretrained)


def s2_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options,
) -> tuple[Tensor, None]:
    """transformers' attention function.

    Args:
        module: a layer's attention, with `layer_idx` and `config.s2`.
        query: [b, h, s, d], the last s of t positions.
        key, value: [b, g, t, d], not repeated, the cache included; or what a `PagedCache` made of
            the new ones.
        attention_mask: what `s2_mask` made: None, or int64 [b], the first real token.

    Returns:
        [b, s, h, d] and no weights; zeros at padding.

    Raises:
        ValueError: what S2 attention does not compute, by name.
    """
    _refuse(module, dropout, options)
    query, key, value = _as_autocast(query, key, value)
    pattern = layer_pattern(module)
    if query.shape[1] != pattern.heads:
        raise ValueError(
            f"attention 's2': {query.shape[1]} heads come to layer {module.layer_idx + 1}, and its "
            f"pattern in config.json has {pattern.heads}: {WITHOUT_TP}"
        )
    if attention_mask is not None and attention_mask.dim() != 1:
        raise ValueError(
            f"attention 's2': a {attention_mask.dim()}-D attention_mask cannot be applied: the "
            "causal mask is built in; give a 2-D one of zeros (left padding) and ones"
        )
    cached = isinstance(key, Tokens)
    positions = options.get("position_ids")
    if module.layer_idx == 0 and positions is not None and not (cached and key.cache.capturing):
        if cached:
            offset, first = key.begin, key.first(attention_mask)
            key.refuse_other_positions(positions, first)
        else:
            offset, first = key.shape[2] - query.shape[2], attention_mask
        _refuse_restarts(positions, first, offset)
    attend = functools.partial(_attend, pattern, scaling)
    if cached:
        key.refuse_another_model(pattern)
        return key.attend(query, attention_mask, scaling, attend), None
    return attend(*(x.transpose(1, 2) for x in (query, key, value)), attention_mask), None


def generate(
    model,
    input_ids: Tensor,
    *,
    cache: PagedCache | None = None,
    graph: bool = False,
    fuse: bool = True,
    **options,
):
    """`model.generate` with a `PagedCache`: greedy or sampling, left-padded batches.

    Args:
        model: from `load`, with an `s2` key in its config.
        input_ids: int64 [b, s] on the model's device, all tokens so far.
        cache: of earlier turns, to go on with; default: a new one with room for `max_new_tokens`
            (or `max_length`), one of which must be given: here, in the `generation_config`, or in
            the model's own.
        graph: run steps of one token as a CUDA graph; fuse: compile their small operations. Of a
            given cache its own settings count.
        options: of transformers' `generate` (attention_mask, max_new_tokens, do_sample, ...).

    Returns:
        What `model.generate` returns.

    Raises:
        ConfigError: as `PagedCache`; no length is given.
        ValueError: beam search, assisted generation, positions that go back.
    """
    asked = _Asked(model, options)
    asked.refuse_what_needs_another_cache()
    if cache is None:
        cache = PagedCache(
            model,
            batch_size=input_ids.shape[0] * (asked.for_("num_return_sequences") or 1),
            max_length=asked.length(input_ids.shape[1]),
            graph=graph,
            fuse=fuse,
        )
    elif not isinstance(cache, PagedCache):
        raise ValueError(
            f"generate: cache is a {type(cache).__name__}: this generates with a PagedCache; give "
            f"others to model.generate ({CACHE}=...)"
        )
    elif cache.total >= input_ids.shape[1]:
        raise ValueError(
            f"generate: {input_ids.shape[1]} tokens are given, and the cache holds "
            f"{cache.total}: a position cannot go back; give all tokens so far and new ones"
        )
    # A run that trained with recomputed activations leaves use_cache=False in config.json.
    options["use_cache"] = True
    cache.positions_count_on = True
    try:
        return model.generate(input_ids, **{CACHE: cache}, **options)
    finally:
        cache.positions_count_on = False


class _Asked:
    """What `generate` is asked for, as transformers finds it: by its options, by the
    `generation_config` that it is given, and for what this one leaves at its default by the
    model's own."""

    def __init__(self, model, options: dict):
        self._options = options
        self._given = options.get("generation_config")
        self._own = model.generation_config

    def for_(self, name: str):
        if name in self._options:
            return self._options[name]
        said = getattr(self._given, name, None)
        if said is None or said == getattr(GenerationConfig(), name, None):
            return getattr(self._own, name, None)
        return said

    def length(self, prompt: int) -> int:
        """Of the text with its prompt, in tokens. Raises ConfigError where nothing says it."""
        new, most = self.for_("max_new_tokens"), self.for_("max_length")
        if new is None and most is None:
            raise ConfigError(
                "generate: neither max_new_tokens nor max_length is given: the cache takes its "
                "memory at once and must know how long the text may become"
            )
        return most if new is None else prompt + new

    def refuse_what_needs_another_cache(self) -> None:
        """Raises ValueError."""
        if self._options.get("use_cache") is False:
            raise ValueError(
                "generate: use_cache=False: this generates with a PagedCache; leave it out, or "
                "call model.generate"
            )
        if (self.for_("num_beams") or 1) > 1:
            raise ValueError(
                f"generate: num_beams={self.for_('num_beams')}: beam search shares a past between "
                "beams, which pages here do not; num_beams=1, or model.generate, which uses a "
                "DynamicCache"
            )
        if self._options.get("past_key_values") is not None:
            raise ValueError("generate: past_key_values: hand a PagedCache on as cache=...")


def _as_autocast(query: Tensor, key, value):
    """In torch.autocast's dtype, where it is on: as for scaled_dot_product_attention.

    Rotary embeddings leave queries and keys in float32 there, and values in the low precision. What
    a `PagedCache` holds has its dtype, and `PagedCache.update` says so.
    """
    device = query.device.type
    if isinstance(key, Tokens) or not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _attend(pattern: LayerPattern, scaling, q, k, v, first: Tensor | None) -> Tensor:
    """[b, s, h, d] of q [b, s, h, d], the last s of the t tokens of k and v [b, t, g, d]."""
    offset = k.shape[1] - q.shape[1]
    if first is None:
        return s2_attention(q, k, v, pattern, softmax_scale=scaling, q_offset=offset)
    rows = [
        _one_sequence(q[i : i + 1], k[i : i + 1], v[i : i + 1], pattern, scaling, start)
        for i, start in enumerate(first.tolist())
    ]
    return torch.cat(rows)


def _one_sequence(q, k, v, pattern: LayerPattern, scaling, first: int) -> Tensor:
    """[1, s, h, d] of a sequence whose first real token is at position `first` of t."""
    offset = k.shape[1] - q.shape[1] - first
    padding = min(max(-offset, 0), q.shape[1])
    out = q.new_zeros(1, padding, q.shape[2], v.shape[3])
    if padding == q.shape[1]:
        return out
    real = s2_attention(
        q[:, padding:], k[:, first:], v[:, first:], pattern,
        softmax_scale=scaling, q_offset=max(offset, 0),
    )  # fmt: skip
    return torch.cat([out, real], dim=1) if padding else real


def layer_pattern(module: torch.nn.Module) -> LayerPattern:
    """The pattern of a layer, read from config.json's `s2` once and kept on the module."""
    pattern = module.__dict__.get("_s2_pattern")
    if pattern is None:
        recorded = getattr(module.config, NAME, None)
        if recorded is None:
            raise ConfigError(
                "attention 's2': config.json has no 's2' key, so the sparsity is not known; "
                "convert the checkpoint with `s2megatron convert to-hf`, or load it dense"
            )
        with as_config_error("config.json"):
            pattern = module.__dict__["_s2_pattern"] = read_record(recorded)[module.layer_idx]
    return pattern


def use_patterns(model, patterns: tuple[LayerPattern, ...]) -> None:
    """Puts other patterns over a loaded model, one a layer; its weights stay as they are.

    Args:
        model: of transformers, loaded in any way; from now on its attention is "s2", and its
            config has these patterns; `save_pretrained` writes them.

    Raises:
        ConfigError: the patterns are not of this model's layers or heads; nothing is changed then.
    """
    config = copy.deepcopy(model.config)
    setattr(config, NAME, record(patterns))
    recorded_patterns(config)
    setattr(model.config, NAME, getattr(config, NAME))
    for module in model.modules():
        module.__dict__.pop("_s2_pattern", None)
    model.set_attn_implementation(NAME)
    save_under_own_name(model)


# Options of transformers' attention functions that S2 attention has no place for.
_NOT_COMPUTED = ("sliding_window", "softcap", "s_aux", "head_mask", "position_bias")
_PACKED_OR_PAGED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "block_table", "cache")


def _refuse(module, dropout: float, options: dict) -> None:
    asked_for = {
        "attention_dropout": dropout,
        "is_causal=False": not getattr(module, "is_causal", True)
        or options.get("is_causal") is False,
        "output_attentions": options.get("output_attentions")
        or getattr(module.config, "output_attentions", False),
    }
    for name in _NOT_COMPUTED + _PACKED_OR_PAGED:
        asked_for[name] = options.get(name) is not None
    for name, asked in asked_for.items():
        if asked:
            raise ValueError(f"attention 's2' does not compute {name}: leave it out")


def _refuse_restarts(positions: Tensor, first: Tensor | None, offset: int) -> None:
    """Raises ValueError for position_ids that do not count on from each sequence's first token.

    Where they start anew, a packed document begins, which would see the one before it.
    transformers looks for that only without a mask and without a cache (`s2_mask` is told then),
    and every layer gets the same ones, so the first looks at them: one wait for the GPU a pass.

    Args:
        positions: [b or 1, s]
        first: [b], row of the first real token; None is 0. Padding in front has any position.
        offset: row of the first query.
    """
    rows = torch.arange(offset, offset + positions.shape[-1], device=positions.device)
    counts_on = (positions == rows).all(dim=-1)
    if first is not None:
        # transformers counts rows where it is given no positions, `generate` counts real tokens.
        start = first.to(positions.device)[:, None]
        padding = rows < start
        by_row, by_token = positions == rows, positions == rows - start
        counts_on = (by_row | padding).all(dim=-1) | (by_token | padding).all(dim=-1)
    if not counts_on.all():
        raise ValueError(
            "attention 's2': position_ids that start anew or leave positions out are not "
            "supported: packed sequences would see each other; give each sequence a row of its "
            "own in the batch and leave position_ids out (generate makes such ones of prompts that "
            "are padded on the right: tokenizer.padding_side = 'left')"
        )


def s2_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    **_,
) -> Tensor | None:
    """transformers' mask function: where each sequence starts, int64 [b], or None where all at 0.

    Zeros after the last one (right padding) need no mask: no real token sees them.

    Raises:
        ValueError: a mask that is not causal with padding in front, or a static cache.
    """
    if mask_function is not causal_mask_function:
        raise ValueError(
            "attention 's2': only the plain causal mask is supported; sliding or chunked windows "
            "and packed sequences (position_ids that start anew) are not; under torch.compile give "
            "an attention_mask, of ones too: without a mask and a cache transformers takes every "
            "batch for a packed one there"
        )
    if not isinstance(q_offset, int) or kv_offset != 0 or kv_length != q_offset + q_length:
        raise ValueError(
            f"attention 's2': {kv_length} keys for queries from {q_offset} to "
            f"{q_offset}+{q_length}: static and sliding caches are not supported; use the default "
            "DynamicCache (no cache_implementation)"
        )
    if attention_mask is None:
        return None
    rows = attention_mask.shape[0] if attention_mask.dim() == 2 else 0
    if rows not in (1, batch_size) or attention_mask.shape[1] < kv_length:
        raise ValueError(
            f"attention 's2': an attention_mask of shape {list(attention_mask.shape)} for a batch "
            f"of {batch_size} and {kv_length} keys; give a 2-D one with a row for every sequence "
            "and a column for every token, the cached ones too"
        )
    real = attention_mask[:, :kv_length].bool().expand(batch_size, -1)
    if real.all():
        return None
    count = real.sum(dim=1)
    first = torch.where(count > 0, real.int().argmax(dim=1), kv_length)
    last = kv_length - 1 - real.flip(1).int().argmax(dim=1)
    if ((last - first + 1 != count) & (count > 0)).any():
        raise ValueError(
            "attention 's2': attention_mask has zeros between ones; only padding before a "
            "sequence, or after it, is supported: to go on from prompts of different lengths, pad "
            "them on the left. Where generate is given no mask, it makes one with zeros wherever "
            "the text holds pad_token_id: give one"
        )
    return first if first.any() else None


AttentionInterface.register(NAME, s2_attention_forward)
AttentionMaskInterface.register(NAME, s2_mask)
