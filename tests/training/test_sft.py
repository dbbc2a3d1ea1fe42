"""Rows as examples: where the loss is, what is cut, packing."""

import pytest
import torch
from conftest import make_tokenizer
from family_models import family_model

from core.data import Row
from core.errors import UserError
from core.training.sft import flattening_collator, has_mrope, pack, padded_batch, sft_example, sft_examples

CHAT = Row((("user", "plan"), ("assistant", "weight"), ("user", "cost"), ("assistant", " matrix ")))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def learned(example, tokenizer):
    """The text with loss."""
    pairs = list(zip(example["input_ids"], example["labels"], strict=True))
    assert all(label in (-100, token) for token, label in pairs)
    return tokenizer.decode([token for token, label in pairs if label != -100])


def test_text_rows_train_on_every_token_that_has_one_before_it():
    tokenizer = make_tokenizer(400, 1)
    row = Row(((None, "model layer neuron"),))
    example = sft_example(row, tokenizer, 100)
    assert example["input_ids"] == tokenizer("model layer neuron")["input_ids"]
    assert example["labels"] == [-100, *example["input_ids"][1:]]
    assert len(sft_example(row, tokenizer, 2)["labels"]) == 2


def test_rows_with_roles_train_on_the_answers_and_what_ends_them():
    tokenizer = make_tokenizer(400, 1)
    example = sft_example(CHAT, tokenizer, 100)
    text = "<|user|>plan<|end|><|assistant|>weight<|end|><|user|>cost<|end|><|assistant|> matrix <|end|>"
    assert tokenizer.decode(example["input_ids"]) == text
    assert learned(example, tokenizer) == "weight<|end|> matrix <|end|>"


def test_without_a_template_only_the_answers_have_loss():
    tokenizer = make_tokenizer(400, 1)
    tokenizer.chat_template = None
    tokenizer.eos_token = "<|end|>"
    example = sft_example(CHAT, tokenizer, 100)
    assert learned(example, tokenizer) == "weight matrix <|end|>"
    question = Row((("user", "plan"), ("assistant", "weight"), ("user", "cost")))
    assert learned(sft_example(question, tokenizer, 100), tokenizer) == "weight"


def test_blanks_before_the_end_do_not_hide_it():
    tokenizer = make_tokenizer(400, 1)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | trim }} <|end|>{% endfor %}"
    example = sft_example(Row((("user", "plan"), ("assistant", "weight"))), tokenizer, 100)
    assert learned(example, tokenizer) == "weight<|end|>"


def test_templates_that_strip_or_repeat_words_are_understood():
    """A template with newlines and stripped content; the question holds the answer's word and `assistant`."""
    tokenizer = make_tokenizer(400, 1)
    tokenizer.chat_template = "Say weight, assistant.\n" + CHATML
    row = Row((("user", "weight assistant weight"), ("assistant", " weight ")))
    assert learned(sft_example(row, tokenizer, 100), tokenizer) == "weight<|end|>"


def test_templates_that_mark_the_answer_decide_themselves():
    tokenizer = make_tokenizer(400, 1)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "A:{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    example = sft_example(Row((("user", "plan"), ("assistant", "weight"))), tokenizer, 100)
    assert learned(example, tokenizer) == "A:weight<|end|>"


def test_templates_that_change_the_answer_are_refused():
    tokenizer = make_tokenizer(400, 1)
    tokenizer.chat_template = CHATML.replace("m.content | trim", "m.content | upper")
    with pytest.raises(UserError, match="generation"):
        sft_example(CHAT, tokenizer, 100)


def test_what_is_cut_and_left_out_is_counted(caplog):
    tokenizer = make_tokenizer(400, 1)
    question = Row((("user", "plan " * 30), ("assistant", "weight")))
    rows = [CHAT, question, Row((("user", "plan"),)), Row(((None, "model layer " * 20),))]
    caplog.set_level("INFO")
    examples, counts = sft_examples(rows, tokenizer, 25)
    assert counts["rows"] == 4 and counts["cut"] == 2 and counts["left_out"] == 2 and len(examples) == 2
    assert counts["tokens"] == sum(len(e["input_ids"]) for e in examples) and max(map(len, examples)) <= 25
    assert counts["trained_tokens"] == sum(label != -100 for e in examples for label in e["labels"])
    assert "2 rows cut, 2 left out because nothing in them has a loss" in caplog.text
    with pytest.raises(UserError, match="none of the 1 rows has a token with loss within 25 tokens; raise"):
        sft_examples([question], tokenizer, 25)


def test_packs_hold_every_example_whole():
    examples = [{"input_ids": [n] * n, "labels": [n] * n} for n in (3, 9, 4, 4, 1, 10, 2)]
    packs = pack(examples, 10)
    assert sorted(len(e["input_ids"]) for p in packs for e in p) == [1, 2, 3, 4, 4, 9, 10]
    assert all(sum(len(e["input_ids"]) for e in p) <= 10 for p in packs) and len(packs) == 4


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "qwen2_vl", "qwen2_5_vl", "llava", "llava_next"]
)
def test_packed_examples_do_not_see_each_other(family):
    """Loss and gradients of one packed row are those of the examples alone."""
    model = family_model(family).train()
    generator = torch.Generator().manual_seed(0)
    examples = []
    for size in (7, 4, 9):
        ids = torch.randint(5, 90, (size,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    batch = flattening_collator(has_mrope(model))([examples[:2], examples[2:]])
    assert batch["input_ids"].shape == (1, 20) and "attention_mask" not in batch
    grads = []
    for inputs in (batch, padded_batch(examples)):
        model.zero_grad()
        loss = model(**inputs, num_items_in_batch=14, use_cache=False).loss
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for packed, alone in zip(*grads, strict=True):
        torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-4)
