"""redi dialogue prepare: what is learned, who is on which side, and an account of every row."""

import json
import random
import re
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from processes import main_in_this_process
from small_run import assistant, read_jsonl, refusal, user, write_jsonl

from redi.data.formats import to_example
from redi.dialogue import world
from redi.dialogue.dialogues import Reply
from redi.dialogue.examples import pair
from redi.dialogue.prepare import PrepareConfig, main, prepare
from redi.dialogue.rubric import judge_messages, read_rubric
from redi.dialogue.scenario import END, HINT, TEMPLATES, Scenario

CAFE = {
    "topic": "food", "place": "a cafe", "tutor": "the waiter", "student": "a guest",
    "tasks": ["order"], "words": ["menu", "the bill"], "facts": ["a tea costs 3 pounds"],
    "wants": ["cocoa"], "opening": "Welcome!", "id": "cafe",
}  # fmt: skip
TALK = [
    assistant("Welcome!"), user("A tea."), assistant("Coffee?"), user("No, tea."),
    assistant("3 pounds. Bye! [end]"),
]  # fmt: skip
LABELS = (None, None, "wrong", None, "good")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def row(messages=TALK, labels=(), scenario=CAFE, **more) -> dict:
    labels = [*labels, *[None] * len(messages)]
    labelled = [m | ({"label": label} if label else {}) for m, label in zip(messages, labels)]
    return {"scenario": scenario, "messages": labelled, **more}


def prepared(rows: list[dict], out: str = "out", **settings) -> dict[str, list]:
    """File name without .jsonl -> rows; by default one topic, in training, and no hints."""
    write_jsonl(Path("rows.jsonl"), rows)
    plain = {"unseen_topics": [0], "test_share": 0.0, "hint_share": 0.0}
    prepare(PrepareConfig(files=["rows.jsonl"], out=out, **plain | settings))
    return {path.stem: read_jsonl(path) for path in Path(out).glob("*.jsonl")}


def card(out: str = "out") -> dict:
    return json.loads(Path(out, "card.json").read_text())


def of_world(count: int) -> list[dict]:
    return list(world.rows(count, seed=1))


def texts(rows: list) -> set[str]:
    return {json.dumps(row, sort_keys=True) for row in rows}


# ---------------------------------------------------------------- one dialogue


def test_a_tutor_learns_good_replies_and_keeps_the_bad_ones_and_the_opening_as_context():
    [found] = prepared([row(labels=LABELS)])["tutor"]
    told = {"role": "system", "content": Scenario(**CAFE).prompt("tutor")}
    context = [TALK[0] | {"weight": 0}, TALK[1], TALK[2] | {"weight": 0}]
    assert found == {"messages": [told, *context, *TALK[3:]]}
    assert to_example(found, "x", "rows").responses == [[*context, *TALK[3:]]]
    assert "cocoa" not in json.dumps(found)  # the student's card


def test_a_weight_of_0_in_the_data_makes_context_too():
    talk = [*TALK[:2], TALK[2] | {"weight": 0}, TALK[3], TALK[4] | {"weight": 1}]
    [found] = prepared([row(talk)])["tutor"]
    assert [m.get("weight") for m in found["messages"]] == [None, 0, None, 0, None, None]


def test_a_student_learns_its_words_from_its_card():
    [found] = prepared([row(labels=LABELS)])["student"]
    told = {"role": "system", "content": Scenario(**CAFE).prompt("student")}
    assert "cocoa" in told["content"]
    turns = [user("Welcome!"), assistant("A tea."), user("Coffee?"), assistant("No, tea.")]
    assert found == {"messages": [told, *turns]}


def test_a_hint_is_the_students_words_before_it_says_them():
    [found] = prepared([row(labels=LABELS)], hint_share=1.0)["tutor"]
    turns = found["messages"][2:]
    assert turns[:3] == [user(HINT), assistant("A tea."), user("A tea.")]
    assert turns[4:7] == [user(HINT), assistant("No, tea."), user("No, tea.")]


