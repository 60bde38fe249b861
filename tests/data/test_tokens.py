import copy

import pytest
import torch

from fedlora.data.tokens import prefix_ids, token_bytes, tokenise

TEXTS = ["The quick brown fox", "Ünïcödé 日本語 🙂\n\ttab", " a  b ", "é"]


@pytest.mark.parametrize("name", ["tokenizer", "start_tokenizer", "sentence_tokenizer"])
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_tokens_sum_to_bytes_of_text(name, text, request):
    tokenizer = request.getfixturevalue(name)
    ids = tokenise(tokenizer, [text])[0]
    assert int(token_bytes(tokenizer)[ids].sum()) == len(text.encode())


def test_word_pieces_count_without_their_mark(word_tokenizer):
    sizes = token_bytes(word_tokenizer)
    ids = word_tokenizer("playing é")["input_ids"]
    assert word_tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "play", "##ing", "é", "[SEP]"]
    assert sizes[ids].tolist() == [0, 4, 3, 2, 0]


def test_special_tokens_stand_for_no_bytes(tokenizer):
    sizes = token_bytes(tokenizer)
    assert sizes.shape == (len(tokenizer),)
    assert sizes.dtype == torch.int64
    assert sizes[tokenizer.all_special_ids].tolist() == [0] * len(tokenizer.all_special_ids)


def test_added_ordinary_tokens_count_in_full(tokenizer):
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["日本"])
    ids = tokenise(more, ["日本語"])[0]
    assert more.convert_tokens_to_ids("日本") in ids
    assert int(token_bytes(more)[ids].sum()) == 9


def test_prefix_is_the_start_token_if_any(tokenizer, start_tokenizer, word_tokenizer):
    assert prefix_ids(tokenizer) == []
    assert prefix_ids(start_tokenizer) == [start_tokenizer.bos_token_id]
    assert prefix_ids(word_tokenizer) == [word_tokenizer.cls_token_id]
