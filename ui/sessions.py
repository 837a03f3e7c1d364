"""Who is here: one `Workspace` per browser tab (survives a reload), one `Session` per open page (does not).

A page is known by Gradio's session hash, a tab by a random id that it keeps for itself. Everything runs on the event
loop or in its short worker threads; one lock covers the two tables. Nothing here knows Gradio or the model.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Literal

from backend import persons
from backend.errors import UserError
from backend.events import Stats
from backend.generation import Generation
from backend.params import GenerationParams
from ui.conversation import Conversation, Turn
from ui.wording import footer

UNDO_LEVELS = 50
Kind = Literal["chat", "completion"]


@dataclass
class Workspace:
    """What one tab of one person holds. Only memory: a restart of the server forgets it."""

    params: GenerationParams | None = None  # None: whatever the loaded preset says
    picked: str = ""  # the sampling set whose values were last put into the page, until one of them is changed
    conversation: Conversation = field(default_factory=Conversation)
    draft: str = ""  # a message of which nothing came: it is put back into the box
    completion: str = ""
    earlier: deque[str] = field(default_factory=lambda: deque(maxlen=UNDO_LEVELS))  # completion texts to undo to

    def clear_chat(self) -> None:
        """An empty conversation with the same system prompt."""
        system = self.conversation.system
        self.conversation, self.draft = Conversation(), ""
        self.conversation.system = system


@dataclass
class Run:
    """One reply on its way, from the press of Send to its end. Made before the model is asked."""

    params: GenerationParams
    typed: str = ""  # goes back into the box when nothing came of it
    added: Turn | None = None  # the message of the person that this run added
    reply: Turn | None = None
    generation: Generation | None = None
    stats: Stats = field(default_factory=Stats)
    left_out: int = 0  # turns that are not read, because the context is full
    error: str | None = None
    reason: str | None = None
    started: bool = False
    stopped: bool = False
    done: bool = False  # nothing is added to its text any more

    def stop(self) -> None:
        """End the reply within one engine step. Also before the model was asked; never blocks."""
        self.stopped = True
        if self.generation is not None:
            self.generation.stop()


@dataclass
class Session:
    """One open page. A page has at most one run of each kind."""

    workspace: Workspace
    key: tuple[str, str]
    runs: dict[Kind, Run] = field(default_factory=dict)

    @property
    def person(self) -> str:
        """Whom the engine takes this page for."""
        return persons.by_page(*self.key)

    def begin(self, kind: Kind, run: Run) -> None:
        """Put a run in its place, or raise when one is there already."""
        current = self.runs.get(kind)
        if current is not None and not current.done:
            raise UserError("The last reply is still being written; press Esc to stop it first.")
        self.runs[kind] = run

    def fresh(self, kind: Kind) -> Run | None:
        """The run that has been begun and not yet started, once."""
        run = self.runs.get(kind)
        if run is None or run.started:
            return None
        run.started = True
        return run

    def take_done(self, kind: Kind) -> Run | None:
        """The run that has ended, once."""
        run = self.runs.get(kind)
        if run is None or not run.done:
            return None
        return self.runs.pop(kind)

    def drop(self, kind: Kind) -> None:
        """End a run and forget it: nothing of it is shown any more."""
        run = self.runs.pop(kind, None)
        if run is not None:
            run.stop()
            settle(self.workspace, run)

    def writing(self, kind: Kind) -> bool:
        """Whether a reply is on its way."""
        run = self.runs.get(kind)
        return run is not None and not run.done


class Registry:
    """All live pages and the workspaces of the last `keep` tabs."""

    def __init__(self, keep: int = 200, pages: int = 1000) -> None:
        self._keep = keep
        self._pages = pages  # a browser says when it goes; a program that only sends requests may not
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._workspaces: OrderedDict[tuple[str, str], Workspace] = OrderedDict()

    def open(self, session_hash: str, tab: str, owner: str = "") -> Session:
        """A page of tab `tab` has loaded: give it the tab's workspace; an earlier page of the same tab is over."""
        key = (owner, tab)
        with self._lock:
            gone = [name for name, session in self._sessions.items() if session.key == key or name == session_hash]
            stale = [self._sessions.pop(name) for name in gone]
            workspace = self._workspaces.pop(key, None) or Workspace()
            self._workspaces[key] = workspace
            while len(self._workspaces) > self._keep:
                self._workspaces.popitem(last=False)
            session = self._sessions[session_hash] = Session(workspace, key)
            while len(self._sessions) > self._pages:
                stale.append(self._sessions.popitem(last=False)[1])
        for old in stale:
            _end(old)
        return session

    def get(self, session_hash: str, owner: str = "") -> Session:
        """The session of a page; a page that outlived a restart of the server gets an empty one."""
        with self._lock:
            session = self._sessions.get(session_hash)
            if session is not None:
                self._sessions.move_to_end(session_hash)
        return session or self.open(session_hash, session_hash, owner)

    def close(self, session_hash: str) -> None:
        """The page is gone: stop what it was waiting for. Its workspace stays for a reload."""
        with self._lock:
            session = self._sessions.pop(session_hash, None)
        if session is not None:
            _end(session)

    def running(self) -> int:
        """How many replies are on their way, over all pages."""
        return sum(session.writing(kind) for session in self.sessions() for kind in list(session.runs))

    def sessions(self) -> list[Session]:
        """The live pages."""
        with self._lock:
            return list(self._sessions.values())


def settle(workspace: Workspace, run: Run) -> None:
    """Close a run, once: what was said stays; where nothing was said, the message goes back to the person."""
    if run.done:
        return
    run.done = True
    if run.reply is None:
        return
    if run.reply.text:
        run.reply.footer = footer(run.stats, run.reason or "cancelled", run.left_out)
        run.reply.left_out = run.left_out
        return
    workspace.conversation.discard(run.reply)
    if run.added is not None:
        workspace.conversation.discard(run.added)
        workspace.draft = run.typed


def _end(session: Session) -> None:
    for kind in list(session.runs):
        session.drop(kind)
