"""A model under torch.compile, in a process of its own: what it is told, whether it is the same.

    python tests/support/compiled_model.py FOLDER

Prints JSON. In a worker of pytest, whose other files compile models of this class too, torch once
handed transformers' own code another argument than it has.
"""

import json
import sys

import torch

import s2megatron.hf as s2hf


def main(folder: str) -> dict:
    model = s2hf.load(folder).eval()
    ids = torch.arange(3, 73)[None] % model.config.vocab_size
    compiled, said = torch.compile(model, backend="eager"), ""
    with torch.no_grad():
        try:
            compiled(ids, use_cache=False)
        except ValueError as error:
            said = str(error)
        got = compiled(ids, use_cache=False, attention_mask=torch.ones_like(ids)).logits
        return {"said": said, "same": torch.equal(got, model(ids).logits)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
