"""Distillation by tokens across vocabularies: positions, distributions, loss against slow references; the command."""

import json
import math

import pytest
import torch
from conftest import make_tokenizer
from family_models import logits, stock
from safetensors.torch import load_file
from stages import digests, killed, losses, run
from test_token_map import bytes_of, slowly_mapped
from tokenizers.processors import TemplateProcessing

from core import train_hot_residual_sft as stage3
from core.data import Row
from core.errors import UserError
from core.models.checkpoints import open_checkpoint
from core.training import soft_targets
from core.training.settings import DistillSettings
from core.training.sft import IGNORED, NO_TARGET, SOFT_TARGETS, sft_example
from core.training.soft_targets import StoredTeacher, lesson_of, mapped, read_lessons, write_targets
from core.training.teaching import TARGETS
from core.training.token_map import UNMAPPED, first_token_map

DISTILL = ("--training-scenario", "distill")
SETTINGS = DistillSettings()
TEXT = "plan naïve ภาษา 語言 weight matrix of the model 12 x=1 f(x) transport café 🙂"
CHAT = (("user", "plan the matrix"), ("assistant", TEXT), ("user", "and"), ("assistant", "keeps a row, ภาษา"))
GENERATION = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<|end|>{% endfor %}"
)
LINES = None  # no template


@pytest.fixture
def pair(models):
    """(target's tokenizer, source's tokenizer, source's model)."""
    target, source = (open_checkpoint(str(models[name])) for name in ("target", "source"))
    return target.load_tokenizer(), source.load_tokenizer(), source.load_model("float32")


def read_bytes(tokenizer, ids):
    """The bytes that a model has read after each token. Special tokens are read as their names."""
    read, after = b"", []
    for token in ids:
        name = tokenizer.convert_ids_to_tokens(token)
        read += name.encode() if name in ("<|end|>", "<|user|>", "<|assistant|>") else bytes_of(tokenizer, token)
        after.append(read)
    return after


def whole(read):
    try:
        return bool(read.decode("utf-8"))
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("template", ["own", GENERATION, LINES], ids=["template", "generation", "lines"])
@pytest.mark.parametrize("messages", [((None, TEXT),), CHAT], ids=["text", "chat"])
@pytest.mark.parametrize("block_size", [1000, 30])
def test_the_source_teaches_where_both_have_read_the_same_bytes_and_a_text_token_has_a_loss(
    messages, template, block_size, pair
):
    """Every pair of positions is compared, by the bytes that were read up to there."""
    target, source, _ = pair
    if template != "own":
        target.chat_template = template
    source.chat_template = "{{ raise_exception('the source reads no template of its own') }}"
    row = Row(messages)
    example, lesson = sft_example(row, target, block_size), lesson_of(row, target, source, block_size)
    assert lesson.length == len(example["input_ids"])
    own = read_bytes(target, example["input_ids"])
    other = read_bytes(source, source(row.render(target)[0])["input_ids"])
    specials = set(target.all_special_ids) | {target.convert_tokens_to_ids("<|user|>")}
    expected = [
        (t, s)
        for t, read in enumerate(own[:-1])
        for s, other_read in enumerate(other)
        if t and s and read == other_read and whole(read) and example["labels"][t + 1] not in {IGNORED, *specials}
    ]
    assert list(zip(lesson.positions, lesson.picks, strict=True)) == expected and len(expected) > 3
    assert len(lesson.ids) == lesson.picks[-1] + 1


@pytest.mark.parametrize("starts", [TEXT, "<|end|>" + TEXT])
def test_a_source_that_begins_its_texts_with_a_token_reads_it_once(starts, pair):
    target, source, _ = pair
    row = Row(((None, starts),))
    without = lesson_of(row, target, source, 1000)
    begin = source.convert_tokens_to_ids("<|end|>")
    source.bos_token = "<|end|>"
    source.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", begin)]
    )
    lesson, added = lesson_of(row, target, source, 1000), starts == TEXT
    assert lesson.ids == ([begin] if added else []) + without.ids and lesson.ids.count(begin) == 1
    assert lesson.positions == without.positions and lesson.picks == [pick + added for pick in without.picks]


