"""Training itself: oracles in float64, and every option through the command for each kind of model."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_tokenizer, run_main
from safetensors.torch import load_file
from test_families import fuse_pair, logits, make, stock
from torch import nn

from core import train_hot_residual_sft as stage3
from core.adapters import add_lora, merge_lora
from core.checkpoints import open_checkpoint
from core.data import Row, load_rows
from core.distill import distillation_loss, read_answers, write_answers
from core.heldout import text_nll, trained_tokens
from core.hot_residual import HotResidualLinear, enable_hot_residual_for_model, set_trainable
from core.sft import sft_example
from core.start import open_start, save_folded

KINDS = {"llama": "llama", "qwen2": "qwen2", "qwen2_vl": "qwen2vl", "llava": "tinyllava"}


# Oracles: Eqs. 15-18


def unfolded(fused, hot=True, alpha=None):
    """The start of stage 3 in float64."""
    from core.experiment import Experiment

    start = open_start(str(fused), Experiment(training_scenario="hot"))
    model = start.load(False, 0.0).double()
    residuals = start.residuals
    if hot:
        residuals = [replace(r, weight=r.weight.double()) for r in residuals]
        enable_hot_residual_for_model(model, residuals, start.checkpoint.layout.name,
                                      start.alpha if alpha is None else alpha, start.form)  # fmt: skip
        set_trainable(model, "frozen_hot")
    return start, model


def descend(model, optimizer, steps):
    """Plain steps on fixed batches, the loss in float64."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(3, 400, (2, 12), generator=generator)
        logits = model(input_ids=ids).logits[:, :-1]
        optimizer.zero_grad()
        F.cross_entropy(logits.double().transpose(1, 2), ids[:, 1:]).backward()
        optimizer.step()


def test_alpha_zero_trains_as_the_target_alone(fused):
    weights = []
    for hot in (True, False):
        start, model = unfolded(fused, hot, 0.0)
        descend(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), 20)
        weights.append({n: v for n, v in model.state_dict().items() if "hot_" not in n})
    worst = max(float((weights[0][n] - weights[1][n]).abs().max()) for n in weights[1])
    assert weights[0].keys() == weights[1].keys() and worst <= 1e-12
    assert not torch.equal(weights[1]["lm_head.weight"], start.load(False, 0.0).double().lm_head.weight)


@pytest.mark.parametrize("way", ["beside", "through W_eff"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_interpolating_frozen_hot_is_training_from_the_folded_start(fused, kind, way, monkeypatch):
    """Their learning rates on fused weights times (1 - a)^2 for SGD, (1 - a) and epsilon / (1 - a) for Adam."""
    from core import hot_residual

    monkeypatch.setattr(hot_residual, "FOLD_FROM", (1e9, 1e9) if way == "beside" else (0, 0))
    start, model = unfolded(fused)
    kept = 1 - start.alpha
    assert 0 < start.alpha < 1 and start.form == "interpolate"
    hot = {n: m for n, m in model.named_modules() if isinstance(m, HotResidualLinear)}
    assert len(hot) == 12 and (way == "through W_eff" or not [m for m in hot.values() if setattr(m, "dense", False)])
    folded = start.load(False, 0.0).double()
    with torch.no_grad():
        for name, module in hot.items():
            folded.get_submodule(name).weight.copy_(module.effective_weight())
    fused_names = {f"{name}.weight" for name in hot}
    inside = [p for n, p in folded.named_parameters() if n in fused_names]
    outside = [p for n, p in folded.named_parameters() if n not in fused_names]
    ours = [p for p in model.parameters() if p.requires_grad]
    if kind == "sgd":
        optimizers = (torch.optim.SGD(ours, lr=0.1),
                      torch.optim.SGD([{"params": inside, "lr": 0.1 * kept**2}, {"params": outside}],
                                      lr=0.1))  # fmt: skip
    else:
        eps = 1e-3
        optimizers = (torch.optim.Adam(ours, lr=1e-2, eps=eps),
                      torch.optim.Adam([{"params": inside, "lr": 1e-2 * kept, "eps": eps / kept},
                                        {"params": outside}], lr=1e-2, eps=eps))  # fmt: skip
    descend(model, optimizers[0], 10)
    descend(folded, optimizers[1], 10)
    for name, parameter in folded.named_parameters():
        value = hot[name.removesuffix(".weight")].effective_weight() if name in fused_names else \
            dict(model.named_parameters())[name]  # fmt: skip
        assert float((value - parameter).detach().abs().max()) <= 1e-9, name
    start_weights = start.load(False, 0.0).state_dict()
    assert all((folded.state_dict()[n] - start_weights[n]).abs().max() > 1e-3 for n in fused_names)


def test_lora_is_merged_to_the_function_that_was_trained(fused):
    """Rows and columns, dense and selected, in float64; the residual stays, the base takes the adapter."""
    torch.manual_seed(0)
    _, model = unfolded(fused)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    assert add_lora(model, "model", 3, 16.0, 0.0, "all-linear") == 3 * 7
    counts = set_trainable(model, "frozen_hot", lora=True)
    assert counts["base"][0] == counts["residual"][0] == counts["adapters"][1] == 0 < counts["adapters"][0]
    model.double()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        merge_lora(model)
        merged = model(input_ids=ids).logits
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]) != (name.endswith("proj.weight")), name
    assert float((adapted - merged).abs().max()) <= 1e-9 * float(merged.abs().max())
    unadapted = unfolded(fused)[1](input_ids=ids).logits
    assert float((adapted - unadapted).detach().abs().max()) > 0.1


