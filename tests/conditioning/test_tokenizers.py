import itertools

import numpy as np
import pytest

from ldm_jax.conditioning import tokenizers
from ldm_jax.config import UserError

CAPTIONS = [
    f"a {colour} {shape} on {ground}"
    for colour, shape, ground in itertools.product(
        ("black", "blue", "green", "yellow"),
        ("circle", "square", "diamond"),
        ("red", "white", "Café"),
    )
]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train_wordpiece(CAPTIONS, 256)


def test_the_same_captions_give_the_same_ids(tokenizer):
    """Whatever a run's hash seeds are: another run must see the same ids."""
    for _ in range(5):
        again = tokenizers.train_wordpiece(CAPTIONS, 256)
        assert again.get_vocab() == tokenizer.get_vocab()


def test_words_of_the_captions_are_one_token_each(tokenizer):
    ids = tokenizer("A yellow circle on cafe")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("[CLS]", "a", "yellow", "circle", "on", "cafe", "[SEP]")
    ]


def test_other_words_fall_into_pieces_or_are_unknown(tokenizer):
    pieces = tokenizer.tokenize("yellowred")
    assert pieces[0].startswith("yellow") and pieces[1].startswith("##")
    assert tokenizer.tokenize("漢") == ["[UNK]"]


def test_vocabulary_holds_the_special_tokens_first_and_no_more_than_asked():
    small = tokenizers.train_wordpiece(CAPTIONS, 60)
    assert len(small) == 60
    assert small.convert_ids_to_tokens(range(4)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    assert sorted(small.all_special_ids) == [0, 1, 2, 3]


def test_encode_pads_and_keeps_the_end_token(tokenizer):
    ids = tokenizers.encode(tokenizer, ["a red circle", ""], 6)
    assert ids.dtype == np.int32 and ids.shape == (2, 6)
    assert (ids[0, 5:] == 0).all() and (ids[0, :5] > 0).all()
    np.testing.assert_array_equal(ids[1], [2, 3, 0, 0, 0, 0])
    with pytest.warns(UserWarning, match="cut at the end: 'circle on red'"):
        cut = tokenizers.encode(tokenizer, ["a red circle on red"], 4)
    assert cut[0, -1] == 3


def test_a_stored_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = tokenizers.load(tmp_path)
    np.testing.assert_array_equal(
        tokenizers.encode(loaded, CAPTIONS, 12),
        tokenizers.encode(tokenizer, CAPTIONS, 12),
    )


def test_a_tokenizer_that_is_not_there():
    with pytest.raises(UserError, match="tokenizer: '/nowhere' cannot be loaded"):
        tokenizers.load("/nowhere")
