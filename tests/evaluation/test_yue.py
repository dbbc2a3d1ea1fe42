"""Yue-MMLU: which option a prediction chooses; accuracies and prompts as published."""

import csv
import json
import shutil

import pytest
from conftest import SHARED_DATA, run_main

from core.errors import UserError
from evaluation import evaluate_cmmlu_yue as evaluate
from evaluation.benchmarks.yue_answers import choose, options_shown, read_answers
from evaluation.benchmarks.yue_mmlu import CATEGORIES, NAMES, Question, prompt, read_questions

PREDICTIONS = SHARED_DATA / "eval/yue_benchmark_predictions"
QUESTIONS = SHARED_DATA / "eval/yue_benchmark/Yue-MMLU"
published = pytest.mark.skipif(not PREDICTIONS.is_dir(), reason="the public data folder is not on this machine")
OTHER_EXAMPLES = {
    ("high_school_geography", 5): [54],
    ("logical", 5): [85, 93],
    ("security_study", 5): [32, 85, 86, 87, 88, 89],
}
PROMPT = "問題：邊個\nA. 蔡元培\nB. 黃遵憲\nC. 胡適\nD. 梁啟超\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("D. 梁啟超", ("D", 1)),
        (" b ", ("B", 1)),
        ("答案係B", ("B", 1)),
        ("", (None, None)),
        (" \n", ("A", 8)),  # white space alone is an answer that resembles no option
        ("因此A錯\n答案\n是 C", ("C", 2)),
        ("因此A錯答案是 \n 甲 d", ("D", 2)),  # white space and other text may stand between 是 and the letter
        ("結論係B，A錯", ("A", 8)),  # 結論 alone is a conclusion, but no answer word follows
        ("結論是字母是C，唔係A", ("C", 2)),
        ("所以答案是 c，唔係 d", ("C", 2)),
        ("A唔啱。所以" + "一" * 20 + "答案是 B 唔係 C", ("B", 2)),
        ("A唔啱。所以" + "一" * 21 + "答案, B 唔係 C", ("B", 6)),
        ("我揀字母為" + "一" * 10 + "B, C", ("B", 5)),
        ("我揀字母為BA, C", ("A", 5)),  # the first letter that ends a word
        ("我揀選項為" + "BA, C", ("C", 6)),  # 選項 is not among the words, 选项 is
        ("所以答案是C類，即是 B", ("B", 2)),  # C does not end a word; the next 是 is within reach
        ("a B\tc答案: d, not a", ("D", 3)),
        ("x\n答案为b。 a", ("B", 3)),
        ("The correct 答案: d, not a", ("D", 5)),  # rule 3 allows no letters but A to D before it
        ("A: x。選擇是 C", ("C", 3)),
        ("B是 x C", ("B", 4)),
        ("x。A。 C", ("A", 4)),
        ("x。 \tA \n。 C", ("A", 4)),
        ("x。a。 C d", ("C", 6)),  # case matters in rules 4 and 6
        ("我話答案: C, A", ("C", 5)),
        ("我話答案：C, A", ("C", 6)),  # a full-width colon does not count
        ("我話答案: c, A", ("C", 5)),
        ("AB, C", ("C", 6)),
        ("選A. 唔選B。", ("A", 8)),  # the letters are part of words, and nothing is similar
        ("胡適, Abba", ("C", 8)),
        ("胡適", ("C", 8)),
        ("\uff22\uff22梁", ("D", 8)),
        ("\uff22", ("A", 8)),  # a full-width B is no letter of an option
        ("I refuse, as this is beyond me", ("A", 8)),  # nothing is similar: the first option all the same
    ],
)
def test_rules_in_their_order(text, expected):
    assert choose(text, PROMPT) == expected


def test_words_reach_20_and_10_characters():
    for gap, reached in ((20, ("C", 2)), (21, ("A", 6))):
        assert choose("A B。故" + "一" * gap + "字母有\n是 C", PROMPT) == reached
    for gap, reached in ((10, ("C", 2)), (11, ("A", 6))):
        assert choose("x A, B。故字母" + "一" * gap + "是 C", PROMPT) == reached
    for gap, reached in ((9, ("C", 5)), (10, ("A", 6))):
        assert choose("A, B, 我話字母" + "一" * 10 + "為" + "一" * gap + " C", PROMPT) == reached


def test_similarity_counts_matches_and_the_first_of_equals_wins():
    # Only insertions and deletions count, so that a substitution is two edits.
    assert choose("甲乙丙", "A. 甲\nB. 甲乙丁戊\nC. 乙丙\nD. 丁\n") == ("C", 8)  # ratios 2/4, 4/7, 4/5, 0
    assert choose("甲乙", "A. 丙\nB. 甲\nC. 乙\nD. 丁\n") == ("B", 8)
    assert choose("甲乙", "no options") == (None, None)
    assert choose("VV", "A. V\nB. W\nC. VV\nD. vv\n") == ("C", 8)  # in lower case both are equal, and the first wins
    assert choose("VV", "D. wv\nA. xv\n") == ("D", 8)  # the first is the one that comes first in the prompt


