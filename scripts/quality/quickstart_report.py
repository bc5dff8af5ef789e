"""The end of quickstart.sh: what was done, the losses, where things are, what to run next."""

import sys
from pathlib import Path

import numpy

from s2megatron.plot import plot_loss, read_scalars


def unigram_entropy(prefix: str, vocab: int) -> float:
    """Nats per token of the best predictor that knows only how often each byte occurs."""
    counts = numpy.bincount(numpy.fromfile(f"{prefix}.bin", dtype=numpy.uint16), minlength=vocab)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * numpy.log(shares)).sum())


def main(run: str, steps: str, seconds: str) -> int:
    scalars = read_scalars(Path(run) / "tensorboard")
    train, held_out = scalars["lm loss"], scalars["lm loss validation"]
    entropy = unigram_entropy(f"{run}/data/valid", 257)
    plot_loss(
        {"training": train, "held out": held_out},
        f"{run}/loss.png",
        levels={"byte unigram entropy of the held-out text": entropy},
        title="quickstart: 4 layers (1 dense, 3 S2), 512 bytes of context",
    )
    resumed = [step for step, _ in train if step > int(steps)]
    speed = scalars["s2/tokens-per-second"][-1][1]

    def ends(curve):
        (first, before), (last, after) = curve[0], curve[-1]
        return f"{before:.3f} at step {first}, {after:.3f} at step {last}"

    below = "below" if held_out[-1][1] < entropy else "NOT below"
    print(
        f"""
== done in {seconds} s after installation and dataset
trained   {train[-1][0]} steps, the last {len(resumed)} of them resumed from the checkpoint
loss      training {ends(train)} (nats per byte)
          held out {ends(held_out)}
compare   {entropy:.3f}: byte unigram entropy of the held-out text; the held-out loss is {below} it
speed     {speed:,.0f} tokens/s
files     {run}/train.log        everything that was printed
          {run}/tensorboard/     losses, tokens/s, true model FLOPs
          {run}/loss.png, {run}/masks.png
          {run}/checkpoints/     torch_dist, every 100 steps

next, on GPUs (8 of them; configs/ has 7B and 70B too):
  torchrun --nproc-per-node 8 -m s2megatron.pretrain --config configs/llama_1.3b_32k.yaml \\
      data.mock=false data.train=[PREFIX] data.valid=[PREFIX]
  where PREFIX is made by: s2megatron data INPUT --out PREFIX"""
    )
    return 0 if below == "below" else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
