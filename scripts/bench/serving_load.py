"""A server under load: many requests of mixed lengths, some taken back; then each one by itself.

Says whether an answer is another than it is alone, whether a page is lost, whether memory grows.
Part of serving.py (`--load`), whose engine it drives.
"""

import random
import time

TIE = 1e-3
"""Two tokens whose log probabilities are nearer than this in float32 are equally good: sums of
another order, as another batch makes them, decide between them."""

SHARE = 0.6
"""Of the time until the deadline, what all requests together may take; the rest is to compare."""

EVERY = 10
"""Seconds between two lines that say how far it is."""

HEADING = (
    "| requests | taken back | out of time | finished | compared | wrong | ties | run together "
    "| free pages before | after | host MiB at a third | at the end | GPU MiB at a third "
    "| at the end | s |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


class Load:
    """`requests` prompts of 1 to `longest` tokens, a few more in every step.

    Args:
        engine: vLLM's, in this process.
        most_new: the most tokens that a request asks for.
        vocab: token ids are below it.
        seconds: until the deadline. Requests that have not finished after SHARE of it are taken
            back, and what has not been compared then is not.
    """

    def __init__(
        self,
        engine,
        requests: int,
        longest: int,
        most_new: int,
        vocab: int,
        seconds: float,
        seed=1,
    ):
        self.began, self.told = time.perf_counter(), 0.0
        self.seconds, self.out_of_time = seconds, 0
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
        free = self.pages.get_num_free_blocks()
        tokens, together, early = self._all_at_once()
        late, after = _memory(), self.pages.get_num_free_blocks()
        compared, found = self._compare(tokens)
        gone = len(self.prompts) - len(tokens) - self.out_of_time
        return dict(
            requests=len(self.prompts), taken_back=gone, out_of_time=self.out_of_time,
            finished=len(tokens), compared=compared, wrong=found["wrong"], ties=found["tie"],
            together=together, free_before=free, free_after=after, host_early=early[0],
            host_late=late[0], gpu_early=early[1], gpu_late=late[1], seconds=self._passed(),
        )  # fmt: skip

    def _passed(self) -> float:
        return time.perf_counter() - self.began

    def _tell(self, text: str, always: bool = False) -> None:
        """A line, if the one before it is some seconds old."""
        if always or self._passed() - self.told >= EVERY:
            self.told = self._passed()
            print(f"load: {text}, {self.told:.0f} s", flush=True)

    def _compare(self, tokens: dict) -> tuple[int, dict[str, list[str]]]:
        """How many answers were compared until the deadline, and those that are not the same."""
        found, compared = {"same": [], "wrong": [], "tie": []}, 0
        for name, under_load in tokens.items():
            if self._passed() > self.seconds:
                break
            found[judge(under_load, *self._alone(name))].append(name)
            compared += 1
            self._tell_compared(compared, tokens, found)
        self._tell_compared(compared, tokens, found, always=True)
        return compared, found

    def _tell_compared(self, compared: int, tokens: dict, found: dict, always: bool = False):
        wrong, ties = len(found["wrong"]), len(found["tie"])
        text = f"compared {compared} of {len(tokens)}, {wrong} wrong, {ties} ties"
        self._tell(text, always)

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
            if self._passed() > SHARE * self.seconds and not self.out_of_time:
                left = self._give_up(waiting, tokens, came, step)
                self.out_of_time, waiting = len(left), []
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
            self._tell(f"{len(tokens)} of {len(self.prompts)} finished after {step} steps")
        ended = f"all at once: {len(tokens)} of {len(self.prompts)} finished after {step} steps"
        self._tell(f"{ended}, {self.out_of_time} out of time", always=True)
        return tokens, together, early or _memory()

    def _give_up(self, waiting: list[str], tokens: dict, came: dict, step: int) -> list[str]:
        """Takes back what has neither finished nor been taken back; names of all of these."""
        gone = {n for n, after in self.taken_back.items() if n in came and came[n] + after <= step}
        left = [name for name in self.prompts if name not in tokens and name not in gone]
        self.engine.abort_request([name for name in left if name in came])
        return left

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
    counts = [row[n] for n in ("requests", "taken_back", "out_of_time", "finished", "compared")]
    counts += [
        len(row["wrong"]),
        len(row["ties"]),
        row["together"],
        row["free_before"],
        row["free_after"],
    ]
    sizes = [f"{row[n]:.0f}" for n in ("host_early", "host_late", "gpu_early", "gpu_late")]
    return "| " + " | ".join([*map(str, counts), *sizes, f"{row['seconds']:.0f}"]) + " |"
