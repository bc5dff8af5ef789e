"""The run file: YAML -> checked models -> one `LayerPattern` per layer.

    sparsity:                 # what each layer attends to
      block_size: 64
      default: {local_blocks: 16, stride: 16}
      layers:                 # 1-based, as Megatron counts; the last entry that names a layer wins
        - {layers: "every 4", kind: dense}
        - {layers: "13-24", stride: [8, 8, 16, 16]}
    megatron: {...}           # Megatron's own options, by their own names (megatron_options.py)
    data: {...}               # datasets and tokenizer
    output: {...}             # checkpoints and logs: one folder, resumed from when it is there

Everything that comes from outside is checked here: an error names the field, the value and the way
out, and an unknown key is an error that suggests the nearest known one. Keys may be written with
`-` or with `_`, as on Megatron's command line or in its code; from here on they have `_`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from s2_kernels import pattern as patterns
from s2_kernels.pattern import LayerPattern
from s2megatron import strict_yaml
from s2megatron.context_split import check_exchange_groups
from s2megatron.errors import ConfigError, did_you_mean
from s2megatron.paths import user_path
from s2megatron.strict_yaml import one_spelling


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RangeConfig(_Checked):
    """One context range: every `stride`-th block, up to `reach` blocks back."""

    stride: int | list[int]
    """In blocks; one number, or one per KV head."""
    reach: int | None = None
    """In blocks; left out: forever."""


class LayerConfig(_Checked):
    """What a layer attends to. Fields left out of a `layers` entry come from `default`."""

    kind: Literal["local_stride", "ranges", "sliding_window", "dense"] | None = None
    """Left out: 'ranges' where `ranges` is given, else 'local_stride'."""
    block_size: int | None = None
    """Tokens per block; left out: `sparsity.block_size`."""
    local_blocks: int | None = None
    """Window in blocks, the diagonal block included."""
    stride: int | list[int] | None = None
    """In blocks; one number, or one per KV head."""
    ranges: list[RangeConfig] | None = None
    """Bands from near to far, in place of `local_blocks` and `stride`."""
    head_offset: int = 0
    head_step: int | None = None
    """Shift between neighbouring KV heads, in blocks; left out: max(1, stride // heads)."""
    homogeneous: bool = False
    """All heads keep the same blocks."""
    dense_heads: int = 0
    """The last so many KV heads are dense."""

    @model_validator(mode="after")
    def _fields_fit_the_kind(self):
        given = self.model_fields_set
        allowed = {
            "dense": {"block_size"},
            "sliding_window": {"block_size", "local_blocks"},
            "ranges": given - {"local_blocks", "stride"},
            "local_stride": given - {"ranges"},
        }[self.resolved_kind]
        odd = given - allowed - {"kind", "layers"}
        if odd:
            raise ValueError(
                f"{', '.join(sorted(odd))} does not go with kind '{self.resolved_kind}'; "
                "leave it out, or choose another kind"
            )
        return self

    @property
    def resolved_kind(self) -> str:
        return self.kind or ("ranges" if self.ranges is not None else "local_stride")

    def over(self, default: "LayerConfig") -> "LayerConfig":
        """This entry, its missing fields taken from `default` where they go with its kind."""
        merged = default.model_dump(exclude_unset=True, exclude={"kind"})
        merged = {"block_size": merged.get("block_size")} if self.kind == "dense" else merged
        if self.resolved_kind == "sliding_window":
            merged = {k: merged[k] for k in ("block_size", "local_blocks") if k in merged}
        elif self.resolved_kind == "ranges":
            merged = {k: v for k, v in merged.items() if k not in ("local_blocks", "stride")}
        elif self.resolved_kind == "local_stride":
            merged.pop("ranges", None)
        own = self.model_dump(exclude_unset=True, exclude={"layers"})
        return LayerConfig.model_validate(merged | own | {"kind": self.resolved_kind})

    def build(self, *, heads: int, kv_heads: int, block_size: int) -> LayerPattern:
        """The pattern of a layer with these global head counts. Raises ValueError."""
        common = {"heads": heads, "kv_heads": kv_heads, "block_size": self.block_size or block_size}
        kind = self.resolved_kind
        if kind == "dense":
            return patterns.dense(**common)
        if kind == "sliding_window":
            return patterns.sliding_window(**common, local_blocks=self._given("local_blocks"))
        if kind == "ranges":
            bands = [(band.reach, band.stride) for band in self._given("ranges")]
        else:
            bands = [(self._given("local_blocks"), 1), (None, self._given("stride"))]
        return patterns.ranges(
            **common,
            bands=bands,
            head_offset=self.head_offset,
            head_step=self.head_step,
            homogeneous=self.homogeneous,
            dense_heads=self.dense_heads,
        )

    def _given(self, name: str):
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"{name} is missing: kind '{self.resolved_kind}' needs it")
        return value


