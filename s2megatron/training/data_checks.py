"""Does a run find the data that it asks for: to train on, and to evaluate with?

Megatron answers late: by a bare assertion or an endless loop when it builds the datasets, and by a
`None` in its first evaluation, hours after the start and before the checkpoint of that iteration.
"""

import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.training.utils import get_blend_and_blend_per_split

from s2megatron.errors import ConfigError
from s2megatron.training.data_identity import KnownGPTDataset
from s2megatron.training.data_options import check_dataset

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Sources:
    """The datasets of a run, as Megatron's arguments name them."""

    common: tuple[list[str], list[float] | None] | None
    """Prefixes and weights that `split` divides among training, validation and test."""
    own: dict[str, tuple[list[str], list[float] | None]]
    """Of each split that has datasets of its own."""
    mock: bool

    def of(self, split: str, args) -> bool:
        """Whether there are documents for 'train', 'valid' or 'test'."""
        if self.common:
            return _shares(args.split)[SPLITS.index(split)] is not None
        return self.mock or split in self.own


def find_sources(args) -> Sources:
    """What Megatron will read.

    Args:
        args: Megatron's arguments, validated.

    Raises:
        ConfigError: a list of datasets that cannot be read.
    """
    listed = args.data_args_path or args.per_split_data_args_path
    try:
        common, per_split = get_blend_and_blend_per_split(args)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"megatron.{_named_in(args)}: {listed}: cannot be read ({type(error).__name__}: "
            f"{error}); data_args_path is a text of weights and prefixes, and "
            'per_split_data_args_path is JSON with "train", "valid" and "test"'
        ) from None
    own = dict(zip(SPLITS, per_split or (), strict=False))
    return Sources(common, {name: blend for name, blend in own.items() if blend}, args.mock_data)


def check_data(args, sources: Sources) -> None:
    """All datasets are there, and each split has documents.

    Args:
        args: Megatron's arguments, validated, of a run that is to start.

    Raises:
        ConfigError: the first thing that does not fit, with the way out.
    """
    if args.dataloader_type == "external":
        raise ConfigError(
            "megatron.dataloader_type: 'external' is for a script with a loader of its own; this "
            "launcher has none: leave it out"
        )
    if sources.own and args.split is not None:
        raise ConfigError(
            f"megatron.split: {args.split!r} beside datasets of each split (data.train and data."
            "valid): leave it out, or name one dataset for all with megatron.data_path"
        )
    if not args.skip_train and not sources.of("train", args):
        raise ConfigError(
            "data.train: names nothing to train on; name a dataset prefix, or set "
            "megatron.skip_train to evaluate only"
        )
    for name, (prefixes, weights) in sources.own.items():
        _check_blend(prefixes, weights, f"data.{name}")
    if sources.common:
        field = f"megatron.{_named_in(args)}"
        _check_blend(*sources.common, field)
        for prefix in sources.common[0]:
            _check_split(args.split, prefix, field)
    if args.rank == 0:  # it writes, and the others read
        for prefixes, _ in filter(None, (sources.common, *sources.own.values())):
            for prefix in itertools.filterfalse(is_object_storage_path, prefixes):
                _check_cache(args.data_cache_path, prefix)


def settle_evaluation(args, sources: Sources, *, asked: frozenset[str]) -> list[str]:
    """Evaluates where there is data for it, and reads every validation set once where all is asked.

    Args:
        args: get `eval_iters` 0 where the run file asks for no evaluation and has no data for one,
            and under full_validation a batch of one sample a rank, which is what its loader gives.
        asked: Megatron options that the run file has.

    Returns:
        A line for the start table.

    Raises:
        ConfigError: an evaluation that cannot be, with the way out.
    """
    for name in ("eval_interval", "log_interval", "tensorboard_log_interval"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"megatron.{name}: {getattr(args, name)}: must be at least 1")
    if args.eval_iters < 0:
        raise ConfigError(f"megatron.eval_iters: {args.eval_iters}: must be 0 (none) or more")
    if args.full_validation or args.multiple_validation_sets:
        _check_full_validation(args, sources, asked)
        return []
    if args.validation_set_names:
        raise ConfigError(
            "megatron.validation_set_names: is for multiple_validation_sets; leave it out"
        )
    if args.eval_iters == 0 or sources.of("valid", args):
        return []
    if "eval_iters" in asked or sources.of("test", args):
        raise ConfigError(
            f"megatron.eval_iters: {args.eval_iters}, and there is no validation data: name "
            "data.valid, or set megatron.eval_iters=0"
        )
    args.eval_iters = 0
    return ["none: there is no validation data (data.valid)"]


