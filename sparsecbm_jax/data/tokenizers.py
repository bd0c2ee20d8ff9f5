"""Tokenisers: the backbone's own, or a WordPiece vocabulary learned from the texts where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sparsecbm_jax.data.schema import DataError
from sparsecbm_jax.runtime.json_files import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Names that transformers 5 and 4 have given the class for any tokenizer.json.
_GENERAL_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def load_tokenizer(path_or_name: str | PathLike[str]) -> PreTrainedTokenizerFast:
    """Loads a fast tokeniser from a directory or by its hub name.

    Raises:
        DataError: If it cannot be found, is not a fast one (character offsets are needed to explain), or has no pad
            token.
    """
    # Imported here because transformers takes seconds to import, and may import torch.
    # Otherwise it warns that PyTorch is missing, which is not needed here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    name = str(path_or_name)
    is_local = Path(name).is_dir()
    try:
        if _is_of_no_special_class(Path(name)):
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(name, local_files_only=True)
        else:
            # A tokeniser's own code is never run, and the user is never asked to allow it.
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                name, use_fast=True, local_files_only=is_local, trust_remote_code=False
            )
    # A damaged tokenizer.json ends in errors of every kind.
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        where = (
            "the directory lacks a readable tokenizer.json or vocabulary; it holds "
            f"{', '.join(sorted(p.name for p in Path(name).iterdir())) or 'nothing'}"
            if is_local
            else "it is no directory here, and the hub did not return it: check the name, or download it where there "
            "is a network and pass the directory"
        )
        raise DataError(f"no tokeniser at {name!r}: {where}") from error
    if not tokenizer.is_fast:
        raise DataError(f"tokeniser {name!r} is a slow one; a tokenizer.json is needed, for character offsets")
    if tokenizer.pad_token_id is None:
        raise DataError(
            f"tokeniser {name!r} has no pad token, so texts cannot be batched. Give it one with "
            "tokenizer.add_special_tokens({'pad_token': ...}) or tokenizer.pad_token = tokenizer.eos_token, "
            "save_pretrained(DIR), and pass DIR"
        )
    return cast("PreTrainedTokenizerFast", tokenizer)


def _is_of_no_special_class(directory: Path) -> bool:
    """Returns True where tokenizer.json defines the whole tokeniser, as it does for those made here.

    A search for another class would import torch, where it is installed, which takes two seconds.
    """
    settings = directory / "tokenizer_config.json"
    if not (settings.is_file() and (directory / "tokenizer.json").is_file()):
        return False
    found = read_json_object(settings, "settings of a tokeniser", error=DataError)
    return found.get("tokenizer_class") in _GENERAL_CLASSES


def train_wordpiece(texts: Iterable[str], vocab_size: int = 2000) -> PreTrainedTokenizerFast:
    """Makes a lower-casing BERT tokeniser with a WordPiece vocabulary learned from `texts`.

    The same texts give the same vocabulary. Its `save_pretrained` directory loads through `load_tokenizer`.

    Args:
        texts: Training texts.
        vocab_size: Most entries of the vocabulary, the five special tokens included.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = list(texts)
    special = list(SPECIAL_TOKENS.values())
    normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    splitter = tokenizers.pre_tokenizers.BertPreTokenizer()
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    # The trainer breaks ties by piece id, and numbers inner pieces in an order that changes from call to call. Pieces
    # that it is given come first, so the same texts give the same vocabulary.
    inner = sorted({f"##{letter}" for word in words for letter in word[1:]})
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=special + inner, min_frequency=2, show_progress=False
    )
    learner = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token=SPECIAL_TOKENS["unk_token"]))
    learner.normalizer, learner.pre_tokenizer = normalizer, splitter
    learner.train_from_iterator(texts, trainer)
    # A second tokeniser, because the trained one would find '##a' in a text and take it for a special token.
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(learner.get_vocab(), unk_token=SPECIAL_TOKENS["unk_token"])
    )
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    backend.decoder = tokenizers.decoders.WordPiece()
    cls, sep = SPECIAL_TOKENS["cls_token"], SPECIAL_TOKENS["sep_token"]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in (cls, sep)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "attention_mask"], **SPECIAL_TOKENS
    )
