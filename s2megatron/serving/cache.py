"""The KV cache that transformers sees: pages of one pool, of which a KV head keeps the live ones.

`PagedCache.update` stores nothing yet, because only the attention function knows whether a sequence
begins with padding. That function calls `Tokens.attend`. A first prompt is computed there by the
training kernels, and what is alive after it is written into pages. Later tokens are written first,
and then attend to pages.
"""

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from s2_kernels.paged import paged_attention, write_pages
from s2_kernels.prefill import paged_prefill, takes_prefill
from s2megatron.errors import ConfigError
from s2megatron.serving.graph import DecodeGraph
from s2megatron.serving.model import head_size, model_patterns
from s2megatron.serving.pages import PREFILL_TOKENS, PagePool, pages_needed
from s2megatron.serving.tokens import Tokens, without_gradient


class PagedCache(Cache):
    """Keeps of every KV head the blocks that are alive, in pages of a pool allocated once.

    Use it as any cache of transformers: `model.generate(ids, past_key_values=cache)`, or forward
    calls with `past_key_values`. Sequences only grow: beam search and assisted generation, which
    go back, are refused.

    Args:
        model: loaded by `s2megatron.hf.load` from a folder with an `s2` key.
        max_length: the most tokens that a sequence may grow to, its padding included.
        batch_size: sequences.
        pages: in the pool; default: as many as are needed (`pages_needed`), no more.
        graph: run steps of one token a sequence as one CUDA graph, captured at the second of them.
        fuse: compile the small operations of such steps with torch.compile, which takes some
            seconds at the first of them; of use with `graph` only.
        backend: of `s2_kernels.paged_attention`.

    Raises:
        ConfigError: the model has no `s2` key or another attention, its heads are not the
            pattern's, layers differ in block size, the pool is too small (with the number needed),
            or a graph is asked for without a GPU.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_length: int,
        batch_size: int = 1,
        pages: int | None = None,
        graph: bool = False,
        fuse: bool = True,
        backend: str = "auto",
    ):
        super().__init__(layers=[])
        self.patterns = model_patterns(model)
        if max_length < 1 or batch_size < 1:
            raise ConfigError(
                f"max_length={max_length}, batch_size={batch_size}: must be at least 1"
            )
        if graph and model.device.type != "cuda":
            raise ConfigError(f"graph=True: the model is on {model.device}; leave it out off a GPU")
        needed = pages_needed(self.patterns, batch_size, max_length)
        if pages is not None and pages < needed:
            raise ConfigError(
                f"pages={pages}: the pool is too small: {batch_size} sequence(s) of {max_length} "
                f"tokens need {needed} pages of {self.patterns[0].block_size} tokens"
            )
        self.max_length, self.batch, self.backend = max_length, batch_size, backend
        self.head_size = head_size(model.config)
        shape = (pages or needed, self.patterns[0].block_size, self.head_size)
        place = dict(dtype=model.dtype, device=model.device)
        self.k_pages, self.v_pages = torch.empty(shape, **place), torch.empty(shape, **place)
        self.graph = DecodeGraph(model, self, fuse) if graph else None
        self.capturing = False
        self.positions_count_on = False
        """Whether who calls the model makes position_ids that are right: `generate` does."""
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens; keeps the memory."""
        shape = self.k_pages.shape
        device = self.k_pages.device
        self.pool = PagePool(self.patterns, self.batch, self.max_length, shape[0], device)
        self.total = 0
        """Tokens of every sequence, padding included, that some layer has seen."""
        self._seen = [0] * len(self.patterns)
        self._by_rows: bool | None = None
        self._unfinished = False
        self._set_starts([0] * self.batch)
        self._lengths = torch.zeros(self.batch, dtype=torch.int32, device=device)
        if self.graph is not None:
            self.graph.forget()

    # What transformers asks

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_, **__):
        """The new tokens, for attention `"s2"`, in place of all keys and values."""
        self._check(key_states, value_states, layer_idx)
        tokens = Tokens(self, layer_idx, key_states, value_states)
        return tokens, tokens

    def __len__(self) -> int:
        return len(self.patterns)

    def __repr__(self) -> str:
        return (
            f"PagedCache({self.batch} sequence(s) of up to {self.max_length} tokens, "
            f"{self.pool.taken} of {self.pool.pages} pages taken)"
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._seen[layer_idx]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._seen[layer_idx] + query_length, 0

    is_compileable = False
    is_croppable = False
    is_initialized = True

    @property
    def batch_size(self) -> int:
        return self.batch

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    is_linear = is_dummy = is_sliding

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                f"PagedCache: crop({tokens_to_remove}): positions cannot go back, pages that died "
                "are gone; assisted generation and draft models need a DynamicCache"
            )

    def activate_past_recording(self) -> None:
        raise ValueError(
            "PagedCache: assisted generation takes tokens back, and pages that died are gone; "
            "leave out assistant_model and prompt_lookup_num_tokens, or use a DynamicCache"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise ValueError(
            "PagedCache: beam search shares a past between beams, which pages here do not; "
            "leave out num_beams, or use a DynamicCache"
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ValueError("PagedCache: sequences cannot be repeated; make the batch before the text")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise ValueError("PagedCache: sequences cannot be left out; use a cache for each of them")

    # What attention asks

    def attend(self, tokens: Tokens, query: Tensor, first: Tensor | None, scaling, prompt):
        """Attention of new tokens to all that is kept, which they become a part of.

        Args:
            query: [b, h, s, d].
            first: int64 [b], where the text of each sequence begins after its padding, or None:
                at 0 for a new cache, else as it was.
            prompt: attention of a whole prompt, (q, k, v, first) -> [b, s, h, d].

        Returns:
            [b, s, h, d], 0 at padding.
        """
        layer, s = tokens.layer, query.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (query, tokens.keys, tokens.values))
        if self.capturing:  # the host has done its part already
            if layer == 0:
                self._lengths.add_(1)
            return self._attend_pages(layer, q, k, v, self._lengths, scaling)
        begin = self._seen[layer]
        if begin == self.total:  # the first layer of a step
            self._refuse_half_a_step()
            self._start(s, first)
        elif begin + s != self.total:
            self._refuse_half_a_step()
        end = begin + s
        if begin == 0:
            out = prompt(q, k, v, first)
            self._grow(layer, 0, end, alive_only=True)
            with torch.no_grad():
                self._write(layer, k, v, self._lengths, alive_only=True)
        elif s <= PREFILL_TOKENS:
            out = self._one_chunk(layer, q, k, v, end, scaling)
        else:
            cuts = range(0, s, PREFILL_TOKENS)
            parts = [[x[:, i : i + PREFILL_TOKENS] for x in (q, k, v)] for i in cuts]
            ends = [begin + i + part[0].shape[1] for i, part in zip(cuts, parts, strict=True)]
            out = [self._one_chunk(layer, *x, n, scaling) for x, n in zip(parts, ends, strict=True)]
            out = torch.cat(out, dim=1)
        self._seen[layer] = end
        return out

    def step(self) -> None:
        """The host's part of one token a sequence, for a captured step: pages before it runs."""
        self._refuse_half_a_step()
        self._check_room(1)
        self._unfinished = True
        self.total += 1
        for layer in range(len(self)):
            self._grow(layer, self.total - 1, self.total, alive_only=False)
            self._seen[layer] = self.total
        self.pool.flush()

    def after_step(self) -> None:
        """Frees what the captured step was the last to see."""
        for layer in range(len(self)):
            self._shrink(layer, self.total - 1, self.total)
        self._unfinished = False

    @property
    def starts(self) -> tuple[int, ...]:
        """Where the text of each sequence begins, after its padding."""
        return tuple(self._first)

    def count_by(self, *, rows: bool) -> None:
        """Notes from where positions of padded texts are counted: row 0, or their first token.

        Raises:
            ValueError: the cache holds keys that were counted the other way.
        """
        if self._by_rows is None:
            self._by_rows = rows
        elif self._by_rows != rows:
            ways = ("row 0 of the padded batch", "each text's first token")
            now, before = ways if rows else ways[::-1]
            raise ValueError(
                f"position_ids: are counted from {now}, and those in the cache from {before}: give "
                "generate the attention_mask of the whole text, padding included, every time, and "
                "the model position_ids every time or never"
            )

    def refuse_other_positions(self, positions: Tensor) -> None:
        """Raises ValueError where position_ids [b or 1, s] do not go on from what is held."""
        tokens = Tokens(self, 0, positions, positions)  # it looks at no keys or values
        tokens.refuse_other_positions(positions, tokens.first(None))

    def pretend(self, tokens: int) -> None:
        """As if every sequence had `tokens` tokens: their pages hold whatever they did.

        For measurements: filling a cache of 512k tokens takes longer than what is measured then.
        """
        self._start(tokens, None)
        for layer in range(len(self)):
            self._grow(layer, self._seen[layer], self.total, alive_only=True)
            self._seen[layer] = self.total
        self.pool.flush()

    # Bytes

    @property
    def page_bytes(self) -> int:
        """Of keys and values of one page."""
        _, size, d = self.k_pages.shape
        return 2 * size * d * self.k_pages.element_size()

    @property
    def pool_bytes(self) -> int:
        return self.pool.pages * self.page_bytes

    @property
    def kept_bytes(self) -> int:
        """Of the pages that hold something alive now."""
        return self.pool.taken * self.page_bytes

    @property
    def dense_bytes(self) -> int:
        """What a dense cache would hold now."""
        heads = sum(pattern.kv_heads for pattern in self.patterns)
        tokens = self.batch * self.total
        return 2 * heads * tokens * self.head_size * self.k_pages.element_size()

    def _start(self, s: int, first: Tensor | None) -> None:
        """Begins a step of s tokens: where sequences start, and their lengths on the device."""
        self._check_room(s)
        if first is not None:
            self._set_first(first.tolist())
        elif self.total == 0:
            self._set_starts([0] * self.batch)
        self.total += s
        lengths = torch.tensor([self.total - n for n in self._first], dtype=torch.int32)
        self._lengths.copy_(lengths)

    def _refuse_half_a_step(self) -> None:
        """Raises ValueError where a forward pass was interrupted: layers hold different texts."""
        if self._unfinished or len({*self._seen, self.total}) > 1:
            raise ValueError(
                f"PagedCache: a forward pass was interrupted, and layers hold {min(self._seen)} to "
                f"{max(self._seen)} tokens of {self.total}: call reset(), or make a new cache, and "
                "give all tokens again"
            )

    def _set_first(self, first: list[int]) -> None:
        for i, (new, old) in enumerate(zip(first, self._first, strict=True)):
            if self.total > 0 and old < self.total and new != old:
                raise ValueError(
                    f"attention_mask: sequence {i} begins at token {new}, in this cache at token "
                    f"{old}: give the mask of the whole text, the same padding in front"
                )
        self._set_starts(first)

    def _set_starts(self, first: list[int]) -> None:
        self._first = first
        self._edges = {n % self.pool.size for n in first}

    def _one_chunk(self, layer, q, k, v, end: int, scaling) -> Tensor:
        """Writes tokens up to position `end` (padding included), attends, frees what has died."""
        begin = end - q.shape[1]
        self._grow(layer, begin, end, alive_only=False)
        self.pool.flush()
        lengths = self._lengths if end == self.total else self._lengths - (self.total - end)
        with torch.no_grad():
            out = self._attend_pages(layer, q, k, v, lengths, scaling, end)
        self._shrink(layer, begin, end)
        return without_gradient(out, q)

    def _attend_pages(self, layer, q, k, v, lengths, scaling, end: int = 0) -> Tensor:
        check = q.shape[1] > 1  # a step of one token is like the one before it
        self._write(layer, k, v, lengths, alive_only=False, check=check)
        options = dict(softmax_scale=scaling, backend=self.backend, check=check)
        *pages, lengths, pattern = self._pages(layer, lengths)
        if takes_prefill(q.shape[1], self.pool.size) and max(self._first) <= end - q.shape[1]:
            known = [end - first for first in self._first]  # on the host; nothing is padding
            return paged_prefill(q, *pages, pattern, lengths=known, **options)
        return paged_attention(q, *pages, lengths, pattern, after_write=True, **options)

    def _write(self, layer, k, v, lengths, *, alive_only: bool, check: bool = True) -> None:
        self.pool.flush()
        pages = self._pages(layer, lengths)
        write_pages(k, v, *pages, alive_only=alive_only, backend=self.backend, check=check)

    def _pages(self, layer: int, lengths: Tensor) -> tuple:
        table = self.pool.table_of_layer[layer]
        return self.k_pages, self.v_pages, table, lengths, self.patterns[layer]

    def _grow(self, layer: int, begin: int, end: int, *, alive_only: bool) -> None:
        if end - begin == 1 and not self._at_edge(begin):
            return
        for i, first in enumerate(self._first):
            old, new = max(0, begin - first), max(0, end - first)
            self.pool.grow(layer, i, old, new, alive_only=alive_only)

    def _shrink(self, layer: int, begin: int, end: int) -> None:
        if end - begin == 1 and not self._at_edge(end):
            return
        for i, first in enumerate(self._first):
            self.pool.shrink(layer, i, max(0, begin - first), max(0, end - first))

    def _at_edge(self, position: int) -> bool:
        """Whether a block of any sequence ends before `position`: most steps need no page."""
        return position % self.pool.size in self._edges

    def _check_room(self, s: int) -> None:
        if self.total + s > self.max_length:
            raise ValueError(
                f"PagedCache: max_length={self.max_length}: {self.total} tokens are in it and "
                f"{s} more come; make it with a larger max_length"
            )

    def _check(self, keys: Tensor, values: Tensor, layer: int) -> None:
        """Raises ValueError where new keys, values [b, g, s, d] are not of the cache's model."""
        if layer >= len(self.patterns):
            raise ValueError(
                f"PagedCache was made for a model of {len(self.patterns)} layers, this is layer "
                f"{layer + 1}: every model needs a cache of its own"
            )
        expected = (self.batch, self.patterns[layer].kv_heads, keys.shape[2], self.head_size)
        like = self.k_pages
        if tuple(keys.shape) != expected:
            raise ValueError(
                f"PagedCache was made for batch_size={self.batch}, "
                f"{expected[1]} KV heads of {self.head_size}; the keys of layer {layer + 1} have "
                f"shape [batch, heads, tokens, size] = {list(keys.shape)}: make one that fits"
            )
        for x, name in ((keys, "keys"), (values, "values")):
            if x.dtype != like.dtype or x.device != like.device:
                raise ValueError(
                    f"PagedCache is {like.dtype} on {like.device}, the {name} of layer {layer + 1} "
                    f"are {x.dtype} on {x.device}: make it after the model is where it will run; "
                    "where torch.autocast is on, load the model in its dtype instead"
                )