class LayerEntry(LayerConfig):
    """A `LayerConfig` for some layers."""

    layers: list[int | str] | int | str
    """A list of 1-based numbers and strings: "5", "13-24", "every 4" (4, 8, ...),
    "every 4 from 1" (1, 5, ...), "all"."""

    def numbers(self, num_layers: int) -> set[int]:
        """The layers named, each in 1..num_layers. Raises ValueError."""
        if not self._items:
            raise ValueError("layers: [] names no layer; name some, or leave the entry out")
        chosen = {n for item in self._items for n in _layer_numbers(item, num_layers)}
        outside = sorted(n for n in chosen if not 1 <= n <= num_layers)
        if outside:
            raise ValueError(
                f"layer {outside[0]} of {num_layers}: layers are counted from 1 to "
                f"{num_layers} (megatron.num_layers)"
            )
        return chosen

    @property
    def _items(self) -> list[int | str]:
        return self.layers if isinstance(self.layers, list) else [self.layers]

    def in_vain(self, num_layers: int) -> list[int | str]:
        """What names no layer of so few: "every 12" of a model that was made small to try it."""
        return [item for item in self._items if not _layer_numbers(item, num_layers)]


def _layer_numbers(item: int | str, num_layers: int) -> Sequence[int]:
    text = str(item).strip()
    if text == "all":
        return range(1, num_layers + 1)
    if match := re.fullmatch(r"every (\d+)(?: from (\d+))?", text):
        step = int(match[1])
        start = int(match[2] or step)
        if step >= 1 and start >= 1:
            return range(start, num_layers + 1, step)
    if match := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
        first, last = int(match[1]), int(match[2] or match[1])
        if first <= last:
            return range(first, last + 1)
    raise ValueError(
        f"layers: {item!r} is not understood; "
        "write 5, '13-24', 'every 4', 'every 4 from 1' or 'all'"
    )


class SparsityConfig(_Checked):
    """What every layer attends to."""

    block_size: int = 64
    """Tokens per block: 16, 32, 64, 128 or 256."""
    default: LayerConfig
    """The layers that no entry names."""
    layers: list[LayerEntry] = Field(default_factory=list)
    """Exceptions; the last entry that names a layer decides it."""
    on_resume: Literal["error", "replace"] = "error"
    """Resuming a checkpoint of another sparsity: stop, or go on with this one."""

    keep_attention_output: bool = True
    """Under full activation recompute, keep what sparse layers' attention put out (tokens x heads x
    (2 d + 4) bytes a layer and rank) instead of computing it again."""
    exchange_groups: int | None = Field(default=None, ge=1)
    """Under context parallelism: into how many groups a rank's KV heads are cut, so that one
    group's blocks travel while another computes. Default: as bytes and operations ask for."""

    def in_vain(self, num_layers: int) -> list[str]:
        """A line on each thing that entries say of layers which a model of so many has not."""
        return [
            f"sparsity.layers[{i}]: {item!r} names none of the {num_layers} layers: no layer has "
            "what it asks for"
            for i, entry in enumerate(self.layers)
            for item in entry.in_vain(num_layers)
        ]

    def resolve(self, *, num_layers: int, heads: int, kv_heads: int) -> tuple[LayerPattern, ...]:
        """One pattern per layer, in order, for global head counts. Raises ConfigError."""
        chosen = [(("default",), self.default)] * num_layers
        for i, entry in enumerate(self.layers):
            where = ("layers", i)
            try:
                numbers = entry.numbers(num_layers)
                merged = entry.over(self.default)
            except ValueError as error:
                raise ConfigError(f"{_path(('sparsity', *where))}: {error}") from None
            for n in numbers:
                chosen[n - 1] = (where, merged)
        resolved, built = [], {}
        for where, layer in chosen:
            try:
                if where not in built:
                    built[where] = layer.build(
                        heads=heads, kv_heads=kv_heads, block_size=self.block_size
                    )
            except ValueError as error:
                raise ConfigError(f"{_path(('sparsity', *where))}: {error}") from None
            resolved.append(built[where])
        return tuple(resolved)


