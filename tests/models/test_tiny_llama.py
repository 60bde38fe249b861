import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedlora.models
from fedlora.errors import DataError
from fedlora.models import pretrain_tiny_llama as pretraining

FOLDER = Path(fedlora.models.__file__).parent / "tiny_llama"

SOURCE = '''\
class Account:
    """A bank account with a balance that never goes below zero."""

    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def withdraw(self, amount):
        """Return the new balance, or raise ValueError if there is not enough."""
        if amount > self.balance:
            raise ValueError("not enough money: %r" % (amount,))
        self.balance -= amount
        return self.balance


def main():
    account = Account("somebody", 100)
    for amount in range(10):
        print(account.withdraw(amount))


if __name__ == "__main__":
    main()
'''

CHAT = [
    {"role": "user", "content": "Is 7 prime?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And 8?"},
    {"role": "assistant", "content": "No: 2 × 4."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(
        FOLDER, local_files_only=True, dtype=torch.float32
    ).eval()


def random_texts(count=50):
    rng = random.Random(0)
    scalars = [*range(0x20, 0x7F), 9, 10, 13, 0, *range(0xA0, 0x500), *range(0x4E00, 0x4F00)]
    scalars += [*range(0x1F600, 0x1F650), 0x200D, 0x0301, 0x2028, 0xFEFF, 0x10FFFF]
    for _ in range(count):
        yield "".join(chr(rng.choice(scalars)) for _ in range(rng.randrange(200)))


def test_folder_is_small_enough_to_ship():
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 3_000_000


def test_model_and_tokenizer_agree(model, tokenizer):
    config = model.config
    assert config.model_type == "llama"
    assert config.vocab_size == len(tokenizer) == 259
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (256, 257, 258)
    assert tokenizer.all_special_tokens == ["<bos>", "<eos>", "<pad>"]
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert special == (256, 257, 258)
    assert tokenizer.model_max_length == config.max_position_embeddings == 512
    assert sum(weight.numel() for weight in model.parameters()) < 1_100_000


def test_token_ids_are_the_bytes(tokenizer):
    every_byte = "".join(map(chr, range(0x80))) + "é߿ࠀ￿\U00010000\U0010ffff"
    for text in ["", " x", "  x\n\n  y ", "don't ,.", SOURCE, every_byte, *random_texts()]:
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text


def test_special_tokens_are_written_only_on_request(tokenizer):
    ids = tokenizer("<bos>a<eos><pad>")["input_ids"]
    assert ids == [257, ord("a"), 258, 256]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a"
    batch = tokenizer(["ab", "c"], padding=True)
    assert batch["input_ids"] == [[97, 98], [99, 256]]
    assert batch["attention_mask"] == [[1, 1], [1, 0]]


def test_saving_and_loading_the_tokenizer_changes_nothing(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = " a  é\n"
    assert again(text)["input_ids"] == list(text.encode())
    assert again.chat_template == tokenizer.chat_template


def test_the_folder_holds_what_the_script_builds(tokenizer):
    built = pretraining.build_tokenizer()
    assert built.chat_template == tokenizer.chat_template
    assert built.get_vocab() == tokenizer.get_vocab()
    assert built(SOURCE)["input_ids"] == tokenizer(SOURCE)["input_ids"]


def test_chat_template_writes_the_prompt_of_the_next_turn(tokenizer):
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text == (
        "### user\nIs 7 prime?\n### assistant\nYes.<eos>\n"
        "### user\nAnd 8?\n### assistant\nNo: 2 × 4.<eos>\n"
    )
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "### user\nIs 7 prime?\n### assistant\n"
    assert text.startswith(prompt)


def test_chat_template_marks_the_assistant_s_tokens(tokenizer):
    encoded = tokenizer.apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    marked = [token for token, on in zip(ids, mask, strict=True) if on]
    assert tokenizer.decode(marked) == "Yes.<eos>No: 2 × 4.<eos>"


def test_model_has_learnt_python(model, tokenizer):
    ids = tokenizer(SOURCE, return_tensors="pt")["input_ids"][:, :512]
    with torch.no_grad():
        bits = float(pretraining.next_byte_loss(model, ids)) / math.log(2)
    assert bits < 4
    fresh = pretraining.build_model().eval()
    with torch.no_grad():
        assert float(pretraining.next_byte_loss(fresh, ids)) / math.log(2) > 7


def test_model_generates_valid_ids(model, tokenizer):
    prompt = tokenizer("def ", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert tokenizer.decode(out[0]).startswith("def ")


def test_building_a_model_leaves_the_global_stream_alone():
    before = torch.random.get_rng_state()
    first, second = pretraining.build_model(), pretraining.build_model()
    assert torch.equal(torch.random.get_rng_state(), before)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_batches_cover_the_stream_once_per_pass():
    stream = torch.arange(20 * 256)
    rows = pretraining.batches(stream, 256, torch.Generator().manual_seed(0))
    seen = torch.cat([next(rows), next(rows)])
    assert seen.shape == (16, 256)
    assert len(seen.unique()) == 16 * 256
    assert torch.equal(seen - seen[:, :1], torch.arange(256).expand(16, 256))


def test_batches_refuse_too_little_text():
    with pytest.raises(DataError, match="300 tokens"):
        next(pretraining.batches(torch.arange(300), 256, torch.Generator()))


def test_learning_rate_rises_and_falls():
    rates = [pretraining.learning_rate(step, 100) for step in range(100)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(pretraining.PEAK_RATE)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < pretraining.PEAK_RATE / 20


def test_two_short_runs_give_the_same_bits():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stream = torch.randint(256, (6000,), generator=torch.Generator().manual_seed(1))
        lines: list[str] = []
        one, other = pretraining.build_model(), pretraining.build_model()
        pretraining.pretrain(one, stream, steps=2, log=lines.append)
        pretraining.pretrain(other, stream, steps=2, log=lines.append)
    finally:
        torch.set_num_threads(threads)
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)
    assert len(lines) == 2
    assert lines[0].startswith("step 2/2")
