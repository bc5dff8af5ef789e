"""Text files, folders of text, or JSONL -> Megatron's indexed dataset (PREFIX.bin, PREFIX.idx).

    files = find_files(["corpus"])                    sources.py     which files, in which order
    texts = documents(files)                          reading.py     bytes -> documents
    write_dataset(texts, "corpus/train", "bytes")     writer.py      documents -> tokens -> files

build.py is all of it for `s2megatron data`; tokenizers.py loads tokenizers and trains one.
"""

from s2megatron.data.reading import ReadOptions, Tally, documents
from s2megatron.data.sources import TEXT_SUFFIXES, Source, find_files, hold_out
from s2megatron.data.tokenizers import BYTE_VOCAB, make_tokenizer
from s2megatron.data.writer import DataReport, write_dataset

__all__ = [
    "BYTE_VOCAB",
    "TEXT_SUFFIXES",
    "DataReport",
    "ReadOptions",
    "Source",
    "Tally",
    "documents",
    "find_files",
    "hold_out",
    "make_tokenizer",
    "write_dataset",
]
