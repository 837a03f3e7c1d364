"""The smallest file or folder of every format that is opened, for tests that damage them by the thousand.

    for specimen in write_specimens(tmp_path): specimen.folder, specimen.entry, specimen.files

Values are random: what counts is that every part of every format is there once. A specimen's folder holds nothing else.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests.smallfiles import Specimen, easylm, ggmls, ggufs, metas, settings
from tests.smallhf import adapters, plain_hf, quantised_hf, tokenizers


def write_specimens(root: Path) -> list[Specimen]:
    """All of them, each in a folder of its own under `root`. The same bytes each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        specimens = [*ggufs(root), *ggmls(root), *metas(root), *plain_hf(root), *quantised_hf(root)]
        return [*specimens, *adapters(root), easylm(root), *tokenizers(root), *settings(root)]
