"""The source as teacher, and training in several processes."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_tokenizer, run_main
from family_models import logits, stock
from stages import losses, run

from core import train_hot_residual_sft as stage3
from core.data import DataSpec, Row, load_rows
from core.models.checkpoints import open_checkpoint
from core.training.distill import (
    _prompt,
    _text_after,
    distillation_loss,
    read_answers,
    same_vocabulary,
    write_answers,
)


def test_distillation_loss_is_the_divergence_over_labelled_positions():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, size, generator=generator).double() for size in (7, 9))
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, -100, -100, 2]])
    T, expected = 2.0, 0.0
    for b, s in ((0, 1), (0, 2), (1, 0), (1, 3)):
        p, q = (x[b, s, :7].div(T).softmax(-1) for x in (teacher, student))
        expected += T**2 * float((p * (p / q).log()).sum())
    assert float(distillation_loss(student, teacher, labels, T)) == pytest.approx(expected, rel=1e-5)


def greedy(generate, prompt, length, tokenizer):
    """The ids that a model writes greedily after one prompt [1, S], without a batch and without padding."""
    options = {"max_new_tokens": length, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    return generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :]


# The source as teacher


def test_distillation_by_tokens_where_vocabularies_agree(fused, models, texts, tmp_path):
    """The teacher is the target itself: its divergence is 0 at first; with weight 1 nothing is learned."""
    flags = ("--training-scenario", "distill", "--data-file", texts, "--source-model", models["target"])
    learned = run(models["target"], tmp_path / "a", *flags, "--distill-weight", "0")
    plain = run(models["target"], tmp_path / "b", "--training-scenario", "no_hot", "--data-file", texts)
    assert losses(learned) == losses(plain) and torch.equal(logits(stock(learned)), logits(stock(plain)))
    still = run(models["target"], tmp_path / "c", *flags, "--distill-weight", "1", "--packing")
    assert max(losses(still)) < 1e-5
    flags = ("--training-scenario", "distill", "--data-file", texts, "--source-model", models["other"])
    other = run(models["target"], tmp_path / "d", *flags, "--distill-weight", "1", "--epochs", 4)
    assert 0 < losses(other)[-1] < losses(other)[0]
    assert "token-level" in (other / "README.md").read_text() and "as teacher" in (other / "README.md").read_text()
    assert not (other / "hot_residual.safetensors").exists() and not (other / "source_answers.jsonl").exists()


def test_distillation_by_answers(fused, models, tmp_path):
    out = run(fused, tmp_path / "a", "--training-scenario", "distill", "--distill-by", "answers")
    record = json.loads((out / "manifest.json").read_text())
    assert record["distillation"].startswith("sequence-level") and not (out / "hot_residual.safetensors").exists()
    rows = load_rows(DataSpec("file", record["data"]["file"]), "sft", 8)
    lines = [json.loads(line) for line in (out / "source_answers.jsonl").read_text().splitlines()]
    answers = {n: a for line in lines for n, a in zip(line["rows"], line["answers"], strict=True)}
    assert sorted(answers) == list(range(8))
    source = open_checkpoint(str(models["source"]))
    tokenizer, model = source.load_tokenizer(), source.load_model("float32")
    for n, row in enumerate(rows):
        ids = tokenizer(row.plain)["input_ids"]
        prompt = torch.tensor([ids[: len(ids) // 2]])
        new = greedy(model.generate, prompt, len(ids) - len(ids) // 2, tokenizer)
        whole = tokenizer.decode([*prompt[0].tolist(), *new.tolist()], skip_special_tokens=True)
        start = tokenizer.decode(prompt[0], skip_special_tokens=True)
        assert answers[n] == start + whole.removeprefix(start) and row.plain.startswith(start)
    assert losses(out) != losses(run(fused, tmp_path / "b", "--training-scenario", "no_hot"))


def test_killed_teacher_goes_on_after_the_last_whole_batch(models, tmp_path):
    source = open_checkpoint(str(models["source"]))
    tokenizer, model = source.load_tokenizer(), source.load_model("float32")
    rows = [Row((("user", "plan"), ("assistant", "weight matrix " * n))) for n in range(1, 7)]
    rows.append(Row((("user", "a question alone"),)))
    path = tmp_path / "answers.jsonl"
    write_answers(rows, model, tokenizer, path, 64, 32)
    whole = read_answers(rows, path)
    text = path.read_text()
    assert text.count("\n") > 2 and whole[-1] == rows[-1]
    path.write_text(text[: len(text) - 20])
    asked = []
    generate = model.generate
    model.generate = lambda **options: asked.append(1) or generate(**options)
    write_answers(rows, model, tokenizer, path, 64, 32)
    assert read_answers(rows, path) == whole and asked == [1] and path.read_text() == text
    odd = "one\u2028two\u0085three\n"  # what str.splitlines would break
    path.write_text(json.dumps({"rows": [0], "answers": [odd]}, ensure_ascii=False) + "\n", "utf-8")
    assert read_answers(rows, path)[0].messages[-1][1] == odd
    for row, answered in zip(rows[:-1], whole, strict=False):  # no answer is longer than the row's own
        assert answered.messages[:-1] == row.messages[:-1] and answered.messages[-1][0] == "assistant"
        prompt = tokenizer.apply_chat_template(
            row.chat()[:1], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        size = len(tokenizer(row.messages[-1][1], add_special_tokens=False)["input_ids"]) + 1
        new = greedy(generate, prompt, size, tokenizer)
        assert answered.messages[-1][1] == tokenizer.decode(new, skip_special_tokens=True)


def test_prompts_are_not_cut_inside_a_character(models):
    """With byte-level tokens half of the text may end in the middle of a letter, which decodes to nothing."""
    tokenizer = open_checkpoint(str(models["target"])).load_tokenizer()
    whole = "ประเทศไทย 香港 🙂 weight matrix " * 2
    for end in range(2, len(whole)):
        row = Row(((None, whole[:end].strip()),))
        prompt = _prompt(row, tokenizer, 10**4)
        rest = tokenizer(row.plain)["input_ids"][len(prompt.ids) :]
        assert len(rest) == prompt.new_tokens
        assert prompt.text + _text_after(tokenizer, prompt.ids, rest) == row.plain, end


# Several processes


def torchrun(script, *arguments):
    """Two processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run([str(part) for part in (*command, *arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_two_processes_are_one_with_twice_the_accumulation(fused, tmp_path):
    flags = ["--model_dir", fused, "--sft-samples", 8, "--learning-rate", "1e-2", "--validation-samples", 4]
    run_main(stage3, *flags, "--output_dir", tmp_path / "one", "--gradient-accumulation", 2)
    done = torchrun(
        ROOT / "core/train_hot_residual_sft.py", *flags, "--output_dir", tmp_path / "two", "--gradient-accumulation", 1
    )
    assert done.stderr.count("of them with loss") == 4  # both processes: training and validation rows
    one, two = (json.loads((tmp_path / name / "loss_curve.json").read_text()) for name in ("one", "two"))
    for part in ("train", "validation"):
        assert len(one[part]) == len(two[part]) > 1
        for a, b in zip(one[part], two[part], strict=True):
            assert a["update"] == b["update"] and a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    torch.testing.assert_close(logits(stock(tmp_path / "one")), logits(stock(tmp_path / "two")), atol=1e-3, rtol=1e-3)


SHARDED = """
import sys, torch, torch.distributed as dist
sys.path[:0] = sys.argv[1:3]
from torch.distributed.fsdp import fully_shard
from core.training.hot_linear import set_trainable
from core.training.start import open_start
torch.manual_seed(0)
dist.init_process_group("gloo")
start = open_start(sys.argv[3])
ids = torch.arange(24).reshape(2, 12) + 5
grads = []
for sharded in (False, True):
    model = start.load(0.3)
    set_trainable(model, "none")
    if sharded:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    model(input_ids=ids, labels=ids).loss.backward()
    grads.append({n: p.grad.full_tensor() if sharded else p.grad for n, p in model.named_parameters()})
assert grads[0].keys() == grads[1].keys() and any("hot_weight" in n for n in grads[0])
for name, grad in grads[0].items():
    torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-4)
print("equal")
"""


def test_sharded_parameters_give_the_same_gradients(fused, tmp_path):
    """torch's own FSDP2 around the residual layers, two processes."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    assert torchrun(script, ROOT, ROOT / "tests", fused).stdout.count("equal") == 2


def test_answers_are_given_between_models_of_one_vocabulary_too(models, texts, tmp_path):
    flags = ("--training-scenario", "distill", "--data-file", texts, "--source-model", models["other"])
    out = run(models["target"], tmp_path / "a", *flags, "--distill-by", "answers")
    assert (out / "source_answers.jsonl").is_file()
    assert json.loads((out / "manifest.json").read_text())["distillation"].startswith("sequence-level")


@pytest.mark.parametrize("by", ["tokens", "answers"])
def test_two_processes_share_what_the_source_teaches(by, fused, tmp_path):
    flags = ["--model_dir", fused, "--sft-samples", 8, "--training-scenario", "distill", "--validation-samples", 0]
    flags += ["--distill-by", by]
    run_main(stage3, *flags, "--output_dir", tmp_path / "one", "--gradient-accumulation", 2)
    torchrun(
        ROOT / "core/train_hot_residual_sft.py", *flags, "--output_dir", tmp_path / "two", "--gradient-accumulation", 1
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


def test_same_vocabulary_compares_ids_and_tokens():
    small, large = make_tokenizer(400, 1), make_tokenizer(500, 2)
    assert same_vocabulary(small, make_tokenizer(400, 1)) and not same_vocabulary(small, large)