def test_fold_unfold_fold_is_stable_to_the_bit(fused, tmp_path):
    start, _ = unfolded(fused)
    state = start.load(True, start.alpha).state_dict()
    (tmp_path / "again").mkdir()
    save_folded(start, tmp_path / "again", state, True, start.alpha, 10**9)
    for name in ("model.safetensors", "hot_residual.safetensors"):
        a, b = (load_file(folder / name) for folder in (fused, tmp_path / "again"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_distillation_loss_is_the_divergence_over_labelled_positions():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, size, generator=generator).double() for size in (7, 9))
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, -100, -100, 2]])
    T, expected = 2.0, 0.0
    for b, s in ((0, 1), (0, 2), (1, 0), (1, 3)):
        p, q = (x[b, s, :7].div(T).softmax(-1) for x in (teacher, student))
        expected += T**2 * float((p * (p / q).log()).sum())
    assert float(distillation_loss(student, teacher, labels, T)) == pytest.approx(expected, rel=1e-5)


# Options through the command


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request, models, texts, tmp_path_factory):
    """(model kind, fused checkpoint of that kind, plain training of it)."""
    folder = tmp_path_factory.mktemp(request.param)
    target = make(request.param, folder / "own")
    _, out = fuse_pair(target, models["other"], texts, folder)
    return request.param, out, run(out, folder / "plain")


def run(fused, out, *flags):
    run_main(stage3, "--model_dir", fused, "--output_dir", out, "--sft-samples", 8, "--gradient-accumulation", 2,
             "--learning-rate", "1e-2", "--validation-samples", 4, *flags)  # fmt: skip
    return out


def losses(folder):
    return json.loads((folder / "manifest.json").read_text())["losses"]


def check_validation(folder):
    """The folder, as stock transformers loads it, has the validation loss that the end of training reported."""
    record = json.loads((folder / "manifest.json").read_text())
    tokenizer = open_checkpoint(str(folder)).load_tokenizer()
    texts = [sft_example(row, tokenizer, 2048) for row in load_rows("file", "validation", 4, 0, record["data"]["file"])]
    nll = sum(text_nll(stock(folder).float(), texts, 64, "x")) / sum(trained_tokens(texts))
    assert nll == pytest.approx(record["final_validation"], abs=2e-4)


def test_plain_training_ends_where_it_says(kind):
    check_validation(kind[2])


def test_gradient_checkpointing_changes_nothing_but_the_passes(kind, tmp_path, monkeypatch):
    from core.hot_residual import HotResidualLinear

    name, fused, plain = kind
    passes, forward = [], HotResidualLinear.forward
    monkeypatch.setattr(HotResidualLinear, "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    run(fused, tmp_path / "b")
    once = len(passes)
    out = run(fused, tmp_path / "a", "--gradient-checkpointing", "--model_type", KINDS[name])
    assert losses(out) == pytest.approx(losses(plain), abs=1e-5) and len(passes) > 2.5 * once
    torch.testing.assert_close(logits(stock(out)), logits(stock(plain)), atol=1e-4, rtol=1e-4)


def test_bfloat16_passes_and_float32_weights(kind, tmp_path):
    _, fused, plain = kind
    out = run(fused, tmp_path / "a", "--dtype", "bfloat16")
    assert losses(out) != losses(plain) and losses(out) == pytest.approx(losses(plain), abs=0.1)
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.float32}