def test_every_labelled_reply_and_hint_is_a_row_of_the_judge():
    talk = row(labels=LABELS)
    talk["messages"][1] |= {"hint": "Coffee!", "hint_label": "unfit"}
    several = row(TALK[:2], replies=[{"content": "Hm.", "label": "broken"}, {"content": "So?"}])
    scenario = Scenario(**CAFE)
    replies = [
        Reply(scenario, TALK[:1], "Coffee!", "unfit", is_hint=True),
        Reply(scenario, TALK[:2], "Coffee?", "wrong"),
        Reply(scenario, TALK[:4], "3 pounds. Bye! [end]", "good"),
        Reply(scenario, TALK[:2], "Hm.", "broken"),
    ]
    assert prepared([talk, several])["judge"] == [
        {"prompt": judge_messages(reply, read_rubric(None)), "completion": reply.label}
        for reply in replies
    ]
    odd = row(TALK[:3], [None, None, "rude"])
    assert "judge" not in prepared([odd, row()])
    assert card()["counts"]["judge: label that is not in the rubric"] == 1


def test_marks_in_the_students_words_and_turns_without_words_mean_nothing():
    talk = [*TALK[:1], user(f"A tea. {END} {HINT}"), TALK[2], user(f" {HINT}")]
    [found] = prepared([row(talk)])["tutor"]
    assert found["messages"][1:] == [TALK[0] | {"weight": 0}, TALK[1], TALK[2]]


# ---------------------------------------------------------------- pairs


def several(*replies: tuple[str, str | None], history=TALK[:2]) -> dict:
    return row(history, replies=[{"content": c, "label": label} for c, label in replies])


def test_a_pair_is_the_first_good_and_the_first_bad_reply_of_a_state():
    found = prepared([
        several(("?", None), ("Cold", "wrong"), ("Tea!", "good"), ("x", "skips"), ("y", "good")),
        several(("a", "good"), ("b", "good"), history=TALK[:4]),
        several(("a", "wrong"), history=[*TALK[:3], user("Ah.")]),
        several(("a", "good"), ("a", "wrong"), history=[TALK[0], user("Oh.")]),
    ])  # fmt: skip
    told = {"role": "system", "content": Scenario(**CAFE).prompt("tutor")}
    assert found["pairs"] == [{
        "prompt": [told, *TALK[:2]], "chosen": [assistant("Tea!")],
        "rejected": [assistant("Cold")],
    }]  # fmt: skip
    counts = card()["counts"]
    assert counts["states with several replies"] == 4
    assert [counts[f"pairs: {why}"] for why in (
        "no bad reply", "no good reply", "rejected is also labeled good"
    )] == [1, 1, 1]  # fmt: skip
    learned = [to_example(r, "x", "rows").responses[0][-1]["content"] for r in found["tutor"]]
    assert learned == [
        "Tea!",
        "a",
        "a",
    ]  # no reply without a label, or of a state without a good one
    weights = [m.get("weight") for m in found["tutor"][1]["messages"]]
    assert weights == [None, 0, None, 0, None, None]  # the history comes in other rows
    assert "student" not in found


def test_dialogues_that_share_a_state_make_pairs_in_any_order():
    rows = [
        row([*TALK[:2], assistant(said)], [None, None, label])
        for said, label in [("Tea.", "good"), ("No.", "wrong"), ("Yes!", "good"), ("Hm", "skips")]
    ]
    [one] = prepared(rows)["pairs"]
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        assert prepared(rows, f"out{seed}")["pairs"] == [one]


def test_hints_of_one_state_make_pairs_that_ask_for_one():
    scenario = Scenario(**CAFE)
    state = [
        Reply(scenario, TALK[:1], text, label, is_hint=True)
        for text, label in [("Tea.", "good"), ("Bye.", "unfit")]
    ]
    found = pair(state, 1, Counter())
    assert found["prompt"][1:] == [TALK[0], user(HINT)]


# ---------------------------------------------------------------- who is on which side


