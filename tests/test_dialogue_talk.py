"""redi/dialogue/talk.py and the engine's Speaker: a dialogue is the same alone and in company."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_dialogue import make_talker, world_scenarios

from redi.checkpoint.folder import load_model
from redi.config import UserError
from redi.dialogue import talk as talk_module
from redi.dialogue.scenario import END, HINT, Scenario
from redi.dialogue.talk import Ask, Said, Voice, ask, converse, replay, talk, turn_key
from redi.dialogue.world import make_dialogue, say_as_tutor
from redi.eval.engine.generate import Request, generate
from redi.eval.engine.sampling import Sampling
from redi.eval.engine.streaming import Speaker, Turn

GREEDY, HOT = Sampling(temperature=0.0), Sampling(1.0, 0.95, 3)
SCENE = Scenario(
    topic="tea", place="a cafe", tutor="the waiter", student="a guest", tasks=["order"], max_turns=3
)


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Path:
    return make_talker(tmp_path_factory.mktemp("talker") / "model")


@pytest.fixture(scope="module")
def loaded(talker):
    model, source = load_model(talker)
    return model.double(), source


@pytest.fixture(scope="module")
def voice(loaded) -> Callable[..., Voice]:
    return lambda slots, sampling=HOT, limit=60: Voice(Speaker(*loaded, slots), sampling, limit)


def finish(steps, answer: Callable[[Ask], Said]) -> list[dict]:
    """Run one dialogue with a function in place of the voices."""
    said = None
    while True:
        try:
            said = answer(steps.send(said))
        except StopIteration as finished:
            return finished.value


def scripted(**replies: Sequence[str]) -> Callable[[Ask], Said]:
    """tutor, student, hint: what each says, in turn; without its stop token if it ends in ..."""
    left = {who: iter(texts) for who, texts in replies.items()}

    def answer(asked: Ask) -> Said:
        who = "hint" if asked.messages[-1]["content"] == HINT else asked.who
        text = next(left[who])
        cut = text.endswith("...")
        return Said(text, len(text.split()) + 1, "length" if cut else "stop")

    return answer


# ---------------------------------------------------------------- the speaker


def random_turns(count: int, seed: int) -> Iterator[Turn]:
    generator = torch.Generator().manual_seed(seed)
    for row in range(count):
        length = int(torch.randint(1, 90, (1,), generator=generator))
        prompt = torch.randint(3, 600, (length,), generator=generator).tolist()
        yield Turn(row, prompt, 100 * seed + row, 1 + (7 * row) % 40)


def by_row(speaker: Speaker, turns: list[Turn], sampling: Sampling) -> dict[int, list[int]]:
    found = {turn.row: [] for turn in turns}
    for row, token in speaker.answers(turns, sampling):
        found[row].append(token)
    return found


@pytest.mark.parametrize("sampling", [GREEDY, HOT])
def test_answers_in_company_are_those_of_generate_and_of_a_row_alone(loaded, sampling):
    model, source = loaded
    together = Speaker(model, source, rows=12)
    for seed in range(3):  # later prompts meet rows that hold other texts
        turns = list(random_turns(12, seed))
        found = by_row(together, turns, sampling)
        requests = [Request(turn.key, tuple(turn.prompt_ids), turn.limit) for turn in turns]
        expected = generate(model, requests, source.stop_ids, sampling, slots=5)
        whole = {one.key: one for one in expected}
        for turn in turns:
            tokens, one = found[turn.row], whole[turn.key]
            assert tokens[: len(one.token_ids)] == one.token_ids
            assert len(tokens) == one.num_tokens
            alone = Speaker(model, source)
            assert list(alone.answer(turn.prompt_ids, turn.key, sampling, turn.limit)) == tokens


def test_a_second_turn_goes_on_from_the_cache_of_its_own_row(loaded):
    model, source = loaded
    speaker, sizes = Speaker(model, source, rows=3), []
    first = [Turn(row, list(range(3 + row, 43 + row)), row, 4) for row in range(3)]
    said = by_row(speaker, first, HOT)
    hook = model.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    second = [
        Turn(t.row, [*t.prompt_ids, *said[t.row][:-1], 9, 9, 9], 7 + t.row, 5) for t in first[::-1]
    ]
    found = by_row(speaker, second, HOT)
    hook.remove()
    assert sizes[:3] == [3, 3, 3]
    for turn in second:
        alone = Speaker(model, source).answer(turn.prompt_ids, turn.key, HOT, turn.limit)
        assert found[turn.row] == list(alone)


def test_a_full_cache_is_one_line(loaded):
    speaker = Speaker(*loaded, rows=2)
    del speaker.cache.free[1:]
    with pytest.raises(UserError, match="fewer --slots than 2"):
        list(speaker.answers([Turn(0, list(range(3, 40)), 1, 4)], HOT))
    with pytest.raises(UserError, match="fewer --slots than 2"):
        list(speaker.answers([Turn(1, list(range(3, 34)), 1, 40)], GREEDY))


# ---------------------------------------------------------------- one dialogue


def test_a_dialogue_ends_with_the_tutor_and_every_side_sees_its_own_words_as_the_assistants():
    asked: list[Ask] = []
    answer = scripted(tutor=["Hello!", f"Goodbye! {END}"], student=["Tea."], hint=["A tea?"])

    def listening(one: Ask) -> Said:
        asked.append(one)
        return answer(one)

    [row] = finish(converse(SCENE, 2, hints=True), listening)
    assert row["end"] == "tutor"
    assert row["tokens"] == 2 + 3  # without the hint's
    assert row["sample"] == 2
    assert row["messages"] == [
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Tea.", "hint": "A tea?"},
        {"role": "assistant", "content": f"Goodbye! {END}"},
    ]
    roles = [[message["role"] for message in one.messages] for one in asked]
    assert roles == [
        ["system"], ["system", "assistant", "user"], ["system", "user"],
        ["system", "assistant", "user"],
    ]  # fmt: skip
    assert [one.who for one in asked] == ["tutor", "tutor", "student", "tutor"]
    keys = [(0, "tutor"), (1, "hint"), (1, "student"), (1, "tutor")]
    assert [one.key for one in asked] == [turn_key(SCENE.id, 2, *key) for key in keys]
    assert asked[2].messages[0]["content"].startswith("You are a guest")
    assert all(HINT not in m["content"] for m in asked[3].messages)


@pytest.mark.parametrize(
    ("tutor", "student", "end", "messages"),
    [
        (["a", "b", "c"], ["x", "y"], "max_turns", 5),
        (["a", "b ..."], ["x"], "length", 3),
        (["a"], [" "], "student", 2),
        (["a"], ["x ..."], "student", 2),
        (["a"], [f" {END} {HINT}"], "student", 2),
    ],
)
def test_how_dialogues_end(tutor, student, end, messages):
    [row] = finish(converse(SCENE, 0), scripted(tutor=tutor, student=student))
    assert (row["end"], len(row["messages"])) == (end, messages)


def test_a_full_context_ends_a_dialogue():
    full = Said("", 0, "context")
    [row] = finish(
        converse(SCENE, 0), lambda one: full if one.who == "student" else Said("a", 2, "stop")
    )
    silent = {"role": "user", "content": "", "cut": "context"}
    assert (row["end"], row["messages"][-1]) == ("context", silent)
    said = iter([Said("a", 2, "stop"), full, Said("x", 2, "stop"), full])
    [row] = finish(converse(SCENE, 0, hints=True), lambda _: next(said))
    assert row["end"] == "context"
    assert row["messages"][-1] == {"role": "user", "content": "x"}  # and no hint


def test_a_given_opening_is_said_first_and_not_asked_for():
    scene = Scenario(**{**SCENE.as_row(), "opening": "Welcome!", "max_turns": 2, "id": ""})
    [row] = finish(converse(scene, 0), scripted(tutor=["b", "c"], student=["x", "y"]))
    assert [m["content"] for m in row["messages"]] == ["Welcome!", "x", "b", "y", "c"]
    assert row["end"] == "max_turns"


def test_the_marks_in_a_students_words_change_nothing():
    plain = scripted(tutor=["a", "b", "c"], student=["Tea, please.", "Thanks."])
    marked = scripted(
        tutor=["a", "b", "c"], student=[f"Tea, please. {END}", f"{HINT} {END}Thanks.{HINT}"]
    )
    assert finish(converse(SCENE, 0), plain) == finish(converse(SCENE, 0), marked)


def test_a_good_tutor_and_the_worlds_student_talk_to_the_end():
    for scenario in world_scenarios(20):

        def tutor(asked: Ask, scenario=scenario) -> Said:
            rng = random.Random(str(asked.key))
            return Said(say_as_tutor(scenario, asked.messages[1:], rng), 1, "stop")

        [row] = finish(converse(scenario, 0, world_seed=1), tutor)
        again = finish(converse(scenario, 0, world_seed=1), tutor)
        assert again == [row]
        assert row["end"] in ("tutor", "max_turns")
        [other] = finish(converse(scenario, 0, world_seed=2), tutor)
        assert other["messages"][0] == row["messages"][0]


def test_recorded_states_are_answered_several_times_and_nothing_is_added_to_them():
    history = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "x"}]
    answer = scripted(tutor=["A", "B", "C ...", "D"], hint=["say x"])
    first, second = finish(replay(SCENE, [[], history], 2, hints=True), answer)
    assert first["messages"] == []
    assert [reply["content"] for reply in first["replies"]] == ["A", "B"]
    assert second["messages"] == [history[0], {**history[1], "hint": "say x"}]
    assert second["replies"] == [{"content": "C ...", "cut": "length"}, {"content": "D"}]
    assert second["tokens"] == 3 + 2
    assert "hint" not in history[1]


# ---------------------------------------------------------------- many, with a model


def run(voices: dict, starts: list, slots: int) -> dict[int, list[dict]]:
    steps = ((number, start()) for number, start in enumerate(starts))
    return dict(talk(steps, voices, slots))


@pytest.mark.parametrize("sampling", [GREEDY, HOT])
def test_a_dialogue_alone_is_the_same_in_company(voice, sampling):
    short = [replace(one, max_turns=5) for one in world_scenarios(40)]
    starts = [lambda one=one: converse(one, 0, hints=True) for one in short]

    def both(slots: int) -> dict[str, Voice]:
        return {"tutor": voice(slots, sampling), "student": voice(slots, sampling, 40)}

    together, other = run(both(16), starts, 16), run(both(7), starts[::-1], 7)
    lengths = [len(row["messages"]) for [row] in together.values()]
    assert len(lengths) == 40
    assert sum(lengths) > 5 * 40 or sampling == GREEDY
    assert together == {39 - number: rows for number, rows in other.items()}
    for number in range(0, 40, 8):
        assert run(both(1), [starts[number]], 1) == {0: together[number]}


def test_the_cache_is_kept_so_the_work_is_about_the_length_of_the_dialogue(
    loaded, voice, monkeypatch
):
    """A good tutor's words are put into the model's mouth; tokens run are counted."""
    model, source = loaded
    scenario = next(one for one in world_scenarios(40) if len(make_dialogue(one, 1)) >= 9)
    gold = make_dialogue(scenario, 1)
    said = iter([m["content"] for m in gold if m["role"] == "assistant"])
    words = iter([m["content"] for m in gold if m["role"] == "user"])
    monkeypatch.setattr(talk_module, "say_as_student", lambda *_: next(words))
    speaking: list[int] = []

    def forced(logits, keys, positions, sampling):
        if positions[0] == 0:
            ids = source.chat.tokenizer.encode(next(said), add_special_tokens=False).ids
            speaking[:] = [*ids, source.stop_ids[0]]
        return [speaking[positions[0]]]

    monkeypatch.setattr("redi.eval.engine.streaming.sample", forced)
    sizes: list[int] = []
    hook = model.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    start = [lambda: converse(scenario, 0, world_seed=1)]
    tutor = voice(1, limit=100)
    tutor.speaker.stop_ids = source.stop_ids[:1]
    [row] = run({"tutor": tutor}, start, 1)[0]
    hook.remove()
    assert row["messages"] == gold
    prompts = [ask("tutor", scenario, gold[:n], 0).messages for n in range(0, len(gold), 2)]
    lengths = [len(source.chat.encode_prompt(prompt)) for prompt in prompts]
    length = lengths[-1] + len(speaking)
    assert sum(lengths) > 3 * length  # what a fresh cache at each turn would run
    assert sum(sizes) <= length + len(gold)


def test_ended_dialogues_make_room_and_are_yielded_at_once(voice):
    order = []
    starts = [lambda one=one: converse(one, 0, world_seed=1) for one in world_scenarios(5)]
    for number, rows in talk(((i, s()) for i, s in enumerate(starts)), {"tutor": voice(2)}, 2):
        order.append(number)
        assert len(rows) == 1
    assert sorted(order) == list(range(5))
