import copy

import pytest

from fedlora.data.chat import Chat
from fedlora.data.example import IGNORE
from fedlora.data.rows import Row
from fedlora.errors import DataError


def talk(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def rows(*conversations):
    return [Row({"messages": c}, f"chat.jsonl:{n}") for n, c in enumerate(conversations, 1)]


def counted_texts(tokenizer, example):
    """The runs of counted tokens, decoded."""
    runs, run = [], []
    for token in [*example.target.tolist(), IGNORE]:
        if token != IGNORE:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def with_template(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


TWO_TURNS = talk(
    ("system", "be brief"),
    ("user", "hi"),
    ("assistant", "Hello 日本!"),
    ("user", "assistant"),
    ("assistant", "\nThe end."),
    ("user", "not answered"),
)


def test_loss_counts_exactly_the_assistant_turns(tokenizer):
    (example,), unusable = Chat(tokenizer, 500, messages="messages").encode(rows(TWO_TURNS))
    assert counted_texts(tokenizer, example) == ["Hello 日本!</s>", "\nThe end.</s>"]
    assert example.num_bytes == len("Hello 日本!\nThe end.".encode())
    assert tokenizer.decode(example.inputs["input_ids"]) == (
        "<system>be brief\n<user>hi\n<assistant>Hello 日本!</s>\n"
        "<user>assistant\n<assistant>\nThe end.</s>\n"
    )
    assert not unusable.counts


def test_templates_with_generation_marks_agree_with_their_own_mask(tokenizer):
    """Oracle: transformers' assistant mask, which needs marks that few templates have."""
    marked = with_template(
        tokenizer,
        "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}"
        "{{ m['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
    )
    (example,), _ = Chat(marked, 500, messages="messages").encode(rows(TWO_TURNS[:5]))
    encoded = marked.apply_chat_template(
        TWO_TURNS[:5], return_dict=True, return_assistant_tokens_mask=True
    )
    assert example.inputs["input_ids"].tolist() == encoded["input_ids"]
    assert (example.target != IGNORE).long().tolist() == encoded["assistant_masks"]


def test_a_template_that_ignores_the_generation_prompt_counts_the_turn_with_its_head(tokenizer):
    plain = with_template(
        tokenizer,
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}",
    )
    (example,), _ = Chat(plain, 500, messages="messages").encode(
        rows(talk(("user", "hi"), ("assistant", "Hello")))
    )
    assert counted_texts(plain, example) == ["assistant: Hello\n"]


def test_an_assistant_may_begin(tokenizer):
    (example,), _ = Chat(tokenizer, 500, messages="messages").encode(
        rows(talk(("assistant", "Hello")))
    )
    assert counted_texts(tokenizer, example)[0].endswith("Hello</s>")


def test_a_template_that_rewrites_the_past_is_refused(tokenizer):
    last_only = with_template(tokenizer, "{{ messages | length }}{{ messages[-1]['content'] }}")
    with pytest.raises(DataError, match=r"chat\.jsonl:1: the chat template writes earlier"):
        Chat(last_only, 500, messages="messages").encode(rows(TWO_TURNS))


def test_roles_that_the_template_refuses_are_named_with_their_line(tokenizer):
    strict = with_template(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"chat\.jsonl:1: .*refuses.*roles must alternate"):
        Chat(strict, 500, messages="messages").encode(rows(TWO_TURNS))


def test_unusable_conversations_are_named_by_reason(tokenizer):
    examples, unusable = Chat(tokenizer, 20, messages="messages").encode(
        rows(
            [],
            None,
            talk(("user", "hi")),
            talk(("user", "hi"), ("assistant", " ")),
            talk(("user", "hi " * 30), ("assistant", "x")),
            talk(("user", "x"), ("assistant", "word " * 30)),
        )
    )
    assert unusable.dropped == {
        "no assistant turn with text": [f"chat.jsonl:{n}" for n in (1, 2, 3, 4)],
        "nothing left of the completion within max_length": ["chat.jsonl:5"],
    }
    assert unusable.cut == ["chat.jsonl:6"]
    assert [len(example.target) for example in examples] == [20]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hi", r'chat\.jsonl:1: column "messages" is a string \("hi"\); expected a list of {role'),
        ([3], r'chat\.jsonl:1: column "messages\[1\]" is a number \(3\); expected an object'),
        ([{"role": "user"}], r'"messages\[1\]\.content" is null; expected a string'),
        ([{"role": 1, "content": "x"}], r'"messages\[1\]\.role" is a number \(1\)'),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\" is a list"),
    ],
)
def test_malformed_messages_are_refused_with_their_line(tokenizer, value, message):
    with pytest.raises(DataError, match=message):
        Chat(tokenizer, 500, messages="messages").check(rows(value)[0])


def test_a_tokenizer_without_chat_template_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"needs a chat template.*choose an instruction-tuned"):
        Chat(with_template(tokenizer, None), 500, messages="messages")
