"""The generated world: what its tutor says is good, and its oracle names every fault."""

import json
import random

import pytest
from processes import run_command

from redi.dialogue import oracle, world
from redi.dialogue.scenario import Scenario

GARAGE = Scenario(
    topic="repairing a car",
    place="a garage",
    tutor="the mechanic",
    student="a customer",
    tasks=[
        "choose the day: Friday, Monday or Sunday",
        "choose the repair: brake, mirror or engine",
    ],
    facts=["brake costs 7 pounds", "mirror costs 6 pounds", "engine costs 4 pounds"],
    wants=["day: Friday", "repair: brake"],
)
FIRST = "Hello! Which day would you like: Friday, Monday or Sunday?"
SECOND = "OK, Friday. Which repair would you like: brake, mirror or engine?"


def said(*texts: str) -> list[dict]:
    """Tutor, student, tutor, ..."""
    return [{"role": ("assistant", "user")[i % 2], "content": t} for i, t in enumerate(texts)]


def test_a_good_tutor_has_no_fault_in_a_thousand_dialogues_of_all_topics():
    labels, topics = set(), set()
    for row in world.rows(1000, seed=5):
        scenario, messages = Scenario(**row["scenario"]), row["messages"]
        topics.add(scenario.topic)
        labels |= {
            oracle.judge_reply(scenario, messages[:i], message["content"])
            for i, message in enumerate(messages)
            if message["role"] == "assistant"
        }
    assert labels == {"good"}
    assert len(topics) == 51


REPLIES = [  # what was said, the reply, its label
    ((), FIRST, "good"),
    ((), "Hi there. Do you prefer Monday, Friday or Sunday?", "good"),
    ((), "On which day shall I expect you?", "good"),
    ((), "Which repair do you want: brake, mirror or engine?", "skips"),
    ((), "Which day would you like: Friday or Tuesday?", "wrong"),
    ((), "Goodbye! [end]", "ends_early"),
    ((), "Hello!", "broken"),
    ((), "", "broken"),
    ((FIRST, "Friday, please."), SECOND, "good"),
    ((FIRST, "Friday, please."), "Friday it is. And what about the repair?", "good"),
    ((FIRST, "Friday, please."), "Which repair would you like: brake or mirror?", "ignores"),
    ((FIRST, "Friday, please."), SECOND.replace("Friday", "Monday"), "wrong"),
    ((FIRST, "Friday, please."), "OK, Friday. Which day would you like?", "repeats"),
    ((FIRST, "Friday, please."), "OK, Friday. Goodbye! [end]", "ends_early"),
    ((FIRST, "Friday and brake."), "So Friday and brake. Goodbye! [end]", "good"),
    ((FIRST, "Friday and brake."), "So Friday and brake. Goodbye!", "goes_on"),
    ((FIRST, "Friday and brake."), "So Friday. Goodbye! [end]", "ignores"),
    ((FIRST, "Friday and brake."), "So Friday and engine. Goodbye! [end]", "wrong"),
    ((FIRST, "Friday.", SECOND, "What does the brake cost?"), f"7 pounds. {SECOND[12:]}", "good"),
    ((FIRST, "Friday.", SECOND, "What does the brake cost?"), f"6 pounds. {SECOND[12:]}", "wrong"),
    ((FIRST, "Friday.", SECOND, "What does the brake cost?"), SECOND[12:], "ignores"),
    ((FIRST, "Is there Tuesday?"), f"No, there is no Tuesday. {FIRST[7:]}", "good"),
    ((FIRST, "Is there Tuesday?"), f"OK, Tuesday. {FIRST[7:]}", "wrong"),
    ((FIRST, "Is there Tuesday?"), FIRST[7:], "ignores"),
    ((FIRST, "My dog is ill."), f"Poor dog! {FIRST[7:]}", "good"),
    ((FIRST, "My dog is ill."), "I am sorry to hear that about your dog.", "off_topic"),
    ((FIRST, "My dog is ill."), "Oh no.", "broken"),
]


@pytest.mark.parametrize(("history", "reply", "label"), REPLIES)
def test_a_reply_is_labeled_by_its_meaning_whatever_its_wording(history, reply, label):
    assert oracle.judge_reply(GARAGE, said(*history), reply) == label


def test_a_hint_is_good_if_it_is_an_offered_answer_to_what_was_asked():
    history = said(FIRST, "Friday.", SECOND)
    assert oracle.judge_hint(GARAGE, history, "I take the mirror.") == "good"
    assert oracle.judge_hint(GARAGE, history, "How much is the engine?") == "good"
    for unfit in ("Friday, please.", "A window, please.", "Do you like football?", "Brake. [end]"):
        assert oracle.judge_hint(GARAGE, history, unfit) == "unfit"


def test_a_student_answers_from_its_card_asks_back_and_strays():
    says = [world.say_as_student(GARAGE, said(FIRST), random.Random(n)) for n in range(400)]
    plain = [text for text in says if "Friday" in text and "brake" not in text]
    assert len(plain) / 400 == pytest.approx(0.65, abs=0.06)
    assert any("Friday and brake" in text for text in says)
    assert any(text in world.WORDINGS["stray"] for text in says)
    after = said(FIRST, "My dog is ill.", FIRST)
    assert all("Friday" in world.say_as_student(GARAGE, after, random.Random(n)) for n in range(9))
    assert world.say_as_student(GARAGE, said("Hello!"), random.Random(0)) == world.LOST


def test_scenarios_and_dialogues_depend_on_their_number_alone():
    assert list(world.rows(60, seed=1))[51:] == list(world.rows(120, seed=1))[51:60]
    assert list(world.rows(3, seed=1)) != list(world.rows(3, seed=2))


def test_the_command_writes_dialogues(tmp_path):
    code, _, errors = run_command(
        "-m", "redi.dialogue.world", str(tmp_path / "talk"), "--dialogues", "5"
    )
    assert code == 0, errors
    rows = (tmp_path / "talk/dialogues.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == list(world.rows(5, seed=1))
