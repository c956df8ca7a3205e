"""The command line: ``sparsebreg`` and ``python -m sparsebreg``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import sparsebreg as sb
from sparsebreg.errors import SparsebregError
from sparsebreg.experiments.data import DATASETS
from sparsebreg.experiments.train import METHODS, SCHEDULES, Config, train
from sparsebreg.models import MODELS


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparsebreg", description=sb.__doc__)
    parser.add_argument("--version", action="version", version=f"sparsebreg {sb.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="backend, instruction set, threads, OpenMP runtimes, and why")
    one = commands.add_parser("train", help="one training run")
    many = commands.add_parser("compare", help="several methods and seeds on the same task")
    one.add_argument("--method", default="ml-linbreg", help=f"one of {', '.join(METHODS)}")
    one.add_argument("--seed", type=int, default=0)
    many.add_argument("--methods", type=_list, default=["sgd", "ml-linbreg"], help="names with commas between them")
    many.add_argument("--seeds", type=_list, default=["0"], help="numbers with commas between them")
    for p in (one, many):
        p.add_argument("--data", default="digits", help=f"one of {', '.join(DATASETS)}")
        p.add_argument("--data-dir", help="folder with the data set's files")
        p.add_argument("--model", default="mlp", help=f"one of {', '.join(MODELS)}")
        p.add_argument("--coarse-steps", type=int, help="coarse steps per fine step (ml- methods)")
        p.add_argument("--lam", type=float, help="weight λ of the regularizer")
        p.add_argument("--epochs", type=int, default=5)
        p.add_argument("--batch-size", type=int, default=128)
        p.add_argument("--lr", type=float, help="default: the method's own")
        p.add_argument("--momentum", type=float, help="default: the method's own")
        p.add_argument("--delta", type=float, default=1.0, help="elastic-net parameter δ")
        p.add_argument("--weight-decay", type=float, default=0.0)
        p.add_argument("--init-density", type=float, help="density of the sparse start")
        p.add_argument("--schedule", default="cosine", help=f"of the learning rate: one of {', '.join(SCHEDULES)}")
        p.add_argument("--threads", type=int, help="default: torch's")
        p.add_argument("--out", required=True, help="folder for the results")
        p.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _progress(quiet: bool):
    if quiet:
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    # One line per few seconds where the output is not a terminal, so that a log stays readable.
    live = sys.stderr.isatty()
    return lambda **k: tqdm(**k, unit="step", mininterval=0.2 if live else 10, dynamic_ncols=live, ascii=not live)


def _config(args: argparse.Namespace) -> Config:
    names = Config.__dataclass_fields__
    return Config(**{k: v for k, v in vars(args).items() if k in names})


def _train(args: argparse.Namespace) -> None:
    result = train(_config(args), _progress(args.quiet))
    print(
        f"{result['method']} on {result['data']}: test accuracy {result['test_accuracy']:.2f} %, "
        f"sparsity {100 * result['sparsity']:.1f} %, {result['train_seconds']:.2f} s of training steps "
        f"({result['backend']}, {result['threads']} threads)"
    )
    print(f"results: {Path(args.out) / 'result.json'}\nplot: {Path(args.out) / 'curves.png'}")


def _compare(args: argparse.Namespace) -> None:
    from sparsebreg.experiments.compare import compare, table

    try:
        seeds = [int(s) for s in args.seeds]
    except ValueError:
        raise ValueError(f"seeds: expected numbers, got {','.join(args.seeds)!r}") from None
    rows = compare(_config(args), args.methods, seeds, args.quiet)
    print(table(rows))
    print(f"plot: {Path(args.out) / 'curves.png'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 1 for an error that the user can mend, 2 for a wrong call."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "info":
            print(sb.info())
        elif args.command == "train":
            _train(args)
        else:
            _compare(args)
    except (SparsebregError, ValueError, TypeError) as error:
        print(f"sparsebreg: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sparsebreg: stopped", file=sys.stderr)
        return 130
    return 0