def test_ids_that_no_token_has_take_no_part(pair, tmp_path):
    """Models round their vocabulary up, and the weights of what they add are never trained."""
    target, source, model = pair
    lessons = read_lessons([Row(((None, TEXT),))], target, source, 100, 4096)
    to_target = first_token_map(source, target)[:500]
    write_targets(lessons, lambda: model, to_target, tmp_path / "a", 1.0)
    model.resize_token_embeddings(512)
    with torch.no_grad():
        model.lm_head.weight[500:] = model.lm_head.weight[:12] * 3
    write_targets(lessons, lambda: model, to_target, tmp_path / "b", 1.0)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_row_of_which_nothing_is_taught_is_not_read(pair):
    target, source, _ = pair
    question = Row((("user", "plan"),))
    rows = [question, Row(((None, TEXT),)), Row(((None, "plan"),))]
    lessons = read_lessons(rows, target, source, 1000, 4096)
    assert lessons.batches == [[1]] and lessons.rows[0].ids == []
    assert set(lessons.numbers()[0]) == {NO_TARGET} and max(lessons.numbers()[1]) == lessons.starts[-1] - 1
    with pytest.raises(UserError, match=r"in none of the 1 rows .* --distill-by answers"):
        read_lessons(rows[:1], target, source, 1000, 4096)


def slowly_expected(model, lesson, pick, to_target, temperature=1.0):
    """The target's next-token distribution after one token of the source: {token: probability}, or None."""
    with torch.no_grad():
        last = model(torch.tensor([lesson.ids[: pick + 1]])).logits[0, -1].double()
    probabilities = (last / temperature).softmax(-1).tolist()
    likeliest = sorted(range(len(probabilities)), key=lambda n: -probabilities[n])[:50]
    found = {}
    for token in likeliest:
        if to_target[token] != UNMAPPED:
            found[to_target[token]] = found.get(to_target[token], 0.0) + probabilities[token]
    mass = sum(found.values())
    return {token: p / mass for token, p in found.items()} if mass >= 0.3 else None


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_stored_distributions_against_one_position_at_a_time(temperature, pair, tmp_path):
    target, source, model = pair
    rows = [Row(((None, f"{n} {TEXT} {'transport ' * n}"),)) for n in range(5)] + [Row(CHAT)]
    lessons = read_lessons(rows, target, source, 100, 90)
    assert len(lessons.batches) > 2
    write_targets(lessons, lambda: model, first_token_map(source, target), tmp_path, temperature)
    teacher = StoredTeacher.read(tmp_path, lessons, SETTINGS)
    slow, taught = slowly_mapped(source, target), 0
    for row, lesson, numbers in zip(rows, lessons.rows, lessons.numbers(), strict=True):
        assert len(numbers) == len(sft_example(row, target, 100)["labels"])
        assert [t for t, number in enumerate(numbers) if number != NO_TARGET] == lesson.positions
        ids, probabilities = teacher.distributions(torch.tensor([numbers[t] for t in lesson.positions]))
        for k, pick in enumerate(lesson.picks):
            found = {}
            for token, p in zip(ids[k].tolist(), probabilities[k].tolist(), strict=True):
                found[token] = found.get(token, 0.0) + p
            expected = slowly_expected(model, lesson, pick, slow, temperature)
            taught += expected is not None
            assert {t: p for t, p in found.items() if p} == pytest.approx(expected or {}, abs=1e-5)
    assert teacher.taught == taught > 20


def test_equal_vocabularies_give_the_source_s_own_likeliest_tokens(models, tmp_path):
    """Through the map as without it: the 50 likeliest tokens, scaled to 1, at every position but the first."""
    checkpoint = open_checkpoint(str(models["other"]))
    tokenizer, model = checkpoint.load_tokenizer(), checkpoint.load_model("float32")
    rows = [Row(((None, "weight matrix of the model keeps a row and a column"),))]
    lessons = read_lessons(rows, tokenizer, make_tokenizer(400, 1), 100, 4096)
    write_targets(lessons, lambda: model, first_token_map(make_tokenizer(400, 1), tokenizer), tmp_path, 1.0)
    teacher = StoredTeacher.read(tmp_path, lessons, SETTINGS)
    ids = tokenizer(rows[0].plain)["input_ids"]
    assert lessons.rows[0].positions == list(range(1, len(ids) - 1))
    found, probabilities = teacher.distributions(torch.arange(len(ids) - 2))
    with torch.no_grad():
        direct = model(torch.tensor([ids])).logits[0, 1:-1].softmax(-1).topk(50)
    dense, expected = torch.zeros(2, len(ids) - 2, 400)
    # Mass below the threshold would leave a row of zeros; a random model is far from that sure of nothing.
    dense.scatter_add_(1, found, probabilities)
    expected.scatter_(1, direct.indices, direct.values / direct.values.sum(-1, keepdim=True))
    torch.testing.assert_close(dense, expected, atol=1e-6, rtol=1e-5)