class DataConfig(_Checked):
    """Where the tokens come from. Paths are prefixes of Megatron's PREFIX.bin and PREFIX.idx."""

    train: list[str] = Field(default_factory=list)
    """Dataset prefixes, or "WEIGHT PREFIX" to blend; a prefix may hold spaces."""
    valid: list[str] = Field(default_factory=list)
    test: list[str] = Field(default_factory=list)
    tokenizer: str = "bytes"
    """"bytes" (256 bytes + end of document), "huggingface:NAME_OR_DIR", "sentencepiece:FILE", or
    "megatron": the tokenizer options under `megatron:` decide."""
    cache: str | None = None
    """Folder for Megatron's index cache; left out: beside the data."""
    mock: bool = False
    """Megatron's mock dataset (random tokens), for throughput runs."""

    @field_validator("tokenizer")
    @classmethod
    def _known_tokenizer(cls, value: str) -> str:
        if value in ("bytes", "megatron"):
            return value
        if match := re.fullmatch(r"(huggingface|sentencepiece):(.+)", value):
            return f"{match[1]}:{user_path(match[2])}"
        raise ValueError(
            f"{value!r}: must be 'bytes', 'huggingface:NAME_OR_DIR', 'sentencepiece:FILE' or "
            "'megatron'"
        )

    @field_validator("cache")
    @classmethod
    def _home(cls, value: str | None) -> str | None:
        return value and user_path(value)

    @field_validator("train", "valid", "test", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return [value] if isinstance(value, str) else value


class OutputConfig(_Checked):
    """Where a run leaves its checkpoints and logs, and resumes from (output.py)."""

    folder: str | None = None
    """Gets checkpoints/, tensorboard/ and a lock; left out: `megatron.save` and the like decide."""
    keep: int = Field(default=3, ge=1)
    """So many of the newest complete checkpoints stay; older ones are deleted."""
    verify: bool = True
    """Before resuming, all files are read and compared with their checksums, by all ranks."""

    @field_validator("folder")
    @classmethod
    def _home(cls, value: str | None) -> str | None:
        return value and user_path(value)


def _at_home(value: Any) -> Any:
    """A text, or the texts of a list, with `~` as a home folder."""
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return user_path(value) if isinstance(value, str) else value


class RunConfig(_Checked):
    """One run file."""

    sparsity: SparsityConfig
    megatron: dict[str, Any] = Field(default_factory=dict)
    data: DataConfig = DataConfig()
    output: OutputConfig = OutputConfig()

    @field_validator("megatron")
    @classmethod
    def _home(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {name: _at_home(value) for name, value in options.items()}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run file and applies `key.path=value` overrides (values are YAML).

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value does not fit.
    """
    path = Path(user_path(str(path)))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read as YAML: {error}") from None
    tree = one_spelling(strict_yaml.load(text, f"--config {path}"))
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {path}: must be a mapping with 'sparsity' and 'megatron'")
    for override in overrides:
        _override(tree, override)
    return parse_config(tree)


def parse_config(tree: dict) -> RunConfig:
    """A run file's content, already read. Raises ConfigError."""
    try:
        run = RunConfig.model_validate(one_spelling(tree))
    except ValidationError as errors:
        raise ConfigError("\n".join(_explain(e) for e in errors.errors())) from None
    check_exchange_groups(run.sparsity.exchange_groups, run.megatron)
    return run


def _override(tree: dict, text: str) -> None:
    """Sets `a.b.2.c=value` in nested dicts and lists, making dicts on the way."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {text!r}: must look like key.path=value")
    *parents, last = path.replace("-", "_").split(".")
    value = one_spelling(strict_yaml.load(value, f"override {text!r}"))
    node = tree
    try:
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        node[int(last) if isinstance(node, list) else last] = value
    except (ValueError, IndexError, AttributeError, TypeError):
        raise ConfigError(f"override {text!r}: the run file has no place {path!r}") from None


def _path(parts: Sequence) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")


_MODELS = {
    (): RunConfig,
    ("sparsity",): SparsityConfig,
    ("sparsity", "default"): LayerConfig,
    ("sparsity", "layers"): LayerEntry,
    ("data",): DataConfig,
    ("output",): OutputConfig,
}


def _explain(error: dict) -> str:
    """One pydantic error as 'field: what is wrong, and the way out'."""
    # Union branches ("int", "list[int]") stand in the location after the field: leave them out.
    parts = [p for p in error["loc"] if isinstance(p, int) or re.fullmatch(r"\w+", p)]
    parts = [p for p in parts if p not in ("int", "str")]
    where = _path(parts)
    if error["type"] == "extra_forbidden":
        parents = tuple(p for p in parts[:-1] if isinstance(p, str))
        model = RangeConfig if "ranges" in parents else _MODELS.get(parents, RunConfig)
        known = model.model_fields
        near = did_you_mean(str(parts[-1]), known)
        return f"{where}: unknown key{near or '; known here: ' + ', '.join(known)}"
    if error["type"] == "missing":
        return f"{where}: is missing"
    value = error.get("input")
    shown = "" if isinstance(value, dict) or repr(value) in error["msg"] else f"{value!r}: "
    return f"{where}: {shown}{error['msg'].removeprefix('Value error, ')}"
