"""Captions to token ids: any Hugging Face tokenizer, or one trained on the captions."""

import copy
import os
import pathlib
import re
import warnings
from collections.abc import Sequence

import numpy as np
import tokenizers as hf_tokenizers

# It would advise, on every import, to install the torch that nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
import transformers  # noqa: E402

from ldm_jax.config import UserError


def train_wordpiece(
    captions: Sequence[str], vocab_size: int
) -> transformers.PreTrainedTokenizerFast:
    """Trains an uncased WordPiece vocabulary; the same captions give the same ids.

    A text becomes `[CLS] pieces [SEP] [PAD]…`, as BERT's own tokenizer does.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    model = hf_tokenizers.models.WordPiece(unk_token="[UNK]")
    normalizer = hf_tokenizers.normalizers.BertNormalizer(lowercase=True)
    splitter = hf_tokenizers.pre_tokenizers.BertPreTokenizer()
    words = {
        word
        for caption in captions
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption))
    }
    # The trainer numbers letters inside of words in the order of a random hash, and
    # merges pairs of equal count by number; letters listed first have fixed numbers.
    inner = sorted({f"##{letter}" for word in words for letter in word[1:]})
    trainer = hf_tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=special + inner, show_progress=False
    )
    trained = hf_tokenizers.Tokenizer(model)
    trained.normalizer, trained.pre_tokenizer = normalizer, splitter
    trained.train_from_iterator(captions, trainer)

    tokenizer = hf_tokenizers.Tokenizer(
        hf_tokenizers.models.WordPiece(trained.get_vocab(), unk_token="[UNK]")
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = hf_tokenizers.processors.BertProcessing(
        ("[SEP]", tokenizer.token_to_id("[SEP]")),
        ("[CLS]", tokenizer.token_to_id("[CLS]")),
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def load(name_or_path: str | pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """Loads a tokenizer by Hugging Face name or from a folder."""
    try:
        return transformers.AutoTokenizer.from_pretrained(str(name_or_path))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"tokenizer: {str(name_or_path)!r} cannot be loaded ({reason}); give a"
            " folder that holds tokenizer.json, or a hub name that is cached or online"
        ) from error


def with_tokens(
    tokenizer: transformers.PreTrainedTokenizerBase, tokens: Sequence[str]
) -> transformers.PreTrainedTokenizerBase:
    """A copy that has `tokens` too, behind its own and in their order.

    They are found as they are written, before the tokenizer would lower their case;
    those of letters and digits alone not within a longer word. Raises UserError for one
    that it has already, or that has spaces.
    """
    known = set(tokenizer.get_vocab())
    grown = copy.deepcopy(tokenizer)
    for token in tokens:
        if token.split() != [token]:
            raise UserError(f"{token!r}; give one word without spaces, such as <toy>")
        if token in known:
            raise UserError(
                f"{token!r} is in the vocabulary already; choose another, such as"
                f" <{token.strip('<>')}-1>"
            )
        known.add(token)
        alone = token.isalnum()
        grown.add_tokens(
            hf_tokenizers.AddedToken(token, normalized=False, single_word=alone)
        )
    return grown


def spelled_out(text: str, tokens: Sequence[str]) -> str:
    """`text` with TOKEN as "TOKEN TOKEN_1 TOKEN_2 …", as far as `tokens` has these.

    So diffusers writes a token of textual inversion that has several embeddings.
    """
    for token in tokens:
        names = [token]
        while f"{token}_{len(names)}" in tokens:
            names.append(f"{token}_{len(names)}")
        if len(names) > 1:
            # Not where they are spelled out already.
            head = re.escape(token)
            text = re.sub(rf"{head}(?!_\d| {head}_1)", " ".join(names), text)
    return text


def encode(
    tokenizer: transformers.PreTrainedTokenizerBase, texts: Sequence[str], length: int
) -> np.ndarray:
    """Returns int32 ids [b, length], padded; warns with the words that it cut."""
    rows = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=length
    )["input_ids"]
    room = length - tokenizer.num_special_tokens_to_add()
    for text in texts:
        pieces = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = pieces["offset_mapping"]
        if len(offsets) > room:
            cut = text[offsets[room][0] :]
            warnings.warn(
                f"prompt longer than {length} tokens; cut at the end: {cut!r}",
                stacklevel=2,
            )
    return np.asarray(rows, np.int32)