def test_too_little_mass_is_no_teacher():
    to_target = torch.tensor([7, UNMAPPED, 3, UNMAPPED])
    tokens = torch.tensor([[0, 1, 2], [0, 1, 2], [1, 3, 1], [0, 1, 3]])
    probabilities = torch.tensor([[0.1, 0.5, 0.2], [0.1, 0.5, 0.19], [0.5, 0.2, 0.1], [0.3, 0.6, 0.05]])
    ids, found = mapped(probabilities, tokens, to_target)
    torch.testing.assert_close(found[0], torch.tensor([1 / 3, 0, 2 / 3]))
    assert found[1].tolist() == found[2].tolist() == [0, 0, 0] and found[3].tolist() == [1, 0, 0]
    assert ids[0].tolist() == [7, 0, 3] and ids.min() == 0


def test_the_loss_counts_the_teacher_where_there_is_one():
    """Against a loop in float64. Numbers 1 and 4 are of positions without enough mass, and one id stands twice."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (5, 4), generator=generator, dtype=torch.int32)
    ids[0, 1] = ids[0, 0]
    probabilities = torch.rand(5, 4, generator=generator).softmax(-1)
    probabilities[[1, 4]] = 0
    settings = DistillSettings(distill_weight=0.3, distill_temperature=2.0)
    teacher = StoredTeacher([0, 2, 5], list(ids.split([2, 3])), list(probabilities.split([2, 3])), settings)
    logits = torch.randn(2, 4, 9, generator=generator)
    labels = torch.tensor([[IGNORED, 5, 1, 2], [IGNORED, IGNORED, 8, 0]])
    numbers = torch.tensor([[-1, 3, 0, -1], [-1, 1, 2, -1]])
    total, expected = 0.0, 0.0
    for b in range(2):
        for s in range(3):
            own = logits[b, s].double()
            if (label := int(labels[b, s + 1])) == IGNORED:
                continue
            to_label = -float(own.log_softmax(-1)[label])
            total += to_label
            n = int(numbers[b, s])
            if n in (0, 2, 3):
                soft = (own / 2).log_softmax(-1)
                to_teacher = -sum(float(p * soft[t]) for t, p in zip(ids[n], probabilities[n].double(), strict=True))
                expected += 0.7 * to_label + 0.3 * 4 * to_teacher
            else:
                expected += to_label
    batch = {"labels": labels, SOFT_TARGETS: numbers}
    assert float(teacher.joined(torch.tensor(total), logits, batch)) == pytest.approx(expected, rel=1e-5)
    alone = {"labels": labels, SOFT_TARGETS: torch.full_like(numbers, NO_TARGET)}
    assert float(teacher.joined(torch.tensor(total), logits, alone)) == pytest.approx(total)


def test_numbers_that_are_not_finite_are_an_error(pair, tmp_path):
    target, source, model = pair
    lessons = read_lessons([Row(((None, TEXT),))], target, source, 100, 4096)
    with torch.no_grad():
        model.lm_head.weight[3] = math.inf
    with pytest.raises(UserError, match="next-token distribution is not finite"):
        write_targets(lessons, lambda: model, first_token_map(source, target), tmp_path, 1.0)
    assert not list(tmp_path.iterdir())


def test_a_killed_teacher_goes_on_with_the_batches_that_are_missing(pair, tmp_path):
    target, source, model = pair
    rows = [Row(((None, f"{n} {TEXT}"),)) for n in range(6)]
    lessons, to_target = read_lessons(rows, target, source, 100, 40), first_token_map(source, target)
    write_targets(lessons, lambda: model, to_target, tmp_path / "whole", 1.0)
    forward, passes = model.forward, []

    def dies(**inputs):
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return forward(**inputs)

    model.forward = dies
    with pytest.raises(KeyboardInterrupt):
        write_targets(lessons, lambda: model, to_target, tmp_path / "killed", 1.0)
    assert len(list((tmp_path / "killed").iterdir())) == 2
    write_targets(lessons, lambda: model, to_target, tmp_path / "killed", 1.0)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole") and len(passes) == len(lessons.batches) + 1
    write_targets(lessons, lambda: pytest.fail("nothing is missing"), to_target, tmp_path / "killed", 1.0)


# The command


def test_the_source_teaches_by_tokens_where_vocabularies_differ(fused, tmp_path):
    out = run(fused, tmp_path / "a", *DISTILL)
    method = json.loads((out / "manifest.json").read_text())["distillation"]
    assert method.startswith("token-level across vocabularies: at ") and "0.5 of it" in method
    assert method.split(",")[0] in (out / "README.md").read_text()
    left = {path.name for path in out.iterdir()}
    assert not left & {TARGETS, "source_answers.jsonl", "hot_residual.safetensors", "checkpoints"}
    plain = run(fused, tmp_path / "plain", "--training-scenario", "no_hot")
    zero = run(fused, tmp_path / "zero", *DISTILL, "--distill-weight", "0")
    assert losses(zero) == losses(plain) and torch.equal(logits(stock(zero)), logits(stock(plain)))
    softer = run(fused, tmp_path / "softer", *DISTILL, "--distill-temperature", "2")
    assert len({tuple(losses(folder)) for folder in (out, plain, softer)}) == 3
    learned = run(fused, tmp_path / "more", *DISTILL, "--distill-weight", "1", "--epochs", "6")
    assert losses(learned)[-1] < losses(learned)[0]


def test_packing_changes_no_loss(fused, tmp_path):
    packed = run(fused, tmp_path / "a", *DISTILL, "--packing", "--block-size", "600")
    whole = run(fused, tmp_path / "b", *DISTILL, "--gradient-accumulation", "8")
    batch = run(fused, tmp_path / "c", *DISTILL, "--train-batch-size", "8", "--gradient-accumulation", "1")
    assert len(losses(packed)) == 1
    assert losses(packed) == pytest.approx(losses(whole), abs=1e-5)
    assert losses(batch) == pytest.approx(losses(whole), abs=1e-5)


def test_conversations_are_taught_too(models, tmp_path):
    chats = tmp_path / "chats.jsonl"
    rows = [{"question": f"plan {n}", "answer": f"{n} weight matrix of the model {n}"} for n in range(60)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (*DISTILL, "--data-subset", "file", "--data-file", chats, "--source-model", models["source"])
    out = run(models["target"], tmp_path / "a", *flags)
    assert json.loads((out / "manifest.json").read_text())["distillation"].startswith("token-level across")


def test_a_killed_training_ends_with_the_same_bytes(fused, tmp_path, monkeypatch):
    flags = (*DISTILL, "--tokens-per-batch", "40", "--save-steps", "1")
    whole = run(fused, tmp_path / "whole", *flags)
    write, written = soft_targets.write_safetensors, []

    def dies(path, tensors):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(soft_targets, "write_safetensors", dies)
        with pytest.raises(KeyboardInterrupt):
            run(fused, tmp_path / "again", *flags)
    assert len(list((tmp_path / "again" / TARGETS).iterdir())) == 2
    with killed(monkeypatch, "on_step_end", lambda state, _: state.global_step == 2):
        run(fused, tmp_path / "again", *flags)
    assert len(list((tmp_path / "again" / TARGETS).iterdir())) > 2
    again = run(fused, tmp_path / "again", *flags)
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert losses(again) == losses(whole) and all(torch.equal(one[name], two[name]) for name in one)
    assert digests(whole)["model.safetensors"] == digests(again)["model.safetensors"]


def test_rows_that_share_no_position_are_reported(models, fails, tmp_path):
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"text": letter, "group": letter}) + "\n" for letter in "abcdefghijklmnopqrst"))
    flags = ("--data-subset", "file", "--data-file", path, "--source-model", models["source"])
    flags = ("--model_dir", models["target"], *flags, *DISTILL, "--block-size", "2", "--output_dir", tmp_path / "a")
    assert "the source cannot teach by tokens; give longer rows, or --distill-by answers" in fails(stage3, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--distill-by", "words"), "invalid choice: 'words'"),
        (("--distill-weight", "1.5"), "distill_weight is 1.5; expected a number from 0 to 1"),
    ],
)
def test_bad_settings_of_the_teacher_are_reported(flags, message, fused, fails, tmp_path, capfd):
    assert message in fails(stage3, "--model_dir", fused, "--output_dir", tmp_path / "a", *DISTILL, *flags)
