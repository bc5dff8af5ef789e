"""Real torch_dist checkpoints, small ones, damaged as disks damage them. Run by in_process.py."""

import multiprocessing
import os
import signal
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from s2megatron.training.checkpoint_errors import explain
from s2megatron.training.checkpoint_folder import write_tracker
from s2megatron.training.load_fixes import name_damaged_files
from s2megatron.training.save_helpers import tie_save_helpers


def load_and_save_errors(folder: str) -> list[str]:
    """What is told of random bytes in a checkpoint's file, and of a save that failed."""
    name_damaged_files()
    for number in (2, 4):
        where = Path(folder) / f"iter_{number:07d}"
        dcp.save({"weight": torch.randn(1000)}, checkpoint_id=where, no_dist=True)
        (where / "metadata.json").write_text("{}")
    write_tracker(Path(folder), 4)
    file = where / "__0_0.distcp"
    with file.open("r+b") as stream:
        stream.seek(-64, os.SEEK_END)  # the end of the archive that holds the tensor
        stream.write(os.urandom(64))

    source = "def load_checkpoint(load):\n    load()\n"
    scope: dict = {}  # an error from Megatron's function of this name, without its model
    exec(compile(source, "megatron/training/checkpointing.py", "exec"), scope)

    def read():
        dcp.load({"weight": torch.zeros(1000)}, checkpoint_id=where, no_dist=True)

    said = []
    for act in (lambda: scope["load_checkpoint"](read), save_that_fails):
        try:
            act()
        except CheckpointException as error:
            said.append(explain(error, load=folder, step=4, save=folder))
    return said


def save_that_fails() -> None:
    raise CheckpointException("save", {0: (OSError(28, "No space left on device"), None)})


def start_save_helper() -> int:
    """The process number of the manager of Megatron's saves, in a process that ends at once."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    tie_save_helpers()
    filesystem_async.get_write_results_queue()
    (manager,) = multiprocessing.active_children()
    return manager.pid


def samples_of_replaced_data(folder: str) -> list[dict]:
    """Of a dataset, of the same again, and of another one written under its prefix."""
    from s2megatron.data import write_dataset

    prefix, found = f"{folder}/corpus", []
    for texts in (["abc" * 40] * 4, ["abc" * 40] * 4, [*["xyz" * 40] * 4, "w" * 2000]):
        write_dataset(texts, prefix)
        split = samples(prefix, folder)
        names = sorted(path.name for path in Path(folder, "cache").iterdir())
        found.append({"files": names, **split})
    return found


def samples(prefix: str, folder: str) -> dict:
    """The first sample's tokens, and how many samples an epoch has."""
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    from s2megatron.training.data_identity import KnownDataConfig, KnownGPTDataset, index_digest

    tokenizer = Namespace(
        unique_identifiers={"class": "bytes"}, eod=256, pad=-1, vocab_size=257, eos=256
    )
    config = KnownDataConfig(
        random_seed=1,
        sequence_length=16,
        path_to_cache=f"{folder}/cache",
        split="1,0,0",
        blend=([prefix], None),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        documents={prefix: index_digest(prefix)},
    )
    data = IndexedDataset(prefix)
    indices = numpy.arange(len(data.document_indices) - 1, dtype=numpy.int32)
    dataset = KnownGPTDataset(data, prefix, indices, None, Split.train, config)
    return {"tokens": dataset[0]["tokens"].tolist(), "most": len(dataset)}


def what_prepare_says(config: str) -> str:
    """The refusal of a run file."""
    from s2megatron.training.prepare import prepare_without_launch

    return refusal(prepare_without_launch, config, [])


def what_a_start_says(config: str, folder: str) -> str:
    """The refusal of a start in an output folder; Megatron opens its writers there."""
    from s2megatron.training.prepare import prepare

    return refusal(prepare, config, [f"output.folder={folder}"])


def refusal(prepare, config: str, overrides: list[str]) -> str:
    from s2megatron.errors import ConfigError

    try:
        prepare(config, overrides)
    except ConfigError as error:
        return str(error)
    return ""


def train_until_the_writer_is_killed() -> int:
    """The launcher; at iteration 4 rank 0's writer is killed, as the kernel would for memory."""
    from s2megatron import pretrain
    from s2megatron.cluster.ending import run_as_rank
    from s2megatron.training.checkpoint_folder import CheckpointPruner
    from s2megatron.training.writer_watch import current_writer

    after = CheckpointPruner.after

    def then_kill(self, iteration: int) -> None:
        after(self, iteration)
        if iteration == 4:
            os.kill(current_writer().pid, signal.SIGKILL)

    CheckpointPruner.after = then_kill
    return run_as_rank(pretrain.main)


def load_that_is_not_there(config: str) -> list[str]:
    """The refusals of the launcher's start, and of Megatron's own script under --spec."""
    from s2megatron.layer_spec import s2_layer_spec
    from s2megatron.training.prepare import check_start, prepare_without_launch

    os.environ["S2MEGATRON_CONFIG"] = config
    ready = prepare_without_launch(config, [])
    return [
        refusal(lambda *_: check_start(ready), config, []),
        refusal(lambda *_: s2_layer_spec(ready.model_config), config, []),
    ]


def train_and_leave() -> None:
    """The launcher, and its own way to end."""
    from s2megatron import pretrain
    from s2megatron.cluster.ending import leave, run_as_rank

    leave(run_as_rank(pretrain.main))


def common_state(checkpoint: str) -> str:
    """What is said of one that cannot be read."""
    from s2megatron.training.resume import load_common

    return refusal(lambda *_: load_common(Path(checkpoint)), "", [])