@pytest.mark.parametrize(
    ("shown", "options"),
    [
        (
            "A. 一\nB. 二\nC. 三\nD. 四\n回應：A\n\n\n" + PROMPT + "答案:\n",
            {"A": "蔡元培", "B": "黃遵憲", "C": "胡適", "D": "梁啟超"},
        ),
        ("C. x\nA. y\nC. z", {"C": "z", "A": "y"}),  # the last text, in the order of the first
        ("D. 一\n 二\n\n答案：", {"D": "一\n 二\n\n答案："}),  # across line breaks, up to 答案 only with an ASCII colon
        ("D. 一\n答案:A. 二\nB.三", {"D": "一", "A": "二", "B": "三"}),
        ("問X A. 一 B. 二\nE. 三", {"A": "一 B. 二\nE. 三"}),  # anywhere in a line, ended by the beginning of one
        ("A.\nB. 二\nC. 三", {"A": "B. 二", "C": "三"}),  # white space after the full stop is no text
        ("A.一\nB.二", {}),  # at least one letter must be followed by a space and a text
        ("A.一\nB. 二", {"A": "一", "B": "二"}),
        ("a. x", {}),
    ],
)
def test_options_are_read_as_the_benchmark_reads_them(shown, options):
    assert list(options_shown(shown).items()) == list(options.items())


def test_an_option_may_be_empty_and_then_resembles_white_space():
    assert options_shown("A. x\nB. ") == {"A": "x", "B": ""} and choose(" ", "A. x\nB. ") == ("B", 8)


def test_options_are_read_from_the_last_turn_alone(tmp_path):
    turns = [{"role": "HUMAN", "prompt": "A. 胡適\nB. x"}, {"role": "HUMAN", "prompt": "A. y\nB. 胡適"}]
    assert read_answers(predictions(tmp_path, origin_prompt=turns, prediction="胡適"))[0].choice == "B"
    silent = [*turns, {"role": "HUMAN", "prompt": "A.y\nB.胡適"}]
    assert read_answers(predictions(tmp_path, origin_prompt=silent, prediction="胡適"))[0].choice is None


@published
def test_the_benchmark_s_own_answers_come_out(tmp_path):
    with open(PREDICTIONS / "answer_cases.jsonl", encoding="utf-8") as lines:
        cases = [json.loads(line) for line in lines]
    path = tmp_path / "cmmlu-yue-all-0shot.json"
    path.write_text(json.dumps({str(n): {**case, "gold": "A"} for n, case in enumerate(cases)}), encoding="utf-8")
    found = [item.choice or "" for item in read_answers(path)]
    assert len(found) == 332 and found == [case["benchmark_answer"] for case in cases]


