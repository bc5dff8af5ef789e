"""What Megatron-LM's pretrain_gpt.py (tag core_v0.19.0) does with --spec, on the CPU.

The wheel does not bring that file. Run under torchrun with Megatron's own command line and
S2MEGATRON_CONFIG; only the CPU runtime is ours.
"""

from s2megatron.training import cpu_runtime


class NoMeter:
    def training(self, iteration):
        pass

    def evaluating(self):
        pass


def main():
    cpu_runtime.prepare_environment()
    cpu_runtime.install()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    from s2megatron.attention.megatron_fixes import skip_missing_makefile
    from s2megatron.training.gpt_loop import datasets_provider, make_forward_step

    skip_missing_makefile()
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, make_forward_step(NoMeter()))


if __name__ == "__main__":
    main()
