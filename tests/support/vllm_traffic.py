"""Random requests against vLLM's own KVCacheManager with S2 specs, and no model.

After every step what each head of each request holds is compared with lifetimes, block by block.
"""

import random

import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from s2_kernels import LayerPattern
from s2_vllm.rules import held_by_ranks
from s2_vllm.spec import S2Spec

SIZE, CHUNK, LONGEST = 16, 80, 640


class Traffic:
    """Prompts from a few texts that share beginnings; chunks, decoding, preemption, the end."""

    def __init__(self, pattern: LayerPattern, ranks: int, pages: int, seed: int):
        init_none_hash(sha256)
        self.random = random.Random(seed)
        self.held = held_by_ranks(pattern, ranks)
        shape = dict(block_size=SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32)
        specs = [S2Spec(**shape, rules=head.rules, in_flight=CHUNK) for head in self.held]
        groups = [KVCacheGroupSpec([f"layers.0.kv{i}"], spec) for i, spec in enumerate(specs)]
        self.manager = KVCacheManager(
            KVCacheConfig(num_blocks=pages, kv_cache_tensors=[], kv_cache_groups=groups),
            max_model_len=LONGEST, scheduler_block_size=SIZE, hash_block_size=SIZE,
            max_in_flight_tokens=CHUNK,
        )  # fmt: skip
        self.pool = self.manager.block_pool
        self.hasher = get_request_block_hasher(SIZE, sha256)
        self.running: list[Request] = []
        self.texts = [[self.random.randrange(99) for _ in range(LONGEST)] for _ in range(3)]
        self.seen = dict(hits=0, preempted=0, finished=0, dead=0)

    def run(self, steps: int) -> dict:
        free = self.pool.get_num_free_blocks()
        for number in range(steps):
            if len(self.running) < 4 and self.random.random() < 0.3:
                self.admit(str(number))
            for request in list(self.running):
                if request in self.running:
                    self.step(request)
            self.check()
        for request in list(self.running):
            self.leave(request)
        assert self.pool.get_num_free_blocks() == free
        return self.seen

    def admit(self, name: str) -> None:
        text = self.random.choice(self.texts)[: self.random.randint(1, 500)]
        end = [self.random.randrange(99) for _ in range(self.random.randint(0, 60))]
        request = Request(name, text + end, SamplingParams(max_tokens=LONGEST), None,
                          block_hasher=self.hasher)  # fmt: skip
        blocks, hit, _ = self.manager.get_computed_blocks(request)
        self.seen["hits"] += hit > 0
        new = min(CHUNK, request.num_tokens - hit)
        got = self.manager.allocate_slots(
            request, new, hit, blocks, full_sequence_must_fit=True, has_scheduled_reqs=False
        )
        if got is not None:
            self.running.append(request)
            request.status = RequestStatus.RUNNING
            request.num_computed_tokens = hit + new

    def step(self, request: Request) -> None:
        """A chunk of the prompt, or one token; whoever came last makes room."""
        left = request.num_tokens - request.num_computed_tokens
        if left == 0:
            if request.num_tokens == LONGEST or self.random.random() < 0.02:
                self.seen["finished"] += 1
                return self.leave(request)
            request.append_output_token_ids(self.random.randrange(99))
            left = 1
        new = min(left, self.random.randint(1, CHUNK))
        while self.manager.allocate_slots(request, new) is None:
            last = self.running[-1]
            self.seen["preempted"] += 1
            self.leave(last)
            if last is request:
                return None
        request.num_computed_tokens += new
        return None

    def leave(self, request: Request) -> None:
        self.running.remove(request)
        self.manager.free(request)

    def check(self) -> None:
        """What the next query needs is there, and what it does not need is free after a step."""
        for request in self.running:
            done = request.num_computed_tokens
            self.manager.remove_skipped_blocks(request.request_id, done)
            lists = self.manager.get_blocks(request.request_id).blocks
            for held, blocks in zip(self.held, lists, strict=True):
                written = -(-done // SIZE)
                alive = {k for k in range(written) if done // SIZE - k < held.lifetime(k)}
                found = {k for k, block in enumerate(blocks) if not block.is_null}
                assert found == alive, (request.request_id, done, found ^ alive)
                assert all(blocks[k].ref_cnt > 0 for k in alive)
                self.seen["dead"] += written - len(alive)
        taken = {
            block.block_id
            for request in self.running
            for blocks in self.manager.get_blocks(request.request_id).blocks
            for block in blocks
            if not block.is_null
        }
        total = self.pool.num_gpu_blocks - 1
        assert len(taken) == total - self.pool.get_num_free_blocks()
