"""Bits per byte: against the definition computed slowly with stock transformers, and what is said of them."""

import math

import numpy as np
import pytest
import torch
from conftest import TEMPLATE, llama, make_tokenizer, qwen2, save, sentences
from made_up_losses import counts, made_up
from tokenizers import normalizers
from transformers import AutoModelForCausalLM

from core.data import Row
from core.models.checkpoints import open_checkpoint
from core.runs.settings import Experiment
from evaluation.arms.bits import bits_per_byte, percent
from evaluation.arms.models import Arms
from evaluation.arms.spans import ByteSpans
from evaluation.arms.texts import text_set
from evaluation.arms.verdict import statistics, table

# Another template than that of the pico models: it strips messages and has words of its own.
OTHER_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'].strip() }}\n<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def slow_nats(folder, tokenizer, text: str, span: tuple[int, int], special: bool) -> float:
    """-log P(bytes span[0] to span[1] of text | what is before), token by token. In these tokenizers each character of
    a token's name stands for one byte."""
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    with torch.no_grad():
        scores = AutoModelForCausalLM.from_pretrained(folder, dtype="float64")(torch.tensor([ids])).logits[0]
    log_p, total = scores.log_softmax(-1), 0.0
    for number, end in enumerate(ends_in_bytes(tokenizer, ids)):
        if span[0] < end <= span[1]:
            total -= float(log_p[number - 1, ids[number]])
    return total


def ends_in_bytes(tokenizer, ids) -> list[int]:
    special = set(tokenizer.all_special_tokens)
    names = tokenizer.convert_ids_to_tokens(ids)
    return np.cumsum([len(name.encode()) if name in special else len(name) for name in names]).tolist()


