"""Megatron's side of the conversion tests, all cases in one launch of two ranks.

`main` finds HOME in sys.argv: it reads HOME/plan.json, converts Hugging Face folders, and for every
case loads the result at a layout with Megatron's own loader, writes its logits, and saves it again.
"""

import json
import sys
from pathlib import Path

# Nothing heavy up here: Megatron's checkpoint writer starts a process that imports this module.
LAYOUTS = {
    "tp1": [],
    "tp2": ["megatron.tensor_model_parallel_size=2", "megatron.sequence_parallel=true"],
    "pp2": ["megatron.pipeline_model_parallel_size=2"],
    "vpp2": [
        "megatron.pipeline_model_parallel_size=2",
        "megatron.num_layers_per_virtual_pipeline_stage=1",
    ],
    "ep2": ["megatron.expert_model_parallel_size=2"],
}


def convert(home: Path, sources: dict) -> None:
    """HOME/NAME/hf -> HOME/NAME/megatron, by the command a user gives."""
    from in_process import forget_megatron, run_command_line

    from s2megatron import cli

    for name, options in sources.items():
        folder = home / name
        argv = ["convert", "to-megatron", str(folder / "hf"), "--out", str(folder / "megatron")]
        status, out, err = run_command_line(cli.main, [*argv, *options])
        assert status == 0, err
        (folder / "said.txt").write_text(out)
        forget_megatron()


def run_case(home: Path, case: dict) -> None:
    """Loads HOME/MODEL/megatron at a layout; writes HOME/MODEL/NAME: logits.pt and a checkpoint.

    Args:
        case: model, name, config, layout, and "stock" for Megatron's own dense layer spec.
    """
    import torch
    from in_process import forget_megatron
    from megatron.core import mpu
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training import checkpointing, training

    from s2megatron.training.prepare import prepare

    mpu.destroy_model_parallel()
    destroy_rerun_state_machine()
    forget_megatron()
    layout, stock = case["layout"], case.get("stock", False)
    folder = home / case["model"]
    out = folder / case["name"]
    overrides = [
        *LAYOUTS[layout],
        *case.get("overrides", ()),
        f"megatron.load={folder / 'megatron'}",
        f"megatron.save={out}",
        "megatron.save_interval=1",
    ]
    ready = prepare(case["config"], overrides, writers=False)
    if stock:
        use_stock_spec(ready)
    training.initialize_megatron(skip_mpu_initialization=False)
    builder = ready.model_config.get_builder_cls()(ready.model_config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    models = builder.build_distributed_models(groups, wrap_with_ddp=False)
    iteration, _ = checkpointing.load_checkpoint(models, None, None)
    assert iteration == 0
    if layout in ("tp1", "tp2", "pp2"):
        logits = forward(models[0].eval(), ready.args, stock)
        if logits is not None and mpu.get_data_parallel_rank() == 0:
            out.mkdir(parents=True, exist_ok=True)
            torch.save(logits, out / "logits.pt")
    checkpointing.save_checkpoint(3, models, None, None, 0)


def use_stock_spec(ready) -> None:
    """Megatron's own dense layers, as pretrain_gpt.py builds them."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    def spec(config, vp_stage=None):
        return get_gpt_decoder_block_spec(
            config.transformer,
            use_transformer_engine=False,
            normalization=config.transformer.normalization,
            vp_stage=vp_stage,
        )

    ready.model_config.transformer_layer_spec = spec
    ready.model_config.post_wrap_hooks.clear()
    del ready.args.s2_sparsity


def forward(model, args, stock: bool):
    """Logits [b, s, padded vocabulary] on the rank that has them (TP gathered), else None."""
    import torch
    from convert_models import tokens
    from megatron.core import mpu
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    torch.set_grad_enabled(False)
    ids = tokens()
    seq = ids.shape[1]
    positions = torch.arange(seq).expand_as(ids)
    mask = torch.ones(1, 1, seq, seq, dtype=torch.bool).triu(1) if stock else None
    first, last = mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage()
    if not first:
        hidden = torch.empty(seq, len(ids), args.hidden_size, dtype=args.params_dtype)
        torch.distributed.recv(hidden, mpu.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor([hidden])
    out = model(ids, positions, mask)
    if not last:
        torch.distributed.send(out.contiguous(), mpu.get_pipeline_model_parallel_next_rank())
        return None
    return gather_from_tensor_model_parallel_region(out)


def main() -> None:
    home = Path(sys.argv[1])
    sys.argv = sys.argv[:1]
    import torch

    from s2megatron.training import cpu_runtime

    cpu_runtime.prepare_environment()
    cpu_runtime.install()
    from megatron.training import argument_utils

    # Megatron parses the source of its dataclasses for the help text of every parser it makes.
    factory = argument_utils.ArgumentGroupFactory
    factory._get_field_docstrings = lambda self, kind: {}
    torch.distributed.init_process_group("gloo")
    plan = json.loads((home / "plan.json").read_text())
    if torch.distributed.get_rank() == 0:
        convert(home, plan["convert"])
    torch.distributed.barrier()
    for case in plan["cases"]:
        run_case(home, case)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
