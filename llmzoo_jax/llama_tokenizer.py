"""LLaMA 1 and 2's SentencePiece model as the fast tokenizer that Hugging Face ships with them.

BOS comes first, and a space is put before the text that follows each special token, as LLaMA's
tokenizer did when LLM Zoo was trained (``legacy=True``). The conversions in transformers 5 do
neither: ``LlamaTokenizer`` leaves BOS out, ``AutoTokenizer`` the space as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmzoo_jax.errors import InputError


def from_sentencepiece(path: Path) -> Any:
    """A transformers fast tokenizer from a ``tokenizer.model``; InputError if it is no LLaMA's."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    def refuse(why: str) -> InputError:
        return InputError(
            f"tokenizer: {path} {why}; only LLaMA-style SentencePiece models are converted here."
            " Put a tokenizer.json beside it"
        )

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:
        raise refuse(f"is no SentencePiece model ({error}); Llama 3's is not one") from error
    normal, trained = proto.normalizer_spec, proto.trainer_spec
    specials = [p.piece for p in proto.pieces[:3]]
    if specials != ["<unk>", "<s>", "</s>"]:
        raise refuse(f"begins with {specials}, not <unk> <s> </s>")
    if trained.model_type != trained.BPE or not trained.byte_fallback:
        raise refuse("is no BPE model with byte fallback")
    if normal.precompiled_charsmap or normal.remove_extra_whitespaces:
        raise refuse(f"normalises text ({normal.name})")
    if not normal.add_dummy_prefix or any(p.type == p.USER_DEFINED for p in proto.pieces):
        raise refuse("has no dummy prefix, or has user-defined pieces")

    # SentencePiece joins the pair whose joined piece has the best score (tokenizers: the first of
    # the merges). Byte and special pieces are never joined.
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    normals = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    merges = [
        (-score, vocab[text], -cut, text[:cut], text[cut:])
        for text, score in normals.items()
        for cut in range(1, len(text))
        if text[:cut] in normals and text[cut:] in normals
    ]
    merges = [(left, right) for *_, left, right in sorted(merges)]
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in specials])
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(spaces)
    text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*text, decoders.Strip(content=" ", left=1)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", vocab["<s>"])]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **names
    )