@published
def test_every_published_accuracy_comes_out(tmp_path):
    run_main(evaluate, "--predictions_dir", PREDICTIONS, "--output_dir", tmp_path)
    found = json.loads((tmp_path / "cmmlu_yue_results.json").read_text())
    summary = json.loads((tmp_path / "cmmlu_yue_summary.json").read_text())
    expected = json.loads((PREDICTIONS / "expected.json").read_text())
    for shots in ("0shot", "5shot"):
        wanted = expected[f"ChatGPT-{shots}"]
        assert summary["ChatGPT"][shots]["overall"]["micro"] == wanted.pop("Average")
        assert {name: figures["accuracy"] for name, figures in found["ChatGPT"][shots].items()} == wanted
        assert len(wanted) == 22 and wanted.keys() == NAMES.keys()
    with open(tmp_path / "cmmlu_yue_results.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 44


@published
def test_prompts_are_the_published_ones():
    """There are three kinds of exceptions: three subjects whose header repeats a clause, questions that are their own
    example in the published prompts, and the five after the damaged question of security_study."""
    other = {}
    for subject in NAMES:
        found = read_questions(QUESTIONS / f"{subject}.json")
        for shots in (0, 5):
            name = f"ChatGPT/cmmlu-yue-{subject}-{shots}shot.json"
            theirs = json.loads((PREDICTIONS / name).read_text(encoding="utf-8"))
            shown = {n: theirs[str(n)]["origin_prompt"] for n in found}
            shown = {n: one if isinstance(one, str) else one[0]["prompt"] for n, one in shown.items()}
            other[subject, shots] = [n for n in found if prompt(subject, found, n, shots) != shown[n]]
            assert all(theirs[str(n)]["gold"] == found[n].answer for n in found)
            if (subject, shots) == ("security_study", 0):
                assert len(theirs) == len(found) + 1 and 84 not in found
    repeated = ("electrical_engineering", "high_school_geography", "marxist_theory")
    assert all(len(other.pop((subject, 0))) > 100 for subject in repeated)
    assert {key: numbers for key, numbers in other.items() if numbers} == OTHER_EXAMPLES


def predictions(folder, **changes):
    """Write a file with two items, the first of them changed; returns its path."""
    turn = {"role": "HUMAN", "prompt": PROMPT}
    items = {
        "0": {"origin_prompt": PROMPT, "prediction": "A", "gold": "A"},
        "7": {"origin_prompt": [turn], "prediction": [""], "gold": "B"},
    }
    items["0"].update(changes)
    path = folder / "m" / "cmmlu-yue-logical-0shot.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


def test_accuracies_tables_and_errors(tmp_path, capsys):
    predictions(tmp_path / "in")
    shutil.copy(predictions(tmp_path / "in"), tmp_path / "in/m/cmmlu-yue-arts-0shot.json")
    only = {"0": {"origin_prompt": PROMPT, "prediction": "C", "gold": "C"}}
    (tmp_path / "in/m/cmmlu-yue-sports_science-0shot.json").write_text(json.dumps(only))
    run_main(evaluate, "--predictions_dir", tmp_path / "in", "--output_dir", tmp_path / "out")
    results = json.loads((tmp_path / "out/cmmlu_yue_results.json").read_text())
    assert results["m"]["0shot"]["logical"] == {"accuracy": 50.0, "n_correct": 1, "n_samples": 2}
    summary = json.loads((tmp_path / "out/cmmlu_yue_summary.json").read_text())["m"]["0shot"]
    assert summary["categories"]["others"] == {
        "micro": 66.67,
        "macro": 75.0,
        "n_correct": 2,
        "n_samples": 3,
        "n_subjects": 2,
        "n_unanswered": 1,
    }
    assert (summary["overall"]["micro"], summary["overall"]["macro"]) == (60.0, 66.67)
    wrong = [json.loads(line) for line in (tmp_path / "out/cmmlu_yue_errors.jsonl").read_text().splitlines()]
    assert [(line["subject"], line["item"], line["choice"]) for line in wrong] == [
        ("arts", "7", None),
        ("logical", "7", None),
    ]
    assert "| m | 0 | 50.00 | 66.67 | 60.00 | 66.67 | 5 | 2 |" in capsys.readouterr().out
    assert "| logical | 50.00 |" in (tmp_path / "out/cmmlu_yue_results.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gold": "E"}, "item 0: gold is 'E'"),
        ({"gold": ["A"]}, "item 0: gold is ['A']"),
        ({"prediction": None}, "item 0: prediction is neither"),
        ({"prediction": ["A", "B"]}, "item 0: prediction is neither"),
        ({"origin_prompt": [{"role": "HUMAN"}]}, "item 0: origin_prompt is neither"),
    ],
)
def test_bad_predictions_name_file_and_item(tmp_path, fails, changes, message):
    path = predictions(tmp_path, **changes)
    line = fails(evaluate, "--predictions_dir", tmp_path, "--output_dir", tmp_path / "out")
    assert message in line and str(path) in line and not (tmp_path / "out").exists()


def test_other_bad_folders(tmp_path, fails):
    flags = ("--predictions_dir", tmp_path, "--output_dir", tmp_path / "out")
    assert "has no predictions" in fails(evaluate, *flags)
    path = predictions(tmp_path)
    for content, message in (("[]", "holds no items"), ("{}", "holds no items"), ('{"0": 1}', "item 0"), ("{", "JSON")):
        path.write_text(content)
        assert message in fails(evaluate, *flags)


def test_questions_without_an_option_are_left_out(tmp_path, caplog):
    rows = [{"question": "x", **dict.fromkeys("ABCD", "y"), "answer": "A"} for _ in range(4)]
    del rows[2]["A"]
    (tmp_path / "arts.json").write_text(json.dumps(rows))
    assert list(read_questions(tmp_path / "arts.json")) == [0, 1, 3] and "item 2 lacks an option" in caplog.text


def test_a_question_is_never_its_own_example():
    same = [Question(text, ("一", "二", "三", "四"), "A") for text in ("x", "y", "x", "z")]
    shown = prompt("arts", dict(enumerate(same)), 2, 2)
    assert shown.count("問題：x") == 1 and shown.index("問題：z") < shown.index("問題：y")
    with pytest.raises(UserError, match="2 questions besides item 2"):
        prompt("arts", dict(enumerate(same)), 2, 3)


def test_categories_hold_each_subject_once():
    assert len(NAMES) == sum(map(len, CATEGORIES.values())) == 22
