"""A fast tokenizer as the fields of a GGUF file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from laras.errors import ConfigError

# Word-splitting patterns by the name that llama.cpp gives them; a substring of the pattern identifies it.
# Source: llama.cpp, src/llama-vocab.cpp, `llm_tokenizer_bpe`.
_PRE_TOKENIZERS = (
    ("\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|", "llama-bpe"),
    ("\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|", "qwen2"),
    ("[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+|", "tekken"),
)
_CASE_ENDINGS_OF_GPT4O = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"


@dataclass(frozen=True)
class GgufTokenizer:
    """Vocabulary of V tokens.

    Attributes:
        kind: `gpt2` for byte-level BPE, `llama` for SentencePiece-like BPE.
        pre: llama.cpp's name of the word splitting.
        tokens: Length V.
        types: Length V, of `gguf.TokenType`.
        scores: Length V for `llama`: minus the rank of the merge that makes the token; empty for `gpt2`.
        merges: Pairs, each joined by a space, the first applied first.
    """

    kind: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]


def gguf_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> GgufTokenizer:
    """Reads vocabulary, merges and word splitting.

    Args:
        tokenizer: A fast BPE tokenizer.
        vocab_size: Rows of the embedding; the vocabulary is filled up to it with unused tokens.

    Raises:
        ConfigError: When it is not BPE, or splits words in a way that llama.cpp has no name for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "slow"}}
    model = state["model"]
    if model.get("type") != "BPE":
        raise ConfigError(
            f"the tokenizer is of type {model.get('type')}, and only BPE goes into a GGUF file here",
            hint="export with --format merged and convert it with llama.cpp's own script",
        )
    merges = tuple(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    is_byte_level = "ByteLevel" in json.dumps([state.get("pre_tokenizer"), state.get("decoder")])
    by_id = {index: token for token, index in model["vocab"].items()}
    added = {token["id"]: token for token in state["added_tokens"]}
    by_id |= {index: token["content"] for index, token in added.items()}
    tokens, types = [], []
    for index in range(max(vocab_size, max(by_id) + 1)):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        types.append(_token_type(index, by_id, added, tokenizer.unk_token_id, is_byte_level))
    scores: tuple[float, ...] = ()
    if not is_byte_level:
        rank: dict[str, float] = {}
        for place, pair in enumerate(merges):
            rank.setdefault(pair.replace(" ", "", 1), -float(place))
        scores = tuple(
            rank.get(token, 0.0 if kind != gguf.TokenType.NORMAL else -1e6)
            for token, kind in zip(tokens, types, strict=True)
        )
    kind = "gpt2" if is_byte_level else "llama"
    pre = _pre_tokenizer_name(state.get("pre_tokenizer")) if is_byte_level else "default"
    return GgufTokenizer(kind, pre, tuple(tokens), tuple(types), scores, merges)


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Adds the tokenizer and its chat template to a file.

    Raises:
        ConfigError: As `gguf_tokenizer`.
    """
    fields = gguf_tokenizer(tokenizer, vocab_size)
    writer.add_tokenizer_model(fields.kind)
    writer.add_tokenizer_pre(fields.pre)
    writer.add_token_list(list(fields.tokens))
    writer.add_token_types(list(fields.types))
    if fields.scores:
        writer.add_token_scores(list(fields.scores))
    writer.add_token_merges(list(fields.merges))
    for add, token_id in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token_id is not None:
            add(int(token_id))
    if fields.kind == "llama":  # llama.cpp puts a space before a text unless it is told not to
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("▁"))
    first = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(first) and tokenizer.bos_token_id is not None and first[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _token_type(
    index: int, by_id: dict[int, str], added: dict[int, Any], unknown_id: int | None, is_byte_level: bool
) -> int:
    kinds = gguf.TokenType
    if index not in by_id:
        return int(kinds.UNUSED)
    if index in added:
        if index == unknown_id and not is_byte_level:
            return int(kinds.UNKNOWN)
        return int(kinds.CONTROL if added[index]["special"] else kinds.USER_DEFINED)
    token = by_id[index]
    if not is_byte_level and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return int(kinds.BYTE)
    return int(kinds.NORMAL)


def _pre_tokenizer_name(state: Any) -> str:
    parts = state["pretokenizers"] if state and state["type"] == "Sequence" else [state] if state else []
    patterns = [part["pattern"].get("Regex", "") for part in parts if part["type"] == "Split"]
    digits = any(part["type"] == "Digits" and part["individual_digits"] for part in parts)
    if not patterns and any(part["type"] == "ByteLevel" and part["use_regex"] for part in parts):
        return "smollm" if digits else "gpt-2"
    for pattern in patterns:
        if _CASE_ENDINGS_OF_GPT4O in pattern:
            return "gpt-4o"
        for mark, name in _PRE_TOKENIZERS:
            if mark in pattern:
                return name
    raise ConfigError(
        f"llama.cpp has no known name for how this tokenizer splits words: {json.dumps(state)[:200]}",
        hint="export with --format merged and convert it with llama.cpp's own script",
    )