def test_the_order_of_rows_changes_no_side_no_hint_and_no_row():
    rows = of_world(500)
    for number, talk in enumerate(rows):  # some labels
        talk["messages"][-1]["label"] = ("good", "wrong")[number % 2]
    one = prepared(rows, "one", unseen_topics=[10], test_share=0.2, hint_share=0.15)
    again = prepared(rows, "again", unseen_topics=[10], test_share=0.2, hint_share=0.15)
    assert one == again
    bytes_of = {p.name: p.read_bytes() for p in Path("one").iterdir()}
    assert bytes_of == {p.name: p.read_bytes() for p in Path("again").iterdir()}
    random.Random(1).shuffle(rows)
    other = prepared(rows, "other", unseen_topics=[10], test_share=0.2, hint_share=0.15)
    assert one.keys() == other.keys()
    assert {name: texts(one[name]) for name in one} == {name: texts(other[name]) for name in other}
    assert one["tutor"] != other["tutor"]  # only the order


def test_no_topic_and_no_scenario_is_on_two_sides():
    found = prepared(of_world(700), unseen_topics=[10], test_share=0.2)
    sides = [found[f"scenarios_{side}"] for side in ("seen", "test", "unseen")]
    ids = [{scenario["id"] for scenario in side} for side in sides]
    seen, test, unseen = ({scenario["topic"] for scenario in side} for side in sides)
    assert sum(map(len, ids)) == len(set().union(*ids)) == 700
    assert (len(seen), len(unseen), len(seen & unseen)) == (41, 10, 0)
    assert test <= seen
    assert 0.15 < len(ids[1]) / (len(ids[0]) + len(ids[1])) < 0.25
    assert card()["topics"] == {"seen": sorted(seen), "unseen": sorted(unseen)}
    for ending, topics in {"": seen, "_test": test, "_unseen": unseen}.items():
        about = "".join(talk["messages"][0]["content"] for talk in found[f"tutor{ending}"])
        assert all(f"about {topic}." in about for topic in topics)
        for other in (seen | unseen) - topics:
            assert f"about {other}." not in about


def test_unseen_topics_can_be_named_and_stay_unseen_with_fewer_topics():
    rows = of_world(102)
    names = ["buying bread", "camping"]
    named = prepared(rows, "named", unseen_topics=names)
    assert {s["topic"] for s in named["scenarios_unseen"]} == set(names)
    drawn = {s["topic"] for s in prepared(rows, "a", unseen_topics=[10])["scenarios_unseen"]}
    fewer = [r for r in rows if r["scenario"]["topic"] in drawn or "buy" in r["scenario"]["topic"]]
    again = prepared(fewer, "b", unseen_topics=[10])
    assert {s["topic"] for s in again["scenarios_unseen"]} == drawn


def test_15_percent_of_the_students_turns_have_a_hint():
    found = prepared(of_world(3000), hint_share=0.15)["tutor"]
    turns = [m["content"] for talk in found for m in talk["messages"] if m["role"] == "user"]
    hints = turns.count(HINT)
    assert len(turns) - hints > 10_000
    assert abs(hints / (len(turns) - hints) - 0.15) < 0.01
    counts = card()["counts"]
    assert (counts["student's turns"], counts["hints"]) == (len(turns) - hints, hints)


def test_the_leak_is_the_words_of_unseen_topics_in_training_rows():
    """bread, costs, jam; and 4, which is no word. In training: costs (of a fact), jam (said)."""
    shop = CAFE | {
        "topic": "shop", "id": "shop", "words": ["bread"], "facts": ["Jam costs 4"],
    }  # fmt: skip
    rows = [row([*TALK[:4], assistant("No jam, no breadsticks.")]), row(scenario=shop)]
    prepared(rows, unseen_topics=["shop"])
    assert card()["leak"] == {"words_of_unseen_topics": 3, "in_tutor.jsonl": ["costs", "jam"]}


# ---------------------------------------------------------------- other rows, other texts


