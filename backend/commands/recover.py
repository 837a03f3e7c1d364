"""python -m backend recover alpaca | vicuna | koala: apply a published weight diff to the base model."""

from __future__ import annotations

import argparse
from pathlib import Path

from backend.commands.terminal import ProgressBar
from backend.convert.alpaca import PUBLISHED_SUM, recover_alpaca
from backend.convert.koala import recover_koala
from backend.convert.output import check_target
from backend.convert.vicuna import VERSIONS, recover_vicuna

HELP = "apply a weight diff (Alpaca, Vicuna, Koala) to its base model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    families = parser.add_subparsers(dest="family", required=True, metavar="FAMILY")
    alpaca = families.add_parser("alpaca", help="Stanford Alpaca: float32, one token more than LLaMA")
    _paths(alpaca, "--diff", "folder of the weight diff")
    alpaca.add_argument("--check-sum", action="store_true", help="check the sum that was published for Alpaca 7B")
    alpaca.add_argument("--expected-sum", type=float, metavar="VALUE", help="check another sum over all weights")
    vicuna = families.add_parser("vicuna", help="Vicuna v0 and v1.1: float16")
    _paths(vicuna, "--delta", "folder of the delta")
    vicuna.add_argument("--version", choices=VERSIONS, help="default: by the shapes")
    koala = families.add_parser("koala", help="Koala: an EasyLM diff stream")
    _paths(koala, "--diff", "the EasyLM stream of the diff")
    koala.add_argument("--to", choices=("hf", "easylm"), default="hf", help="what to write (default: %(default)s)")
    koala.add_argument("--heads", type=int, metavar="N", help="attention heads, where the size does not tell")
    koala.add_argument("--tokenizer", type=Path, metavar="PATH", help="tokenizer.model or a folder with it")


def run(arguments: argparse.Namespace) -> int:
    base, out = arguments.base, arguments.out
    change: Path = arguments.delta if arguments.family == "vicuna" else arguments.diff
    check_target(out, [base, change], arguments.force)
    bar = ProgressBar()
    try:
        if arguments.family == "alpaca":
            expected = arguments.expected_sum
            if expected is None and arguments.check_sum:
                expected = PUBLISHED_SUM
            total = recover_alpaca(base, change, out, expected, bar)
            said = f"Alpaca, all weights sum up to {total:.4f} as expected" if expected is not None else "Alpaca"
        elif arguments.family == "vicuna":
            said = f"Vicuna {recover_vicuna(base, change, out, arguments.version, bar)}"
        else:
            stream = arguments.to == "easylm"
            config = recover_koala(base, change, out, bar, stream, arguments.heads, arguments.tokenizer)
            said = f"Koala, {config.parameters() / 1e9:.1f}B parameters"
    finally:
        bar.close()
    print(f"{out}: {said}")
    return 0


def _paths(parser: argparse.ArgumentParser, change: str, said: str) -> None:
    parser.add_argument("--base", type=Path, required=True, metavar="PATH", help="the original model")
    parser.add_argument(change, type=Path, required=True, metavar="PATH", help=said)
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="where to write")
    parser.add_argument("--force", action="store_true", help="write over what is there")
    # The only way there is here; accepted because the original commands have it as an option.
    parser.add_argument("--low-memory", action="store_true", help=argparse.SUPPRESS)