def test_lora_trains_the_text_decoder_alone(kind, tmp_path):
    _, fused, _ = kind
    out = run(fused, tmp_path / "a", "--use-lora", "--lora-rank", 2, "--lora-dropout", "0.1", "--epochs", 3)
    check_validation(out)
    before, after = (load_file(folder / "model.safetensors") for folder in (fused, out))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    checkpoint = open_checkpoint(str(out))
    assert moved == {
        checkpoint.tensor_name(n, c) + ".weight" for n in range(checkpoint.layout.n_layers) for c in "qkvo"
    }


def test_packed_training_sees_every_token_once(kind, tmp_path):
    _, fused, plain = kind
    one = run(fused, tmp_path / "a", "--packing", "--block-size", 600)
    counts = json.loads((one / "manifest.json").read_text())["counts"]
    assert len(losses(one)) == 1 and counts["left_out"] == counts["cut"] == 0
    whole = run(fused, tmp_path / "b", "--gradient-accumulation", 8)
    assert losses(one) == pytest.approx(losses(whole), abs=1e-5)
    assert counts == json.loads((plain / "manifest.json").read_text())["counts"]


def test_sharded_save_is_the_same_model(kind, tmp_path):
    _, fused, plain = kind
    out = run(fused, tmp_path / "a", "--max-shard-size", "40KB")
    assert (out / "model.safetensors.index.json").is_file() and len(list(out.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(stock(out)), logits(stock(plain)))


def test_wrong_model_type_is_told(kind, fails, tmp_path):
    name, fused, _ = kind
    other = "llama" if name != "llama" else "qwen2"
    told = fails(stage3, "--model_dir", fused, "--output_dir", tmp_path / "a", "--model_type", other)
    assert f"--model_type {other}, but" in told and "leave the flag out" in told


@pytest.mark.parametrize("kind", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("flags", "kill_at"),
    [
        (["--use-lora", "--lora-dropout", "0.2", "--epochs", 3], 7),
        (["--epochs", 3], 12),  # after the last update
        (["--epochs", 3], 4),  # at the end of an epoch
        (["--epochs", "1.5"], 6),
        (["--early-stop", 1, "--epochs", 6, "--learning-rate", "0.3"], "stopped"),
    ],
)
def test_killed_anywhere_the_run_ends_the_same(kind, tmp_path, monkeypatch, flags, kill_at):
    """The curve, the validations and the weights, to the bit."""
    from transformers import TrainerCallback

    from core import trainer as module

    _, fused, _ = kind
    flags = [*flags, "--save-steps", 1]
    whole = run(fused, tmp_path / "whole", *flags)

    class Kill(TrainerCallback):
        def on_save(self, args, state, control, **_):
            if state.global_step == kill_at or (kill_at == "stopped" and control.should_training_stop):
                raise KeyboardInterrupt

    original = module.ExactTrainer.__init__

    def with_kill(trainer, *arguments, **options):
        original(trainer, *arguments, **options)
        trainer.add_callback(Kill())

    with monkeypatch.context() as patch:
        patch.setattr(module.ExactTrainer, "__init__", with_kill)
        with pytest.raises(KeyboardInterrupt):
            run(fused, tmp_path / "part", *flags)
    points = list((tmp_path / "part/checkpoints/trial0").glob("checkpoint-*"))
    assert points and not (tmp_path / "part/loss_curve.json").exists()
    part = run(fused, tmp_path / "part", *flags)
    for name in ("loss_curve.json", "hot_residual.safetensors", "model.safetensors"):
        assert (whole / name).read_bytes() == (part / name).read_bytes(), name


# The source as teacher


def test_distillation_by_tokens_where_vocabularies_agree(fused, models, texts, tmp_path):
    """The teacher is the target itself: its divergence is 0 at first; with weight 1 nothing is learned."""
    flags = ("--training-scenario", "distill", "--data-file", texts, "--source-model", models["target"])
    learned = run(models["target"], tmp_path / "a", *flags, "--distill-weight", "0")
    plain = run(models["target"], tmp_path / "b", "--training-scenario", "no_hot", "--data-file", texts)
    assert losses(learned) == losses(plain) and torch.equal(logits(stock(learned)), logits(stock(plain)))
    still = run(models["target"], tmp_path / "c", *flags, "--distill-weight", "1", "--packing")
    assert max(losses(still)) < 1e-5
    other = run(models["target"], tmp_path / "d", "--training-scenario", "distill", "--data-file", texts,
                "--source-model", models["other"], "--distill-weight", "1", "--epochs", 4)  # fmt: skip
    assert 0 < losses(other)[-1] < losses(other)[0]
    assert "token-level" in (other / "README.md").read_text() and "as teacher" in (other / "README.md").read_text()
    assert not (other / "hot_residual.safetensors").exists() and not (other / "source_answers.jsonl").exists()


def test_distillation_by_sequences_where_they_differ(fused, models, tmp_path):
    out = run(fused, tmp_path / "a", "--training-scenario", "distill")
    record = json.loads((out / "manifest.json").read_text())
    assert record["distillation"].startswith("sequence-level") and not (out / "hot_residual.safetensors").exists()
    rows = load_rows("file", "sft", 8, 0, record["data"]["file"])
    lines = [json.loads(line) for line in (out / "source_answers.jsonl").read_text().splitlines()]
    answers = {n: a for line in lines for n, a in zip(line["rows"], line["answers"], strict=True)}
    assert sorted(answers) == list(range(8))
    source = open_checkpoint(str(models["source"]))
    tokenizer, model = source.load_tokenizer(), source.load_model("float32")
    for n, row in enumerate(rows):  # greedy, one by one
        ids = tokenizer(row.plain)["input_ids"]
        prompt = torch.tensor([ids[: len(ids) // 2]])
        new = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                             max_new_tokens=len(ids) - len(ids) // 2,
                             pad_token_id=tokenizer.pad_token_id)[0, prompt.shape[1] :]  # fmt: skip
        whole = tokenizer.decode([*prompt[0].tolist(), *new.tolist()], skip_special_tokens=True)
        kept = tokenizer.decode(prompt[0], skip_special_tokens=True)
        assert answers[n] == kept + whole.removeprefix(kept) and row.plain.startswith(kept)
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
    for row, answered in zip(rows[:-1], whole, strict=False):  # greedy, one by one, no longer than the row's own
        assert answered.messages[:-1] == row.messages[:-1] and answered.messages[-1][0] == "assistant"
        prompt = tokenizer.apply_chat_template(row.chat()[:1], add_generation_prompt=True, return_tensors="pt",
                                               return_dict=False)  # fmt: skip
        size = len(tokenizer(row.messages[-1][1], add_special_tokens=False)["input_ids"]) + 1
        new = generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=size, do_sample=False,
                       pad_token_id=tokenizer.pad_token_id)  # fmt: skip
        assert answered.messages[-1][1] == tokenizer.decode(new[0, prompt.shape[1] :], skip_special_tokens=True)


def test_prompts_are_not_cut_inside_a_character(models):
    """Byte-level tokens: half of the text may end in the middle of a letter, which decodes to nothing."""
    from core.distill import _prompt, _text_after

    tokenizer = open_checkpoint(str(models["target"])).load_tokenizer()
    whole = "ประเทศไทย 香港 🙂 weight matrix " * 2
    for end in range(2, len(whole)):
        row = Row(((None, whole[:end].strip()),))
        ids, length, kept = _prompt(row, tokenizer, 100)
        rest = tokenizer(row.plain)["input_ids"][len(ids) :]
        assert len(rest) == length or len(rest) > length > 0
        assert kept + _text_after(tokenizer, ids, rest) == row.plain, end


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
    done = torchrun(ROOT / "core/train_hot_residual_sft.py", *flags, "--output_dir", tmp_path / "two",
                    "--gradient-accumulation", 1)  # fmt: skip
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
from core.experiment import Experiment
from core.hot_residual import set_trainable
from core.start import open_start
torch.manual_seed(0)
dist.init_process_group("gloo")
start = open_start(sys.argv[3], Experiment())
ids = torch.arange(24).reshape(2, 12) + 5
grads = []
for sharded in (False, True):
    model = start.load(True, 0.3)
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


def test_two_processes_share_the_answers_of_the_source(fused, tmp_path):
    flags = ["--model_dir", fused, "--sft-samples", 8, "--training-scenario", "distill", "--validation-samples", 0]
    run_main(stage3, *flags, "--output_dir", tmp_path / "one", "--gradient-accumulation", 2)
    torchrun(ROOT / "core/train_hot_residual_sft.py", *flags, "--output_dir", tmp_path / "two",
             "--gradient-accumulation", 1)  # fmt: skip
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


def test_tokenizer_of_the_pico_models_agrees_with_itself():
    from core.distill import same_vocabulary

    small, large = make_tokenizer(400, 1), make_tokenizer(500, 2)
    assert same_vocabulary(small, make_tokenizer(400, 1)) and not same_vocabulary(small, large)
