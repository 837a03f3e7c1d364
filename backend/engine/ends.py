"""What the model says after prompts that it has read: a prompt that comes again, all of it in the cache, is not
evaluated at all. So a reply that is asked for again begins with the numbers that it began with the first time, also
where one token alone would be rounded otherwise than at the end of a prompt.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from backend.engine.request import Request

MOST = 16  # prompts; each takes a row of logits, up to half a megabyte


class Ends:
    """Logits after whole prompts, the latest. Belongs to the engine thread."""

    def __init__(self) -> None:
        self._rows: OrderedDict[tuple[bytes, tuple[int, ...]], torch.Tensor] = OrderedDict()

    def remember(self, request: Request, logits: torch.Tensor) -> None:
        """float32 (vocab,) after the request's prompt, all of them finite."""
        if not request.use_cache:
            return
        self._rows[request.salt, request.prompt] = logits.clone()  # the step's own tensor may be used again
        self._rows.move_to_end((request.salt, request.prompt))
        if len(self._rows) > MOST:
            self._rows.popitem(last=False)

    def after(self, request: Request) -> torch.Tensor | None:
        """float32 (vocab,) after the request's prompt, if it has said nothing yet and that is all it wants to know."""
        asks_more = request.score_prompt or request.partner is not None or not request.use_cache
        if asks_more or request.completion_tokens:  # when its middle is forgotten, ids may be as many as the prompt's
            return None
        return self._rows.get((request.salt, request.prompt))

    def clear(self) -> None:
        self._rows.clear()