def letter_ends(text: str) -> set[int]:
    return set(np.cumsum([len(letter.encode()) for letter in text]).tolist())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(target folder, its tokenizer), (source folder, its tokenizer), with other vocabularies and chat templates."""
    folder, small, large = tmp_path_factory.mktemp("pair"), make_tokenizer(400, 1), make_tokenizer(500, 2)
    large.chat_template = OTHER_TEMPLATE
    return (save(llama(), small, folder / "target"), small), (save(qwen2(), large, folder / "source"), large)


def losses_of(pair, rows, max_tokens):
    (target, small), (source, large) = pair
    sets = {"held_out": text_set("held_out", rows, (small, large), max_tokens)}
    experiment = Experiment.of(tokens_per_batch=64, dtype="float32")
    arms = Arms(None, open_checkpoint(str(target)), open_checkpoint(str(source)), experiment)
    found = arms._losses_of(arms.target.load_model("float32"), "base", sets)
    return sets["held_out"], found, arms._losses_of_source(sets)


def test_plain_texts_against_the_definition(pair):
    """All texts at once, in batches, cut at 9 tokens of either model; some are cut inside a letter."""
    rows = [Row(((None, text),), str(n)) for n, text in enumerate([*sentences(12, 9), "ภาษาโมเดล語言 model", "x=1"])]
    texts, target, source = losses_of(pair, rows, 9)
    assert target.tokens.keys() == target.bytes.keys() == source.bytes.keys() and not source.tokens
    kept = [row for row in rows if len(pair[0][1](row.plain)["input_ids"]) > 1]
    for n, row in enumerate(kept):
        text = row.plain
        cut = [ends_in_bytes(t, t(text)["input_ids"][:9]) for _, t in pair]
        shared = sorted(set(cut[0]) & set(cut[1]) & letter_ends(text))
        size = shared[-1] - shared[0] if len(shared) > 1 else 0
        assert texts.spans.sizes[n] == size
        for found, (folder, tokenizer) in zip((target, source), pair, strict=True):
            expected = slow_nats(folder, tokenizer, text, (shared[0], shared[-1]), True) if size else 0.0
            assert found.bytes["held_out"][n] == pytest.approx(expected, abs=1e-3)
    assert sum(texts.spans.sizes) > 0 and max(source.bytes["held_out"]) > 1


def test_answers_of_conversations_are_compared_each_model_in_its_own_template(pair):
    """The whole answer, from its very beginning to its end, without white space around it and without the end token."""
    answers = ["weight plan naïve", " transport 語言 \n", "model"]
    rows = [Row((("user", f"layer {n}"), ("assistant", answer)), str(n)) for n, answer in enumerate(answers)]
    texts, target, source = losses_of(pair, rows, 200)
    assert texts.spans.answers
    for n, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        text = answer.strip()
        for found, (folder, tokenizer) in zip((target, source), pair, strict=True):
            whole, _ = row.render(tokenizer)
            begin = len(whole[: whole.index(text)].encode())
            span = (begin, begin + len(text.encode()))
            ends = ends_in_bytes(tokenizer, tokenizer(whole, add_special_tokens=False)["input_ids"])
            if text == answer:  # else a token of the target may hold the white space as well
                assert texts.spans.sizes[n] == len(text.encode()) and set(span) <= set(ends)
                expected = slow_nats(folder, tokenizer, whole, span, False)
                assert found.bytes["held_out"][n] == pytest.approx(expected, abs=1e-3)
    assert 0 < texts.spans.sizes[1] <= len(answers[1].strip().encode())
    assert target.tokens["held_out"][0] > target.bytes["held_out"][0]  # that of the token that ends the answer


def test_a_source_that_refuses_a_conversation_leaves_it_out(pair, caplog):
    (_, small), (_, large) = pair
    strict = make_tokenizer(500, 2)
    strict.chat_template = "{{ raise_exception('no system prompts') if messages[0]['role'] == 'system' }}" + TEMPLATE
    rows = [
        Row((("system", "be kind"), ("user", "plan"), ("assistant", "weight")), "a"),
        Row((("user", "plan"), ("assistant", "weight")), "b"),
    ]
    texts = text_set("held_out", rows, (small, strict), 100)
    assert texts.spans.sizes == [0, len("weight")] and len(texts.spans.source) == 1
    assert "1 held_out texts have no bits per byte, the first because the chat template" in caplog.text
    assert text_set("held_out", rows, (small, large), 100).spans.sizes == [6, 6]


def test_a_text_that_is_not_nfc_is_left_out(pair):
    """A tokenizer that normalises puts a letter and its accent together, and one that does not ends a token between
    them: after the shared end the two models would have read different characters."""
    (_, small), _ = pair
    normal = make_tokenizer(500, 2)
    normal.backend_tokenizer.normalizer = normalizers.NFC()
    texts = ["model cafe\u0301 layer", "model caf\u00e9 layer"]
    rows = [Row(((None, text),), text) for text in texts]
    sizes = text_set("held_out", rows, (small, normal), 100).spans.sizes
    assert sizes[0] == 0 < sizes[1]
    assert bits_per_byte({"base": [1.0, 1.0]}, spans_of(sizes), "ab")["left_out"] == 1


def with_source(shift: float):
    """Made-up losses on bytes, and a source that is `shift` nats per byte from base, with noise."""
    per_text, tokens = made_up()
    noise = np.random.default_rng(4).normal(0, 0.02, 50)
    source = np.asarray(per_text["base"]) + (shift + noise) * np.asarray(tokens)
    return {**per_text, "self": per_text["base"], "source": source.tolist()}, tokens


def spans_of(sizes, answers=False):
    return ByteSpans(list(sizes), answers, [], [])


def test_an_arm_that_equals_base_closes_nothing_and_the_source_everything():
    per_text, sizes = with_source(-0.5)
    found = bits_per_byte(per_text, spans_of(sizes), range(50))
    arms = found["arms"]
    assert str(arms["self"]["closed"]) == "0.0" and percent(-1e-9) == "0.0 %" and arms["source"]["closed"] == 1
    assert arms["base"]["bits_per_byte"] == pytest.approx(3 / math.log(2))
    gap = sum(per_text["base"]) - sum(per_text["source"])
    assert arms["fused"]["closed"] == pytest.approx((sum(per_text["base"]) - sum(per_text["fused"])) / gap)
    assert arms["permuted"]["closed"] < 0


def test_texts_without_bytes_are_left_out_and_counted():
    per_text, sizes = with_source(-0.5)
    sizes = [0, 0, *sizes[2:]]
    found = bits_per_byte(per_text, spans_of(sizes), [n // 2 for n in range(50)])
    assert (found["texts"], found["left_out"], found["groups"], found["bytes"]) == (48, 2, 24, sum(sizes))
    assert found["arms"]["base"]["bits_per_byte"] == pytest.approx(sum(per_text["base"][2:]) / sum(sizes) / math.log(2))
    text = shown(per_text, sizes)
    assert "; 2 more have no span between shared token ends)" in text
    nothing = bits_per_byte(per_text, spans_of([0] * 50), range(50))
    assert nothing["arms"] == {} and "No bits per byte: " in shown(per_text, [0] * 50)
    assert "closed" not in shown(per_text, [0] * 50)


def shown(per_text, sizes, answers=False) -> str:
    tokens = made_up()[1]
    arms = statistics({arm: sums for arm, sums in per_text.items() if arm != "source"}, tokens, range(50))
    bits = bits_per_byte(per_text, spans_of(sizes, answers), range(50))
    return table(arms, counts(tokens, range(50), bits_per_byte=bits))


@pytest.mark.parametrize(("shift", "better"), [(-0.5, True), (0.5, False), (0.0, False)])
def test_a_share_is_given_only_where_the_source_is_shown_to_be_better(shift, better):
    per_text, sizes = with_source(shift)
    text = shown(per_text, sizes)
    (sentence,) = (line for line in text.splitlines() if line.startswith("In bits per byte"))
    assert f"of {sum(sizes)} bytes of 50 texts)" in sentence and ("fused closes " in sentence) == better
    assert ("the source is not shown to be better here, so no share of a gap is given" in sentence) != better
    rows = {line.split()[0]: line for line in text.splitlines() if line.split()[0] in per_text}
    assert rows["source"].split()[1:2] == [f"{(3 * sum(sizes) + diff(per_text)) / sum(sizes) / math.log(2):.4f}"]
    assert rows["self"].endswith("0.0 %") == better and rows["source"].endswith("100.0 %") == better
    assert "bytes of the answers in 50 texts" in shown(per_text, sizes, answers=True)


def diff(per_text) -> float:
    return sum(per_text["source"]) - sum(per_text["base"])
