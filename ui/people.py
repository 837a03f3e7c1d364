"""From a Gradio request to the session of the person who made it."""

from __future__ import annotations

import gradio as gr

from ui.sessions import Registry, Session


def hash_of(request: gr.Request) -> str:
    """The id Gradio gives to one loaded page."""
    return str(request.session_hash or "")


def owner_of(request: gr.Request) -> str:
    """The login, where logins are asked for: one person's tab id is worth nothing to another."""
    return str(request.username or "")


def session_of(registry: Registry, request: gr.Request) -> Session:
    """Everything a handler may touch belongs to this session."""
    return registry.get(hash_of(request), owner_of(request))
