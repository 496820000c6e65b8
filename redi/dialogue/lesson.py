"""A scenario in `redi chat`: how it begins, and what is printed before and after it.

The tutor's words are those that redi dialogue evaluate samples as sample 0, if the student says the
same; /retry is the next sample.
"""

from dataclasses import dataclass

from redi.data.files import Row
from redi.data.tokenizer import Message, is_answer
from redi.dialogue.dialogues import Dialogue, conversation
from redi.dialogue.judge import Judge, load_judge
from redi.dialogue.scenario import Scenario, read_scenarios, split_end, words_used
from redi.dialogue.talk import num_replies, turn_key
from redi.distributed import World
from redi.tables import text_table


@dataclass(frozen=True)
class Lesson:
    scenario: Scenario
    judge: Judge | None

    @classmethod
    def load(cls, file: str, judge: str | None, settings: str | None, world: World) -> "Lesson":
        """The first scenario of a file, and a judge. Raises UserError."""
        scenario = next(read_scenarios(file))
        return cls(scenario, load_judge(judge, settings, world) if judge else None)

    def scene(self) -> str:
        """What the student is told, and the commands."""
        commands = "/hint: what you could say; /help: all commands"
        return f"{self.scenario.prompt('student')}\n{commands}\n"

    def begin(self) -> list[Message]:
        """The tutor's prompt and, if the scenario has one, its opening."""
        opening = self.scenario.opening
        said = [{"role": "assistant", "content": opening}] if opening else []
        return conversation("tutor", self.scenario, said)

    def key(self, messages: list[Message], attempt: int, who: str) -> int:
        return turn_key(self.scenario.id, attempt, num_replies(messages), who)

    def row(self, messages: list[Message]) -> Row:
        """For a file that redi dialogue prepare reads."""
        return {"scenario": self.scenario.as_row(), "messages": messages[1:]}

    def is_ended_by(self, messages: list[Message]) -> bool:
        return is_answer(messages[-1]) and split_end(messages[-1]["content"])[1]

    def summary(self, messages: list[Message]) -> str:
        """How far the dialogue came, the words that were practiced, and the judge's verdicts."""
        words, used = self.scenario.words, words_used(self.scenario, messages)
        state = "done" if self.is_ended_by(messages) else "not finished"
        lines = [f"{state}: {'; '.join(self.scenario.tasks)}"]
        if words:
            lines.append(f"words practiced: {len(used)} of {len(words)} ({', '.join(used)})")
        if self.judge:
            replies = list(Dialogue(self.scenario, messages[1:], []).all_replies())
            found = zip(replies, self.judge.judge(replies))
            lines.append(text_table([(j.label, split_end(r.content)[0]) for r, j in found]))
        return "\n".join(lines)
