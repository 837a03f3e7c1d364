"""A conversation as a tree of turns: edits and new answers make siblings, nothing that was said is thrown away.

Pure values and edits: no Gradio, no model, no locks. A `Conversation` belongs to one browser tab and is touched from
one event loop only. The path that is shown is the chain of chosen children from the root.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from backend.text.messages import Message, Role


@dataclass
class Turn:
    """One message in the tree. `children` are the versions of what came after it, `chosen` the one that is shown."""

    role: Role
    text: str
    parent: Turn | None = field(default=None, repr=False)
    children: list[Turn] = field(default_factory=list, repr=False)
    chosen: int = 0
    before: int = 0  # what was chosen before the newest version was added
    footer: str = ""  # how fast this reply came, in words
    left_out: int = 0  # of a reply: how many of the turns before it were not read, because the context was full

    def add(self, role: Role, text: str) -> Turn:
        """Append a new version of what follows this turn and show it."""
        turn = Turn(role, text, self)
        self.children.append(turn)
        self.before = self.chosen
        self.chosen = len(self.children) - 1
        return turn


class Conversation:
    """What one person and the model said to each other, all versions kept."""

    def __init__(self) -> None:
        self.system = ""
        self._root = Turn("system", "")

    def path(self) -> list[Turn]:
        """The turns that are shown, oldest first."""
        turns = []
        turn = self._root
        while turn.children:
            turn = turn.children[turn.chosen]
            turns.append(turn)
        return turns

    def messages(self) -> list[Message]:
        """What the model is asked: the system prompt, if there is one, and the shown turns."""
        head = [Message("system", self.system)] if self.system.strip() else []
        return head + [Message(turn.role, turn.text) for turn in self.path()]

    def left_out(self) -> int:
        """How many of the shown turns the newest reply was made without."""
        return next((turn.left_out for turn in reversed(self.path()) if turn.role == "assistant"), 0)

    def messages_read(self) -> list[Message]:
        """What is asked without the turns that the newest reply was made without."""
        messages, left_out = self.messages(), self.left_out()
        head = len(messages) - len(self.path())
        return [*messages[:head], *messages[head + left_out :]]

    def last(self) -> Turn | None:
        """The newest shown turn."""
        path = self.path()
        return path[-1] if path else None

    def add_user(self, text: str) -> Turn:
        """Append a message of the person at the end of what is shown."""
        return (self.last() or self._root).add("user", text)

    def edit_user(self, index: int, text: str) -> Turn:
        """Say something else at place `index` of the shown turns. What followed stays with the earlier version."""
        turn = self._at(index)
        if turn.role != "user":
            raise ValueError(f"turn {index} is the model's; only a person's own message can be edited")
        return _parent(turn).add("user", text)

    def open_reply(self) -> Turn:
        """Start an empty reply after the newest message of the person; one that is there becomes an earlier version."""
        turn = self.last()
        if turn is not None and turn.role == "assistant":
            turn = turn.parent
        if turn is None or turn.role != "user":
            raise ValueError("there is no message to answer")
        return turn.add("assistant", "")

    def discard(self, turn: Turn) -> None:
        """Take a turn and what follows it out of the tree; the version shown before it is shown again."""
        parent = _parent(turn)
        position = next(i for i, child in enumerate(parent.children) if child is turn)
        newest = position == len(parent.children) - 1
        del parent.children[position]
        parent.chosen = max(0, min(parent.before if newest else parent.chosen, len(parent.children) - 1))
        turn.parent = None

    def versions(self, turn: Turn) -> tuple[int, int]:
        """(place, count) of a turn among its versions, counted from 1."""
        siblings = _parent(turn).children
        return next(i for i, child in enumerate(siblings, 1) if child is turn), len(siblings)

    def step(self, turn: Turn, by: int) -> Turn:
        """Show the version `by` places away, as far as there are any."""
        place, count = self.versions(turn)
        parent = _parent(turn)
        parent.chosen = max(0, min(count - 1, place - 1 + by))
        return parent.children[parent.chosen]

    def _at(self, index: int) -> Turn:
        path = self.path()
        if not 0 <= index < len(path):
            raise ValueError(f"there is no turn {index}")
        return path[index]


def _parent(turn: Turn) -> Turn:
    if turn.parent is None:
        raise ValueError("this turn is not part of the conversation")
    return turn.parent
