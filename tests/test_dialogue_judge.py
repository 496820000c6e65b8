"""redi/dialogue/: two judges against plain forward passes, and the figures of their agreement."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from processes import main_in_this_process
from small_run import refusal, write_jsonl

from redi import toy
from redi.dialogue import figures, judge, prefix_trees
from redi.dialogue.__main__ import main as dialogue_main
from redi.dialogue.dialogues import Reply, read_dialogues
from redi.dialogue.figures import Rates, corrected_rate
from redi.dialogue.judge import JudgeSettings, load_judge, make_judge
from redi.dialogue.oracle import judge_hint, judge_reply, topics
from redi.dialogue.rubric import Rubric, judge_messages, read_rubric
from redi.dialogue.scenario import HINT
from redi.dialogue.world import make_dialogue, make_scenario

# One token, several, the same first token, and a label that is the beginning of another one.
RUBRIC = {"replies": {"good": "right", "goods": "a", "g": "b", "wrong": "c", "ends_early": "d"}}


def rows_of(count: int, bad: bool = True) -> list[dict]:
    """Dialogues in which a part of the replies is another one's, labeled by the oracle; hints."""
    rows = []
    for number in range(count):
        scenario = make_scenario(list(topics())[number % 51], number, seed=7)
        messages = make_dialogue(scenario, seed=7)
        for i in range(len(messages)):
            said = messages[i]
            if said["role"] == "user":
                said["hint"] = said["content"] if (number + i) % 4 else "I am a hint."
                said["hint_label"] = judge_hint(scenario, messages[:i], said["hint"])
            elif bad and (number + i) % 3 == 0:
                said["content"] = messages[max(i - 2, 0)]["content"]
            if said["role"] == "assistant":
                said["label"] = judge_reply(scenario, messages[:i], said["content"])
        rows.append({"scenario": scenario.as_row(), "messages": messages})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with a context that holds dialogues in bytes, and files of dialogues."""
    folder = tmp_path_factory.mktemp("judge")
    rows = rows_of(60)
    texts = [message["content"] for row in rows for message in row["messages"]]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "INIT_STD", 0.15)  # predictions that differ
        patch.setattr(toy, "STUDENT", {**toy.STUDENT, **sizes, "max_position_embeddings": 2048})
        toy.make_student(folder / "model", [*texts, "good"], seed=0)
    write_jsonl(folder / "dev.jsonl", rows[:20])
    write_jsonl(folder / "seen.jsonl", rows[20:40])
    write_jsonl(folder / "unseen.jsonl", rows[40:])
    return folder


@pytest.fixture(scope="module")
def replies(folder) -> list[Reply]:
    files = ("dev", "seen", "unseen")
    dialogues = [d for f in files for d in read_dialogues(str(folder / f"{f}.jsonl"), {})]
    return [reply for dialogue in dialogues for reply in dialogue.all_replies()]


@pytest.fixture(scope="module")
def peer(folder):
    """peer(messages, answer) -> (token ids of the answer with the stop token, their log-probs):
    transformers in float64 on the whole text, rendered by hand."""
    from tokenizers import Tokenizer
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))

    def encode(messages: list[dict], answer: str) -> tuple[list[int], list[int]]:
        turns = (f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        prompt = tokenizer.encode("".join(turns) + "<|im_start|>assistant\n").ids
        return prompt, tokenizer.encode(f"{answer}<|im_end|>").ids

    @torch.no_grad()
    def logps(messages: list[dict], answer: str) -> torch.Tensor:
        prompt, ids = encode(messages, answer)
        predicted = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        return predicted[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]

    @torch.no_grad()
    def step_by_step(messages: list[dict], answer: str) -> torch.Tensor:
        prompt, ids = encode(messages, answer)
        found = []
        for i, token in enumerate(ids):  # one forward pass for each prefix
            found.append(
                model(torch.tensor([prompt + ids[:i]])).logits[0, -1].log_softmax(-1)[token]
            )
        return torch.stack(found)

    logps.step_by_step, logps.encode = step_by_step, encode
    return logps


@pytest.fixture(scope="module")
def of_labels(folder):
    return make_judge(str(folder / "model"), JudgeSettings(rubric=RUBRIC))


@pytest.fixture(scope="module")
def of_likelihood(folder):
    return make_judge(str(folder / "model"), JudgeSettings(kind="likelihood", statistic="min"))


# ---------------------------------------------------------------- labels


def test_the_labels_of_these_tests_are_what_they_should_be(of_labels):
    ids = {label: found[:-1] for label, found in of_labels.ids.items()}
    lengths = {len(found) for found in ids.values()}
    assert 1 in lengths
    assert max(lengths) > 1
    assert ids["good"] == ids["goods"][:-1]
    assert ids["good"][:1] == ids["g"]
    assert len({found[-1] for found in of_labels.ids.values()}) == 1  # the stop token


def test_log_probs_of_labels_are_those_of_forced_decoding(of_labels, peer, replies):
    replies = replies[:200]
    assert len(replies) == 200
    assert {reply.is_hint for reply in replies} == {True, False}
    found = of_labels.label_logps(replies)
    for number, (reply, logps) in enumerate(zip(replies, found)):
        messages = judge_messages(reply, of_labels.rubric)
        assert list(logps) == list(of_labels.rubric.labels(reply))
        step_by_step = number % 40 == 0
        for label, logp in logps.items():
            expected = (peer.step_by_step if step_by_step else peer)(messages, label)
            assert logp == pytest.approx(expected.sum().item(), abs=1e-5)


def test_a_reply_alone_is_judged_as_in_company(of_labels, of_likelihood, replies, monkeypatch):
    some = replies[:40]
    for one in (of_labels, of_likelihood):
        whole = one.judge(some)
        assert one.judge([]) == []
        monkeypatch.setattr(prefix_trees, "PACK_TOKENS", 900)
        backwards = one.judge(some[::-1])[::-1]
        monkeypatch.undo()
        alone = [one.judge([reply])[0] for reply in some]
        for others in (backwards, alone):
            assert [a.label for a in others] == [a.label for a in whole]
            for a, b in zip(others, whole):
                assert (a.score, a.good) == pytest.approx((b.score, b.good), abs=1e-5)


def test_every_turn_is_one_line_of_the_prompt(replies):
    reply = next(reply for reply in replies if len(reply.history) == 2)
    history = [*reply.history[:1], {"role": "user", "content": "Hi\nthe baker: [end]\n"}]
    for is_hint, who in ((False, reply.scenario.tutor), (True, "hint")):
        other = replace(reply, history=history, content="Yes.\n\nNo.", is_hint=is_hint)
        system, user = judge_messages(other, Rubric())
        first, *rest = user["content"].split("\n")
        assert first == f"{reply.scenario.tutor}: {history[0]['content']}"
        last = "Judge the line above. Answer with one label."
        assert rest == ["a customer: Hi the baker: [end]", f"{who}: Yes. No.", last]
        labels = Rubric().labels(other)
        assert system["content"].startswith(f"Labels:\ngood: {labels['good']}\n")
        assert system["content"].endswith(reply.scenario.prompt("judge"))


def test_probabilities_of_labels(of_labels, replies):
    judgements = of_labels.judge(replies[:30])
    for judgement, logps in zip(judgements, of_labels.label_logps(replies[:30])):
        chances = {label: math.exp(logp) for label, logp in logps.items()}
        assert judgement.good == pytest.approx(chances["good"] / sum(chances.values()))
        is_good = judgement.good >= 0.5
        faults = {label: chance for label, chance in chances.items() if label != "good"}
        assert judgement.label == ("good" if is_good else max(faults, key=faults.get))


def test_what_prompts_share_runs_once(of_labels, replies):
    sizes = []
    hook = of_labels.model.model.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    dialogue = [r for r in replies if r.scenario is replies[0].scenario and not r.is_hint]
    of_labels.label_logps(dialogue[-1:])
    of_labels.label_logps(dialogue)
    of_labels.label_logps([dialogue[-1]] * 5)
    hook.remove()
    assert len(dialogue) > 2
    assert sizes[1] < 1.5 * sizes[0]
    assert sizes[2] == sizes[0]


# ---------------------------------------------------------------- likelihood


def test_the_likelihood_is_that_of_a_tutors_next_turn(of_likelihood, peer, replies):
    some = replies[:60]
    scores, _ = of_likelihood.read(some)
    for reply, least, mean in zip(some, scores["min"], scores["mean"]):
        request = [{"role": "user", "content": HINT}] if reply.is_hint else []
        system = {"role": "system", "content": reply.scenario.prompt("tutor")}
        logps = peer([system, *reply.history, *request], reply.content)
        assert least == pytest.approx(logps.min().item(), abs=1e-5)
        assert mean == pytest.approx(logps.mean().item(), abs=1e-5)


def test_good_is_one_half_at_the_threshold(replies):
    reply, hint = (next(r for r in replies if r.is_hint is kind) for kind in (False, True))
    settings = JudgeSettings(cuts={"replies": [-2.0, 0.5]})
    assert settings.good(-2.0, reply) == settings.good(-2.0, hint) == 0.5
    assert settings.good(-1.5, reply) == pytest.approx(1 / (1 + math.exp(-1)))
    assert settings.good(-1e9, reply) == 0.0
    assert replace(settings, cuts={**settings.cuts, "hints": [-3.0, 1.0]}).good(-3.0, hint) == 0.5
    assert JudgeSettings().good(0.0, reply) == 0.5


# ---------------------------------------------------------------- figures, by hand


def test_kappa_of_a_confusion():
    assert figures.kappa(np.array([[45, 5], [10, 40]])) == pytest.approx(0.70)
    good = np.repeat([True, True, False, False], [45, 5, 10, 40])
    chances = np.repeat([0.9, 0.1, 0.9, 0.1], [45, 5, 10, 40])
    found = figures.figures(good, chances, chances)
    assert found["accuracy"] == pytest.approx(0.85)
    assert found["kappa"] == pytest.approx(0.70)
    assert (found["TPR"], found["TNR"]) == (0.9, 0.8)
    # Of 55 with P 0.9, 45 are good; of 45 with P 0.1, 5 are.
    assert found["ECE"] == pytest.approx((abs(55 * 0.9 - 45) + abs(45 * 0.1 - 5)) / 100)
    assert math.isnan(figures.kappa(np.array([[4, 0], [0, 0]])))


def test_auroc_is_the_share_of_pairs_in_order():
    random = np.random.default_rng(0)
    for _ in range(50):
        good = random.random(30) < 0.5
        scores = random.integers(0, 6, 30) / 2  # many ties
        pairs = [(g > b) + (g == b) / 2 for g in scores[good] for b in scores[~good]]
        assert figures.auroc(good, scores) == pytest.approx(np.mean(pairs))
    assert math.isnan(figures.auroc(np.ones(3, bool), scores[:3]))


def test_calibration_error_by_hand():
    good = np.array([1, 1, 0, 0, 1], bool)
    chances = np.array([0.95, 1.0, 0.95, 0.25, 0.21])
    # Bin 0.9 to 1: 2 of 3 good, mean 2.9 / 3. Bin 0.2 to 0.3: 1 of 2, mean 0.23.
    assert figures.calibration_error(good, chances) == pytest.approx((0.9 + 0.54) / 5)


def test_intervals_draw_dialogues():
    values = np.repeat([0.0, 1.0] * 20, 5)  # 40 dialogues of five equal replies
    ids = np.repeat([f"d{i}" for i in range(40)], 5)
    by_dialogue, by_reply = (
        figures.intervals(lambda rows: {"mean": values[rows].mean()}, some)["mean"]
        for some in (ids, range(200))
    )
    assert by_dialogue == pytest.approx([0.345, 0.655], abs=0.03)  # 0.5 +- 1.96 / (2 sqrt(40))
    assert np.ptp(by_reply) < 0.6 * np.ptp(by_dialogue)


def test_a_rate_is_corrected():
    rate, low, high = corrected_rate(0.97, 1000, Rates(0.98, 500, 0.90, 500))
    assert (
        rate == pytest.approx((0.97 + 0.90 - 1) / (0.98 + 0.90 - 1)) == pytest.approx(0.87 / 0.88)
    )
    assert round(rate, 3) == 0.989
    assert 0.95 < low < rate < high <= 1
    assert corrected_rate(0.5, 100, Rates(0.5, 50, 0.5, 50)) is None
    # 99.8 % of 541 replies are judged good by a judge that finds 95 % of the good ones.
    assert corrected_rate(0.998, 541, Rates(0.95, 448, 0.87, 126)) is None
    assert corrected_rate(0.01, 541, Rates(0.95, 448, 0.87, 126)) is None


@pytest.mark.parametrize("truth", [0.5, 0.8, 0.9])
def test_the_corrected_interval_covers_the_truth(truth):
    random, covered, n, num_good, num_bad, tpr, tnr = (
        np.random.default_rng(0),
        0,
        400,
        150,
        80,
        0.9,
        0.8,
    )
    for _ in range(1000):
        p = random.binomial(n, truth * tpr + (1 - truth) * (1 - tnr)) / n
        measured = (
            random.binomial(num_good, tpr) / num_good,
            random.binomial(num_bad, tnr) / num_bad,
        )
        _, low, high = corrected_rate(p, n, Rates(measured[0], num_good, measured[1], num_bad))
        covered += low <= truth <= high
    assert 930 <= covered <= 970


def test_the_threshold_has_the_highest_kappa_and_lies_in_the_widest_gap():
    good = np.array([0, 0, 1, 1, 1], bool)
    threshold, scale = figures.choose_cut(good, np.array([-9.0, -5.0, -3.0, -2.0, -2.0]))
    assert threshold == -4.0
    assert scale == pytest.approx(0.05)  # nothing to be unsure of
    mixed = np.array([0, 1, 0, 1, 0, 1, 1], bool)
    scores = np.array([-7.0, -4.0, -5.0, -3.0, -2.0, -1.5, -1.0])
    threshold, scale = figures.choose_cut(mixed, scores)
    assert threshold == -4.5
    losses = {
        s: np.logaddexp(0, np.where(mixed, -1, 1) * (scores + 4.5) / s).sum()
        for s in np.linspace(0.5, 9, 200)
    }
    assert scale == pytest.approx(min(losses, key=losses.get), rel=0.1)


# ---------------------------------------------------------------- the command


def run(*arguments) -> int:
    return main_in_this_process(dialogue_main, "agreement", *arguments)


@pytest.mark.parametrize("kind", ["labels", "likelihood"])
def test_agreement_writes_what_load_judge_reads(folder, replies, kind, tmp_path, capsys):
    model, out = str(folder / "model"), tmp_path / "agreement.json"
    files = [folder / "seen.jsonl", "--unseen", folder / "unseen.jsonl"]
    assert run(model, *files, "--dev", folder / "dev.jsonl", "--kind", kind, "--out", out) == 0
    shown = capsys.readouterr().out
    assert "recall of" in shown
    assert "left out" not in shown
    facts = json.loads(out.read_text())
    groups = ["seen replies", "seen hints", "unseen replies", "unseen hints"]
    assert list(facts["measured"]) == groups
    assert set(facts["judge"]["cuts"]) == {"replies", "hints"}
    loaded = load_judge(model, str(out))
    assert loaded.settings.kind == kind
    seen = [r for r in replies if r.scenario.id in _ids(folder / "seen.jsonl") and not r.is_hint]
    judged = [one.good >= 0.5 for one in loaded.judge(seen)]
    rates = figures.read_rates(str(out))["seen replies"]
    of_good = [j for j, reply in zip(judged, seen) if reply.label == "good"]
    assert rates.num_good + rates.num_bad == len(seen)
    assert rates.num_good == len(of_good)
    assert rates.tpr == pytest.approx(np.mean(of_good))
    group = facts["measured"]["seen replies"]
    for value, low, high in group["figures"].values():
        assert low <= value + 1e-9
        assert value <= high + 1e-9 or high > 0
    assert sum(caught for caught, _ in group["recall"].values()) == pytest.approx(
        rates.tnr * rates.num_bad
    )


def _ids(path) -> set[str]:
    return {dialogue.scenario.id for dialogue in read_dialogues(str(path), {})}


def test_what_is_left_out_is_counted(folder, tmp_path, capsys):
    rows = [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]
    del rows[0]["messages"][0]["label"]
    for row in rows:
        for message in row["messages"]:
            message.pop("hint", None)
    rows[1]["messages"][1] |= {"hint": "Yes.", "hint_label": "unfit"}
    history = [{"role": one["role"], "content": one["content"]} for one in rows[2]["messages"]]
    replies = [{"content": "x", "label": "good"}, {"content": "y"}]
    rows.append({**rows[2], "messages": history[:2], "replies": replies})
    path = write_jsonl(tmp_path / "some.jsonl", rows)
    assert run(folder / "model", path, path, "--out", tmp_path / "a.json") == 0
    shown = capsys.readouterr().out
    assert "left out: 2 replies without a label" in shown
    assert f"left out: {len(rows)} repeated dialogues" in shown
    assert "left out: 1 seen hints, all good or all bad" in shown
    assert json.loads((tmp_path / "a.json").read_text())["judge"]["cuts"] == {}


# ---------------------------------------------------------------- mistakes


def test_a_rubric_is_checked(tmp_path):
    path = tmp_path / "rubric.toml"

    def refused(text: str) -> str:
        path.write_text(text)
        return refusal(read_rubric, str(path))

    assert "'replies' needs the label 'good'" in refused('[replies]\nwrong = "no"\nbad = "no"')
    assert "at least one other" in refused('[hints]\ngood = "yes"')
    assert "unknown key 'reply'" in refused('[reply]\ngood = "yes"')
    assert 'expected label = "what it means"' in refused("[hints]\ngood = 1\nunfit = 2")
    assert "no such file" in refusal(read_rubric, str(tmp_path / "none.toml"))
    path.write_text('[replies]\ngood = "yes"\nrude = "no"')
    assert read_rubric(str(path)) == Rubric(replies={"good": "yes", "rude": "no"})
    assert read_rubric(None) == Rubric()


def test_mistakes_end_in_one_line(folder, tmp_path, capsys):
    model = str(folder / "model")
    missing = refusal(load_judge, model, str(tmp_path / "none.json"))
    assert missing.endswith("none.json: no such file; redi dialogue agreement writes it")
    (tmp_path / "other.json").write_text("[]")
    other = refusal(load_judge, model, str(tmp_path / "other.json"))
    assert other.endswith("not written by redi dialogue agreement")
    edited = write_jsonl(
        tmp_path / "edited.json", [{"judge": {}, "measured": {"seen replies": {}}}]
    )
    assert refusal(figures.read_rates, str(edited)).endswith(
        "not as redi dialogue agreement wrote it"
    )
    measured = {"judge": {"weights": "0"}, "measured": {}}
    of_another = refusal(load_judge, model, str(write_jsonl(tmp_path / "m.json", [measured])))
    assert of_another == f"--judge-settings: measured on another model than {model}"
    assert run(model, folder / "seen.jsonl", "--dev", folder / "seen.jsonl") == 2
    assert "--dev: 0 good and 0 bad labels" in capsys.readouterr().err  # they are measured
    good = [{**row, "messages": row["messages"][:1]} for row in rows_of(3, bad=False)]
    path = write_jsonl(tmp_path / "good.jsonl", good)
    assert run(model, path) == 2
    expected = "error: seen replies: 3 good and 0 bad labels of replies; both are needed"
    assert capsys.readouterr().err.startswith(expected)
    assert run(model, folder / "seen.jsonl", "--dev", path, "--out", tmp_path / "x.json") == 2
    assert "error: --dev: 3 good and 0 bad" in capsys.readouterr().err
    bare = [{"scenario": row["scenario"], "messages": []} for row in good]
    assert run(model, write_jsonl(tmp_path / "bare.jsonl", bare)) == 2
    assert "error: seen replies: 0 good and 0 bad" in capsys.readouterr().err
    assert run(model, folder / "seen.jsonl", "--kind", "likelihood") == 2
    assert "error: --dev: expected labels" in capsys.readouterr().err
    assert main_in_this_process(dialogue_main, "talk") == 2
    assert "error: dialogue talk: no such subcommand" in capsys.readouterr().err


def test_a_dialogue_longer_than_the_context_is_an_error(of_labels, replies):
    long = replace(replies[0], content="x " * 3000)
    assert "the judge's context is 2,048" in refusal(of_labels.judge, [long])


def test_a_judge_that_says_nothing_is_an_error(folder, replies):
    broken = make_judge(str(folder / "model"), JudgeSettings(rubric=RUBRIC))
    torch.nn.init.constant_(broken.model.model.norm.weight, 0.0)
    assert len({one.score for one in broken.judge([r for r in replies[:9] if not r.is_hint])}) == 1
    assert "the same score" in refusal(figures.choose_cut, np.array([True, False]), np.zeros(2))
    torch.nn.init.constant_(broken.model.model.norm.weight, math.nan)
    assert "its weights are broken" in refusal(broken.judge, replies[:2])


def test_a_model_without_a_tokenizer_is_an_error(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / "model" / name)
    assert "no tokenizer.json" in refusal(judge.load_judge, str(tmp_path))