def test_general_rows_are_a_share_of_the_tutors_rows_evenly_spread():
    general = [{"prompt": f"{n}?", "completion": "Yes."} for n in range(30)]
    general += [{"messages": [user(f"{n}!"), assistant("No.")]} for n in range(30)]
    general += [{"prompt": f"{n}?", "completion": "Wrong.", "label": False} for n in range(9)]
    write_jsonl(Path("general.jsonl"), general + general[:7])
    rows = of_world(180)
    found = prepared(rows, mix="general.jsonl", mix_share=0.1)["tutor"]
    is_general = ["prompt" in r for r in found]
    assert len(found) == 200
    assert [sum(is_general[at : at + 20]) for at in range(0, 200, 20)] == [2] * 10
    assert card()["counts"]["mixed in"] == 20
    assert card()["counts"]["mix: label false or weight 0"] == 9
    for number, talk in enumerate(found):
        to_example(talk, str(number), "rows")
    random.Random(2).shuffle(general)
    write_jsonl(Path("general.jsonl"), general)
    assert prepared(rows, "again", mix="general.jsonl")["tutor"] == found
    message = refusal(prepared, rows, mix="general.jsonl", mix_share=0.5)
    assert message == "general.jsonl: holds 60 different rows; --mix-share 0.5 beside 180 rows " \
        "takes 180"  # fmt: skip


def test_own_templates(monkeypatch):
    monkeypatch.setitem(TEMPLATES, "tutor", "")  # restored at the end
    text = "Be {tutor} {here is}\nBe {tutor} of {level}\n"
    Path("own.toml").write_text(f"tutor = {json.dumps(text)}", encoding="utf-8")
    [found] = prepared([row()], templates="own.toml")["tutor"]
    assert found["messages"][0]["content"] == "Be the waiter {here is}"
    assert card()["templates"]["tutor"] == text
    for toml, error in (
        ('tutor = "Be {waiter}."', "own.toml: key 'tutor': unknown field {waiter}; fields: topic"),
        ('tutor = " "', "own.toml: key 'tutor': the template is empty"),
        ('tutors = ""', "own.toml: unknown key 'tutors'"),
    ):
        Path("own.toml").write_text(toml, encoding="utf-8")
        assert refusal(prepared, [row()], templates="own.toml").startswith(error)


def test_every_row_that_is_left_out_is_counted():
    long = CAFE | {"max_turns": 1, "id": "long"}
    rows = [
        row(),
        row(),
        row(TALK[:2]),
        row([user("Hello"), assistant("Hi")]),
        row([*TALK[:3], assistant("More")]),
        row([TALK[0], user(" "), TALK[2]]),
        row(scenario=long),
        row(scenario="nowhere"),
        row(TALK[:3], [None, None, "wrong"]),
        row(TALK[:2], replies=[{"content": " "}, {"content": "Tea.", "label": "good"}]),
    ]
    prepared(rows)
    facts = card()
    assert facts["dropped"] == {
        "duplicate": 1, "no tutor reply": 1, "roles do not alternate, tutor first": 2,
        "empty text": 1, "over max_turns": 1, "unknown scenario id": 1,
    }  # fmt: skip
    assert (facts["dialogues"], facts["rows"]["tutor"]) == (3, 2)
    counts = facts["counts"]
    assert counts["tutor: no reply to learn"] == counts["blank ones of several replies"] == 1


def test_of_a_dialogue_with_and_without_labels_the_labels_stay():
    rows = [row(), row(labels=(None, None, "wrong")), row(labels=(None, None, None, None, "good"))]
    for number, some in enumerate((rows, rows[::-1])):
        found = prepared(some, f"out{number}")
        assert [one["completion"] for one in found["judge"]] == ["wrong", "good"]
        assert [m.get("weight") for m in found["tutor"][0]["messages"][3:]] == [0, None, None]
        assert card(f"out{number}")["dropped"] == {"duplicate": 2}


def test_a_reply_whose_labels_contradict_each_other_is_neither_learned_nor_judged():
    rows = [row(labels=LABELS), row(labels=(None, None, "good", None, "good")), row(labels=LABELS)]
    for number, some in enumerate((rows, rows[::-1])):
        found = prepared(some, f"out{number}")
        assert [one["completion"] for one in found["judge"]] == ["good"]
        assert [m.get("weight") for m in found["tutor"][0]["messages"][3:]] == [0, None, None]
        assert card(f"out{number}")["counts"]["contradictory labels"] == 1