def _check_full_validation(args, sources: Sources, asked: frozenset[str]) -> None:
    for name in ("full_validation", "multiple_validation_sets"):
        if not getattr(args, name):
            raise ConfigError(
                "megatron.full_validation and megatron.multiple_validation_sets: Megatron 0.19 "
                f"evaluates with both of them or with neither; set {name}: true, or leave the other"
                " one out"
            )
    if "valid" not in sources.own:
        raise ConfigError("megatron.full_validation: true: name the validation sets in data.valid")
    prefixes, weights = sources.own["valid"]
    if weights:
        raise ConfigError(
            "data.valid: has weights, which multiple_validation_sets would not read; leave them out"
        )
    if args.validation_set_names and len(args.validation_set_names) != len(prefixes):
        raise ConfigError(
            f"megatron.validation_set_names: {args.validation_set_names}: are not as many as "
            f"data.valid has sets, {len(prefixes)}"
        )
    if "test" in sources.own:
        raise ConfigError(
            "data.test: beside megatron.full_validation, with which Megatron 0.19 fails on test "
            "data at the end of the run; make it another set of data.valid"
        )
    if "eval_micro_batch_size" in asked and args.eval_micro_batch_size != 1:
        raise ConfigError(
            f"megatron.eval_micro_batch_size: {args.eval_micro_batch_size} beside full_validation, "
            "which reads one sample at a time; leave it out"
        )
    args.eval_micro_batch_size = 1
    if "eval_global_batch_size" not in asked:  # an iteration is one sample a rank, or what fits
        interleaved = args.virtual_pipeline_model_parallel_size is not None
        group = args.microbatch_group_size_per_vp_stage or args.pipeline_model_parallel_size
        args.eval_global_batch_size = args.data_parallel_size * (group if interleaved else 1)


def _named_in(args) -> str:
    """The option that names all datasets of a run together, or of each split in one file."""
    names = ("data_args_path", "per_split_data_args_path", "data_path")
    return next(name for name in names if getattr(args, name) is not None)


def _check_blend(prefixes: list[str], weights: list[float] | None, field: str) -> None:
    for prefix in prefixes:
        if not is_object_storage_path(prefix):
            check_dataset(prefix, field)
    for prefix, weight in zip(prefixes, weights or (), strict=False):
        if weight <= 0:
            raise ConfigError(
                f"{field}: {prefix} has the weight {weight:g}; leave the dataset out, or give it "
                "a weight above 0"
            )


def _check_cache(cache: str | None, prefix: str) -> None:
    """There is an index already, or it can be written; Megatron tries with the model built."""
    folder = Path(cache or f"{prefix}/cache/{KnownGPTDataset.__name__}_indices")
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if above == folder or (above.is_dir() and os.access(above, os.W_OK)):
        return
    raise ConfigError(
        f"data.cache: {cache or 'is missing'}: the order of {prefix}'s documents is kept in "
        f"{folder}, and {above} cannot be written: name a folder that can, and that all nodes see"
    )


def _shares(split: str | None) -> list[tuple[float, float] | None]:
    """From where to where each split reads, of 0 to 1; None for a split without a share."""
    wanted = (
        f"megatron.split: {split!r}: must be three shares, of training, validation and test, as "
        "'99,1,0'"
    )
    if not split or not re.search("[1-9]", split):
        raise ConfigError(wanted)
    try:
        return convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    except (AssertionError, ValueError):
        raise ConfigError(wanted) from None


def _check_split(split: str, prefix: str, field: str) -> None:
    if is_object_storage_path(prefix):
        return
    documents = check_dataset(prefix, field)
    for name, share in zip(SPLITS, _shares(split), strict=True):
        if share and round(share[0] * documents) == round(share[1] * documents):
            raise ConfigError(
                f"megatron.split: {split!r} gives '{name}' none of the {documents} documents of "
                f"{prefix}; give it a larger share, or 0 (as in '99,1,0')"
            )
