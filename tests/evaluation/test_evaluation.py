"""Scoring, loss and the report, on oracles whose answers are known and on tiny random models."""

import json
import math

import numpy
import pytest
import torch
from convert_models import S2, make_model, run_tree
from evaluation_cases import VOCAB, by_byte, oracle, reader, write_repeating
from in_process import run_command_line

from s2_kernels import dense, local_stride, ranges, sliding_window
from s2_kernels.record import record
from s2megatron import hf
from s2megatron.cli import main
from s2megatron.config import parse_config
from s2megatron.errors import ConfigError
from s2megatron.evaluation import network as network_module
from s2megatron.evaluation.compare import compare, differences
from s2megatron.evaluation.evaluate import LossPlan, evaluate
from s2megatron.evaluation.loss import evaluate_loss
from s2megatron.evaluation.network import load_network
from s2megatron.evaluation.result import Evaluation
from s2megatron.evaluation.scoring import RetrievalPlan, evaluate_retrieval
from s2megatron.evaluation.shards import EDGE_NAMES, Grid, grids
from s2megatron.evaluation.windows import Documents

GRID = Grid(block_size=16, period=4)


def ask(network, **changes):
    plan = {"lengths": (800,), "tasks": ("single",), "documents": 20, "control": 10} | changes
    silent = []
    result = evaluate_retrieval(
        network, by_byte, RetrievalPlan(**plan), batch_tokens=1600, say=silent.append
    )
    assert silent
    return result


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def read_well():
    return ask(oracle(reader()))


def test_a_reader_is_right_and_guesses_nothing_without_the_needle(read_well):
    assert read_well.share(needle=True).value == 1.0
    assert read_well.share(needle=True).count == 20
    assert read_well.share(needle=False).value == 0.0
    assert read_well.share(needle=False).count == 10
    assert all(row.nats < 1e-4 for row in read_well.rows if row.needle)


def test_depths_are_spread_evenly(read_well):
    # Twenty documents: two for each tenth. The question takes the last 90 of 800 tokens.
    assert [cell.count for cell in read_well.by_depth("single", 800)[:8]] == [2] * 8
    assert sum(cell.count for cell in read_well.by_depth("single", 800)) == 20


def test_one_wrong_token_makes_an_answer_wrong():
    def predict(tokens, t):
        right = reader()(tokens, t)
        return right - (tokens[t] == ord("7"))  # wrong after every 7

    result = ask(oracle(predict), control=0)
    for row in result.rows:
        assert row.right == (row.nats < 1)
    assert 0 < result.share(needle=True).value < 1


def test_a_blind_shard_shows(read_well):
    blind = ask(oracle(reader(lambda position: GRID.shard(position) != 2)), documents=40)
    shares = {shard: cell.value for shard, cell in blind.by_shard("single", GRID).items()}
    assert set(shares) == {0, 1, 2, 3}
    assert shares[2] == 0.0 and shares[0] > 0.6 and shares[1] > 0.3
    edges = blind.by_edge("single", GRID)
    assert sum(cell.count for cell in edges.values()) == 40


def test_shards_and_edges_of_the_block_grid():
    heads = dict(heads=4, block_size=16)
    layers = [
        dense(**heads),
        local_stride(**heads, local_blocks=2, stride=8, dense_heads=1),
        local_stride(**heads, local_blocks=3, stride=8),
        local_stride(**heads, local_blocks=2, stride=[2, 3, 4, 4]),
        ranges(**heads, bands=[(2, 1), (8, 2), (None, 4)]),
        sliding_window(**heads, local_blocks=4),
    ]
    assert grids(layers) == [Grid(16, 1), Grid(16, 4), Grid(16, 8), Grid(16, 12)]
    for pattern in layers[1:5]:  # blocks of one shard have one fate, with every head
        (grid,) = grids([pattern])
        for block in range(12):
            for head in range(4):
                again = pattern.lifetime(head, block + grid.period)
                assert pattern.lifetime(head, block) == again
    apart = local_stride(**heads, local_blocks=2, stride=[7, 11, 13, 13], homogeneous=True)
    assert grids([apart]) == [Grid(16, 7), Grid(16, 11), Grid(16, 13)]  # 1,001 shards are too many
    assert [GRID.shard(p) for p in (0, 15, 16, 63, 64)] == [0, 0, 1, 3, 0]
    assert [GRID.edge(source, 4) for source in (12, 13, 15, 16, 17)] == [
        EDGE_NAMES[i] for i in (0, 2, 2, 1, 0)
    ]