def test_scenarios_come_from_toml_too_and_an_empty_list_is_no_list():
    lines = [f"{name} = {json.dumps(value)}" for name, value in CAFE.items()]
    Path("scene.toml").write_text("\n".join(lines))
    rows = [row(scenario="cafe"), row(TALK[:3]), row(TALK[:3], scenario=CAFE | {"level": ""})]
    assert len(prepared(rows, scenarios="scene.toml")["tutor"]) == 2
    assert card()["read_sha256"].keys() == {"rows.jsonl", "scene.toml"}
    other = {name: value for name, value in CAFE.items() if name != "facts"}
    prepared([row(scenario=other), row(TALK[:3], scenario=other | {"facts": []})])


def test_turns_and_hints_of_rows_that_are_not_learned_are_not_counted():
    prepared([row(TALK[:3], [None, None, "wrong"])], hint_share=1.0)
    assert "hints" not in card()["counts"]


def test_topics_that_differ_in_letter_case_or_blanks_are_on_one_side():
    rows = [row(scenario=CAFE | {"topic": t, "id": t}) for t in ("Tea time", "tea  time", "cake")]
    sides = prepared(rows, unseen_topics=["TEA TIME"])
    assert [one["topic"] for one in sides["scenarios_unseen"]] == ["Tea time", "tea  time"]
    found = prepared(rows, unseen_topics=[1])["scenarios_unseen"]  # drawn
    assert {one["topic"] for one in found} in ({"Tea time", "tea  time"}, {"cake"})


def test_a_line_of_a_prompt_with_an_empty_field_is_left_out():
    wants = Scenario(**CAFE).prompt("judge").splitlines()[3]
    assert wants == "A guest wants: cocoa."
    assert "wants" not in Scenario(**CAFE | {"wants": [], "id": "x"}).prompt("judge")


def test_an_evaluation_and_scenarios_by_id_are_read():
    write_jsonl(Path("scenarios.jsonl"), [CAFE])
    Path("eval").mkdir()
    write_jsonl(Path("eval/dialogues.jsonl"), [row(scenario="cafe")])
    write_jsonl(Path("eval/other.jsonl"), [{"no": "dialogue"}])
    settings = {"scenarios": "scenarios.jsonl", "unseen_topics": [0], "test_share": 0.0}
    facts = prepare(PrepareConfig(files=["eval"], out="out", **settings))
    assert facts["rows"]["tutor"] == 1
    write_jsonl(Path("scenarios.jsonl"), [CAFE, CAFE | {"level": "A1"}])
    message = refusal(prepare, PrepareConfig(files=["eval"], **settings))
    assert message == "scenarios.jsonl: two scenarios have the id 'cafe'"


def test_a_table_in_one_row_is_not_the_scenario_that_another_row_names():
    rows = [row(), row(TALK[:3], scenario="cafe")]
    assert prepared(rows, "one") == prepared(rows[::-1], "other")
    assert card("one")["dropped"] == card("other")["dropped"] == {"unknown scenario id": 1}


def test_a_tutor_that_is_always_wrong_still_gives_rows_for_a_judge():
    found = prepared([row(TALK[:3], [None, None, "wrong"])])
    assert found.keys() == {"student", "judge", "scenarios_seen"}


def test_files_of_an_earlier_run_do_not_stay_and_the_account_is_printed(capsys):
    prepared([several(("a", "good"), ("b", "wrong"))])
    assert Path("out/pairs.jsonl").exists()
    write_jsonl(Path("rows.jsonl"), [row(labels=LABELS), row(scenario="nowhere")])
    flags = ["--out=out", "--unseen-topics", "0", "--test-share=0", "--hint-share=0"]
    assert main_in_this_process(main, "rows.jsonl", *flags) == 0
    assert (
        capsys.readouterr().out
        == """\
rows                   2
  unknown scenario id  1
dialogues              1
  student's turns      2
tutor.jsonl            1
student.jsonl          1
judge.jsonl            2
scenarios_seen.jsonl   1
unseen topics: none
leak: 0 of 0 words of their words and facts occur in tutor.jsonl
saved in out, with card.json
"""
    )
    assert not Path("out/pairs.jsonl").exists()


