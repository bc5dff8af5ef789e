"""tokenizer.json of a SentencePiece model, as transformers and vLLM read it.

Of a `tokenizer.model` alone transformers makes the tokenizer of the model's class (Llama's or
Qwen's), with other tokens than SentencePiece made of the training text: another treatment of
blanks, other normalization, another algorithm. Here the model's own rules are written out, and the
result is held against SentencePiece.
"""

import json
from pathlib import Path

from s2megatron.convert.tokenizer import PROBES
from s2megatron.errors import ConfigError

BLANK = "\u2581"
"""What SentencePiece writes for a blank."""


def write_sentencepiece_tokenizer(model: Path, target: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json into a folder.

    Raises:
        ConfigError: the model cannot be written out so that it makes the same tokens.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as formats

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    proto = formats.ModelProto.FromString(model.read_bytes())
    tokenizer = _tokenizer(proto)
    kinds = type(proto).SentencePiece
    own = [piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED]
    for text in (*PROBES, *(f"x{piece}y {piece} z" for piece in own)):
        if tokenizer.encode(text, add_special_tokens=False).ids != processor.encode(text):
            raise ConfigError(f"{model}: transformers' tokenizers make other tokens of {text!r}")
    tokenizer.save(str(target / "tokenizer.json"))
    ids = dict(bos=processor.bos_id(), eos=processor.eos_id(), pad=processor.pad_id(),
               unk=processor.unk_id())  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": processor.id_to_piece(i) for name, i in ids.items() if i >= 0},
    }
    text = json.dumps(config, indent=2) + "\n"
    (target / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _tokenizer(proto):
    """A `tokenizers.Tokenizer` by the rules in a SentencePiece ModelProto."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    rules, trainer = proto.normalizer_spec, proto.trainer_spec
    kinds = type(proto).SentencePiece
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    (unknown,) = (i for i, piece in enumerate(proto.pieces) if piece.type == kinds.UNKNOWN)
    if trainer.model_type == trainer.UNIGRAM:
        model = models.Unigram(pieces, unk_id=unknown, byte_fallback=trainer.byte_fallback)
    elif trainer.model_type == trainer.BPE:
        model = models.BPE(
            vocab={piece: i for i, (piece, _) in enumerate(pieces)}, merges=_merges(pieces),
            unk_token=pieces[unknown][0], fuse_unk=True, byte_fallback=trainer.byte_fallback,
        )  # fmt: skip
    else:
        raise ConfigError("a SentencePiece model of words or characters has no tokenizer.json")
    steps = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" +"), " "),
        ]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", BLANK)])
    back = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(back)
    named = {kinds.CONTROL: True, kinds.USER_DEFINED: False}
    for special in (True, False):
        tokenizer.add_tokens(
            [AddedToken(piece.piece, special=special, normalized=False)
             for piece in proto.pieces if named.get(piece.type) is special]
        )  # fmt: skip
    return tokenizer


def _merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, the likeliest first, as SentencePiece joins them."""
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    found = []
    for piece, score in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                found.append((-score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
