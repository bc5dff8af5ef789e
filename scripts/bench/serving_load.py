"""A server under load: many requests of mixed lengths, some taken back; then each one by itself.

Says whether an answer is another than it is alone, whether a page is lost, whether memory grows.
Part of serving.py (`--load`), whose engine it drives.
"""

import random
import time

TIE = 1e-3
"""Two tokens whose log probabilities are nearer than this in float32 are equally good: sums of
another order, as another batch makes them, decide between them."""

HEADING = (
    "| requests | taken back | finished | wrong | ties | run together | free pages before "
    "| after | host MiB at a third | at the end | GPU MiB at a third | at the end | s |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


class Load:
    """`requests` prompts of 1 to `longest` tokens, a few more in every step.

    Args:
        engine: vLLM's, in this process.
        most_new: the most tokens that a request asks for.
        vocab: token ids are below it.
    """

    def __init__(self, engine, requests: int, longest: int, most_new: int, vocab: int, seed=1):
        self.engine, self.core = engine, engine.engine_core.engine_core
        self.pages = self.core.scheduler.kv_cache_manager.block_pool
        draw = random.Random(seed)
        texts = [[draw.randrange(3, vocab) for _ in range(longest)] for _ in range(4)]
        self.prompts, self.new, self.taken_back = {}, {}, {}
        for number in range(requests):
            length, name = int(longest ** draw.random()), str(number)
            text = draw.choice(texts) if draw.random() < 0.5 else None  # a beginning that is shared
            rest = [draw.randrange(3, vocab) for _ in range(length)]
            self.prompts[name] = text[: length // 2] + rest[length // 2 :] if text else rest
            self.new[name] = draw.randint(1, most_new)
            if number % 5 == 4:
                self.taken_back[name] = draw.randint(1, 20)  # steps after it came
        self.draw = draw

    def run(self) -> dict:
        """The figures of HEADING, by name."""
        began, free = time.perf_counter(), self.pages.get_num_free_blocks()
        tokens, together, early = self._all_at_once()
        late, after = _memory(), self.pages.get_num_free_blocks()
        wrong, ties = [], []
        for name, under_load in tokens.items():
            verdict = judge(under_load, *self._alone(name))
            if verdict != "same":
                (wrong if verdict == "wrong" else ties).append(name)
        return dict(
            requests=len(self.prompts), taken_back=len(self.prompts) - len(tokens),
            finished=len(tokens), wrong=wrong, ties=ties, together=together, free_before=free,
            free_after=after, host_early=early[0], host_late=late[0], gpu_early=early[1],
            gpu_late=late[1], seconds=time.perf_counter() - began,
        )  # fmt: skip

    def _ask(self, name: str, **options) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=self.new[name], ignore_eos=True,
                                detokenize=False, **options)  # fmt: skip
        self.engine.add_request(name, {"prompt_token_ids": self.prompts[name]}, params)

    def _all_at_once(self) -> tuple[dict, int, tuple[float, float]]:
        """Tokens of what finished, the most that ran together, memory after a third of them."""
        tokens, came, step, together, early = {}, {}, 0, 0, None
        waiting = list(self.prompts)
        while waiting or self.core.scheduler.has_requests():
            for name in waiting[: self.draw.randint(0, 6)]:
                self._ask(name)
                came[name] = step
                waiting.remove(name)
            for out in self.engine.step():
                if out.finished:
                    tokens[out.request_id] = list(out.outputs[0].token_ids)
            step += 1
            together = max(together, len(self.core.scheduler.running))
            self.engine.abort_request(
                [name for name, after in self.taken_back.items()
                 if name in came and came[name] + after == step and name not in tokens]
            )  # fmt: skip
            if early is None and len(tokens) * 3 >= len(self.prompts):
                early = _memory()
        return tokens, together, early

    def _alone(self, name: str) -> tuple[list[int], list[dict]]:
        """A request's tokens with nobody else and nothing cached, and the two likeliest of each."""
        assert self.core.scheduler.reset_prefix_cache()
        self._ask(name, logprobs=2)
        while self.engine.has_unfinished_requests():
            for out in self.engine.step():
                got = out.outputs[0]
        likely = [{token: one.logprob for token, one in place.items()} for place in got.logprobs]
        return list(got.token_ids), likely


def judge(under_load: list[int], alone: list[int], likely: list[dict]) -> str:
    """ "same", "tie" where the first that differs was as good, or "wrong"."""
    if under_load == alone:
        return "same"
    for here, there, place in zip(under_load, alone, likely, strict=False):
        if here != there:
            near = here in place and place[there] - place[here] < TIE
            return "tie" if near else "wrong"
    return "wrong"  # one is longer


def _memory() -> tuple[float, float]:
    """MiB of this process, and of its tensors on the GPU."""
    import torch

    with open("/proc/self/status") as file:
        host = next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024
    gpu = torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return host, gpu


def line(row: dict) -> str:
    """A row of HEADING's table."""
    counts = [row["requests"], row["taken_back"], row["finished"], len(row["wrong"])]
    counts += [len(row["ties"]), row["together"], row["free_before"], row["free_after"]]
    sizes = [f"{row[n]:.0f}" for n in ("host_early", "host_late", "gpu_early", "gpu_late")]
    return "| " + " | ".join([*map(str, counts), *sizes, f"{row['seconds']:.0f}"]) + " |"