OTHER = CAFE | {"place": "a bar"}
REFUSED = {  # rows, settings, what the error says
    "one topic": ([row()], {"unseen_topics": [10]}, "of 1 topics, none is left to train on"),
    "unknown topic": ([row()], {"unseen_topics": ["tea"]}, "--unseen-topics: .* got 'tea'"),
    "two numbers": ([row()], {"unseen_topics": [1, 2]}, "one number, or topics .* got '1'"),
    "below 0": ([row()], {"unseen_topics": [-1]}, "--unseen-topics: expected at least 0"),
    "share": ([row()], {"hint_share": 1.5}, "--hint-share: expected from 0 to 1; got 1.5"),
    "one id": ([row(), row(scenario=OTHER)], {}, "rows.jsonl: two scenarios have the id 'cafe'"),
    "nothing": ([row(scenario="x")], {}, "no row to train on; 1 unknown scenario id"),
    "all are held out": ([row()], {"test_share": 0.999}, "rows.jsonl: no row to train on; 2 stu"),
    "label": ([row(labels=[1])], {}, "rows.jsonl:1: content, label, hint, .* must be text"),
    "weight": ([row([TALK[0] | {"weight": 2}])], {}, "rows.jsonl:1: a message's weight must be"),
    "surrogate": ([row([assistant("\ud800")])], {}, "rows.jsonl:1: content, .* UTF-8"),
    "surrogate in a scenario": (
        [row(scenario=CAFE | {"place": "\ud800"})], {}, "rows.jsonl:1: the scenario has text that",
    ),
    "a scenario that is a list": ([row(scenario=["x"])], {}, "rows.jsonl:1: 'scenario' must be"),
    "missing scenarios": ([row()], {"scenarios": "no.toml"}, "no.toml"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_end_in_one_line_and_write_nothing(name):
    rows, settings, expected = REFUSED[name]
    assert re.search(expected, refusal(prepared, rows, **settings))
    assert not Path("out").exists()


def test_input_is_not_overwritten():
    write_jsonl(Path("tutor.jsonl"), [row()])
    config = partial(PrepareConfig, files=["tutor.jsonl"], out=".")
    assert "--out tutor.jsonl: would overwrite tutor.jsonl" in refusal(prepare, config())


def test_files_of_two_runs_are_never_beside_a_card(monkeypatch):
    prepared([row()])
    assert card()["dialogues"] == 1

    def stopped(path: Path, rows: list) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("redi.dialogue.prepare.write_rows", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepared([row()])
    assert not Path("out", "card.json").exists()


def test_no_reply_that_was_cut_or_is_also_good_is_learned_as_such():
    talk = [*TALK[:2], {**TALK[2], "content": "Here is", "label": "good", "cut": "length"}]
    both = several(("Tea!", "good"), ("Cold", "wrong"), history=TALK[:2])
    both["replies"] += [{"content": "Cold ", "label": "good"}]
    found = prepared([{"scenario": CAFE, "messages": talk}, both])
    assert [row["messages"][-1]["content"] for row in found["tutor"]] == ["Tea!"]
    assert card()["counts"]["tutor: no reply to learn"] == 1
    assert "pairs" not in found
    first = several(("Short", "good"), ("Cold", "wrong"), history=TALK[:2])
    first["replies"][0]["cut"] = "length"
    assert "pairs" not in prepared([first])


def test_a_label_that_is_nearly_good_is_an_error():
    message = refusal(prepared, [several(("Tea!", "Good"), ("Cold", "wrong"), history=TALK[:2])])
    assert message == "rows.jsonl:1: the label 'Good' is not spelled 'good'"