def test_distances_and_many_answers():
    result = ask(oracle(reader()), tasks=("multi_key",), queries=4, style="records", control=0)
    assert len(result.rows) == 80
    assert sum(cell.count for cell in result.by_distance("multi_key").values()) == 80
    assert {"0 to 512", "512 to 1024"} == set(result.by_distance("multi_key"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_repeating(tmp_path_factory.mktemp("data"))


def test_loss_of_an_oracle(dataset):
    """One that is sure and right wherever the text repeats, and sure of token 0 elsewhere."""
    documents = Documents(dataset, VOCAB)
    losses = evaluate_loss(
        oracle(reader()), documents, 650, windows=5, batch_tokens=650, say=lambda line: None
    )
    assert losses.places == [(1, 0)]
    table = losses.table()
    assert table["all"].count == 650
    assert table["position 0 to 256"].value == pytest.approx(20, abs=0.2)
    assert table["no repeats"].value == pytest.approx(20, abs=0.3)
    near = table["repeats under 512 back"]
    assert near.count == 300 - 4 and near.value < 0.6
    assert table["repeats 2500 and more back"].value is None


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny Llama with an s2 key, and the same without."""
    found = {}
    patterns = parse_config(run_tree("llama", S2)).sparsity.resolve(
        num_layers=4, heads=4, kv_heads=2
    )
    for name in ("s2", "plain"):
        folder = found[name] = tmp_path_factory.mktemp(name)
        make_model("llama", folder, vocab_size=VOCAB, max_position_embeddings=1024)
    file = found["s2"] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"s2": record(patterns)}))
    return found


def test_losses_are_those_of_transformers(folders, monkeypatch):
    tokens = torch.randint(0, VOCAB, (2, 301), generator=torch.Generator().manual_seed(2))
    found = {}
    for attention in ("s2", "dense"):
        network = load_network(folders["s2"], attention)
        assert len(network.patterns) == 4 and network.positions == 1024
        model = hf.load(folders["s2"], attn_implementation={"s2": "s2", "dense": "sdpa"}[attention])
        with torch.no_grad():
            logits = model(tokens).logits
        expected = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        found[attention] = network.token_losses(tokens)
        assert (found[attention] - expected).abs().max() < 1e-4
        monkeypatch.setattr(network_module, "_LOGITS", 50 * VOCAB)  # pieces of 50 tokens
        assert (network.token_losses(tokens) - expected).abs().max() < 1e-4
        right, nats = network.predictions(
            tokens, torch.tensor([0, 1, 1]), torch.tensor([1, 7, 300])
        )
        assert (nats - expected[[0, 1, 1], [0, 6, 299]]).abs().max() < 1e-4
        top = logits.argmax(-1)[[0, 1, 1], [0, 6, 299]] == tokens[[0, 1, 1], [1, 7, 300]]
        assert torch.equal(right, top)
    assert (found["s2"] - found["dense"]).abs().max() > 0.05


def evaluate_command(folder, out, *options):
    return run_command_line(
        main,
        ["evaluate", str(folder), "--out", str(out), "--tokenizer", "bytes", *map(str, options)],
    )


SHORT = ("--lengths", "256,512", "--tasks", "single,multi_key", "--documents", 10, "--control", 2)


@pytest.fixture(scope="module")
def results(folders, dataset, tmp_path_factory):
    """Output folders of the command, of both attentions."""
    found = {}
    for attention in ("s2", "dense"):
        found[attention] = tmp_path_factory.mktemp("out") / attention
        status, text, errors = evaluate_command(
            folders["s2"], found[attention], *SHORT, "--style", "records",
            "--data", dataset, "--attention", attention, "--grid", "64:2",
        )  # fmt: skip
        assert status == 0, errors
        assert "loss at 256 tokens: 3 of 3 windows" in text
        assert "retrieval at 512 tokens, multi_key (left out): 2 of 2 documents" in text
    return found


def test_command_writes_its_report(results):
    folder = results["s2"]
    assert {f.name for f in folder.iterdir()} == {
        "evaluation.json", "rows.json", "evaluation.md", "retrieval.png", "loss.png",
    }  # fmt: skip
    summary = json.loads((folder / "evaluation.json").read_text())
    assert summary["about"]["attention"] == "s2" and summary["about"]["machine"] == "CPU"
    assert abs(summary["loss"]["512"]["all"]["value"] - math.log(VOCAB)) < 3
    task = summary["retrieval"]["multi_key"]
    assert task["by length"]["512"]["all"]["count"] == 10
    assert sum(cell["count"] for cell in task["by length"]["256"]["by depth"]) == 10
    assert set(task["by shard"]) == {"blocks of 16, 4 shards", "blocks of 64, 2 shards"}
    text = (folder / "evaluation.md").read_text()
    for words in ("## Loss, nats a token", "| single, left out |", "shard, blocks of 16, 4 shards"):
        assert words in text
    rows = json.loads((folder / "rows.json").read_text())
    assert len(rows["answers"]) == 2 * 2 * 12
    dense_summary = json.loads((results["dense"] / "evaluation.json").read_text())
    assert dense_summary["about"]["attention"] == "dense (sdpa)"
    assert dense_summary["loss"]["512"]["all"] != summary["loss"]["512"]["all"]


def test_compare_pairs_windows(results, folders, tmp_path):
    status, text, errors = run_command_line(
        main,
        ["compare", str(results["dense"]), str(results["s2"]), "--out", str(tmp_path / "c.md")],
    )
    assert status == 0, errors
    assert (tmp_path / "c.md").read_text() == text
    assert "## Loss, nats a token" in text and "| 512 | all |" in text
    sums = [
        numpy.array(
            json.loads((results[name] / "rows.json").read_text())["loss"]["256"]["by_position"]
        )
        for name in ("dense", "s2")
    ]
    per_window = (sums[1] - sums[0]).sum(1) / 256
    (line,) = [
        line
        for line in differences(results["dense"], results["s2"])
        if (line.task, line.length, line.what) == ("loss", 256, "all")
    ]
    assert len(per_window) == 3
    error = per_window.std(ddof=1) / math.sqrt(3)
    assert line.change.value == pytest.approx(per_window.mean())
    assert line.second.value - line.first.value == pytest.approx(per_window.mean())
    assert line.change.error == pytest.approx(error)
    assert line.errors == pytest.approx(per_window.mean() / error)
    alike = differences(results["s2"], results["s2"])
    assert {line.change.value for line in alike} == {0.0} and alike[0].errors is None

    other = tmp_path / "other"
    few = ("--lengths", 256, "--tasks", "single", "--documents", 3, "--control", 0)
    assert evaluate_command(folders["s2"], other, *few, "--style", "records")[0] == 0
    status, _, errors = run_command_line(main, ["compare", str(results["s2"]), str(other)])
    assert status == 2 and "differ in data" in errors
    status, _, errors = run_command_line(main, ["compare", str(tmp_path), str(other)])
    assert status == 2 and "there is no such file" in errors


def test_compare_pairs_documents(read_well, tmp_path):
    """A reader that is blind on a shard loses just the documents whose fact lies there."""
    blind = ask(oracle(reader(lambda position: GRID.shard(position) != 2)))
    for name, result in (("reader", read_well), ("blind", blind)):
        Evaluation({"model": name, "attention": name}, [], result).write(tmp_path / name)
    lines = differences(tmp_path / "reader", tmp_path / "blind")
    lost = [x.right - y.right for x, y in zip(read_well.rows, blind.rows, strict=True) if x.needle]
    assert 2 < sum(lost) < 20
    (line,) = [line for line in lines if line.length == 800]
    assert line.first.value == 1.0 and line.change.value == pytest.approx(-sum(lost) / 20)
    assert line.change.error == pytest.approx(numpy.std(lost, ddof=1) / math.sqrt(20))
    assert "| single | length 800 (20) | 100.0% |" in compare(
        tmp_path / "reader", tmp_path / "blind"
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (("--tasks", "none"), "nothing is left to evaluate"),
        (("--tasks", "haystack"), "--tasks ('haystack',): 'haystack': must be of single"),
        (("--attention", "s2"), "has no 's2' key"),
        (("--lengths", "2k"), "--lengths 2048: the model has 1024 positions"),
        (("--lengths", "long"), "--lengths long: 'long' is no number of tokens"),
        (
            ("--lengths", 64, "--tasks", "multi_query"),
            "--tasks multi_query at --lengths 64: length=64",
        ),
        (("--documents", 0), "--documents 0: Input should be greater"),
        (("--style", "verse"), "--style verse"),
        (("--grid", "64"), "--grid 64: must be BLOCK:STRIDE"),
        (("--data", "nowhere"), "nowhere.bin does not exist"),
        (("--filler", "nowhere"), "--filler: nowhere.bin does not exist"),
        (("--device", "cuda"), "no GPU is found"),
    ],
)
def test_input_that_does_not_fit_is_named(folders, tmp_path, options, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, errors = evaluate_command(folders["plain"], tmp_path / "out", *options)
    assert status == 2 and words in errors, errors


def test_out_that_cannot_be_written_fails_at_once(folders, tmp_path):
    (tmp_path / "file").write_text("here already")
    status, text, errors = evaluate_command(folders["plain"], tmp_path / "file", *SHORT)
    assert status == 2 and "--out" in errors and "cannot be made" in errors
    assert "retrieval at" not in text


def test_no_model_no_tokenizer_another_vocabulary(folders, dataset, tmp_path):
    status, _, errors = evaluate_command(tmp_path, tmp_path / "out")
    assert status == 2 and "there is no config.json" in errors
    plain = ["evaluate", str(folders["plain"]), "--out", str(tmp_path / "out")]
    status, _, errors = run_command_line(main, plain)
    assert status == 2 and "has no tokenizer" in errors and "--tokenizer bytes" in errors
    folder = tmp_path / "small"
    make_model("llama", folder, vocab_size=100, max_position_embeddings=1024)
    status, _, errors = evaluate_command(folder, tmp_path / "out", "--lengths", 512)
    assert status == 2 and "--tokenizer: makes token" in errors
    loss = ["evaluate", str(folder), "--out", str(tmp_path / "out"), "--tasks", "none"]
    status, _, errors = run_command_line(main, [*loss, "--data", str(dataset), "--lengths", "200"])
    assert status == 2 and "it was made with another tokenizer" in errors
    loss = ["evaluate", str(folders["plain"]), "--out", str(tmp_path / "out"), "--tasks", "none"]
    status, _, errors = run_command_line(main, [*loss, "--data", str(dataset), "--lengths", "1024"])
    assert status == 2 and "none holds a window of 1024" in errors and "--packed" in errors


def test_in_process_with_natural_filler(folders, dataset):
    """What a study does with many models in one process."""
    network = load_network(folders["s2"])
    documents, kept = Documents(dataset, VOCAB), []
    found = evaluate(
        network,
        {"model": "arm"},
        loss=LossPlan(lengths=(200,), windows=2),
        documents=documents,
        retrieval=RetrievalPlan(lengths=(300,), tasks=("single",), documents=2, control=0),
        encode=by_byte,
        filler=documents.stretch,
        say=lambda line: None,
        keep=kept.append,
    )
    assert found.losses[0].length == 200 and len(found.retrieval.rows) == 2
    assert len(kept) == 2 and kept[0].retrieval is None and kept[1] is found
    assert found.grids == [Grid(16, 1), Grid(16, 4)]
    with pytest.raises(ConfigError, match="1024 positions"):
        evaluate(network, {}, loss=LossPlan(lengths=(2048,)), documents=documents)
