"""The layer spec for Megatron's --spec option: Megatron's own, with our core attention in it.

This is the stock route, in a Megatron-LM checkout (tag core_v0.19.0):

    S2MEGATRON_CONFIG=run.yaml torchrun ... pretrain_gpt.py --spec s2megatron.layer_spec \\
        s2_layer_spec --attention-dropout 0 --no-create-attention-mask-in-dataloader ...

Megatron's --spec swallows an ImportError and then trains *dense*. So what goes wrong while this
module is imported is raised as a RuntimeError, which stops the run.
"""

try:
    import os

    import torch

    from s2megatron.cluster.environment import check_graph_memory
    from s2megatron.config import load_config
    from s2megatron.context_split import check_stock_loss
    from s2megatron.errors import ConfigError
    from s2megatron.training.attach import attach, layer_spec
    from s2megatron.training.backends import find_backends
    from s2megatron.training.resume import check_load
    from s2megatron.training.resume_layout import check_resumable
except ImportError as error:
    raise RuntimeError(
        f"s2megatron.layer_spec cannot be imported ({error}); Megatron would go on with dense "
        "attention, so this run stops here"
    ) from error


def s2_layer_spec(config, vp_stage: int | None = None):
    """What `--spec s2megatron.layer_spec s2_layer_spec` calls: an entry point.

    Reads the run file named by S2MEGATRON_CONFIG. Its `sparsity:` section decides the layers; the
    model, the data and the schedule are the command line's.

    Raises:
        ConfigError: no run file, a bad one, or one that does not fit the model; an option that
            S2 attention or a resume does not work with.
    """
    from megatron.training import get_args, print_rank_0

    from s2megatron.training.data_identity import data_identity

    path = os.environ.get("S2MEGATRON_CONFIG")
    if not path:
        raise ConfigError(
            "S2MEGATRON_CONFIG is not set: name the run file whose `sparsity:` section decides "
            "the layers"
        )
    sparsity = load_config(path).sparsity
    args = get_args()
    if not vp_stage:
        print_rank_0(
            f"s2megatron: sparsity from {path}; its megatron: and data: sections are not used "
            "under --spec, the command line decides"
        )
        check_stock_loss(vars(args))
        check_graph_memory(args)
        for line in check_load(args):
            print_rank_0(f"s2megatron: {line}")
        check_resumable(args, find_backends().fused_adam)
        args.s2_data = data_identity(args)  # goes into every checkpoint, as all arguments do
        attach(config, args, sparsity, on_gpu=torch.cuda.is_available())
    return layer_spec(sparsity)(config, vp_stage)
