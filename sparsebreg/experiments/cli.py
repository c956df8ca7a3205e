"""The command line: ``sparsebreg`` and ``python -m sparsebreg``."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import sparsebreg as sb
from sparsebreg.core.errors import RunError, SparsebregError, expected
from sparsebreg.experiments.bench.cases import PARTS
from sparsebreg.experiments.bench.shapes import SUITES
from sparsebreg.experiments.data.datasets import DATASETS
from sparsebreg.experiments.runs.config import FORMATS, SCHEDULES, Config, read_toml
from sparsebreg.experiments.runs.methods import METHODS
from sparsebreg.experiments.runs.train import Stopped, train
from sparsebreg.models import MODELS
from sparsebreg.optim.initialize import DISTRIBUTIONS

#: Options of a comparison that are lists.
LISTS = ("methods", "seeds", "models", "data")


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparsebreg", description=sb.__doc__)
    parser.add_argument("--version", action="version", version=f"sparsebreg {sb.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    facts = commands.add_parser("info", help="backend, instruction set, threads, OpenMP runtimes, and why")
    facts.add_argument("--calibrate", action="store_true", help="first measure what layers cost here, and keep it")
    # What is not given stays out of the namespace: then a --config file or a default of Config counts.
    one = commands.add_parser("train", help="one training run", argument_default=argparse.SUPPRESS)
    many = commands.add_parser("compare", help="several methods, seeds and tasks", argument_default=argparse.SUPPRESS)
    one.add_argument("--method", help=f"one of {', '.join(METHODS)}")
    one.add_argument("--seed", type=int)
    one.add_argument("--data", help=f"one of {', '.join(DATASETS)}")
    one.add_argument("--model", help=f"one of {', '.join(MODELS)}")
    many.add_argument("--methods", type=_list, help=f"some of {', '.join(METHODS)}, with commas between them")
    many.add_argument("--seeds", type=_list, help="numbers with commas between them")
    many.add_argument("--data", type=_list, help=f"one or more of {', '.join(DATASETS)}")
    many.add_argument("--model", "--models", dest="models", type=_list, help=f"one or more of {', '.join(MODELS)}")
    for p in (one, many):
        p.add_argument("--config", help="a TOML file with options under these names; the command line wins")
        p.add_argument("--data-dir", help="folder with the data set's files (several data sets: their folders)")
        p.add_argument("--validation", type=float, help="fraction of the training images set aside")
        p.add_argument("--augment", action=argparse.BooleanOptionalAction, help="random crops and mirror images")
        p.add_argument("--epochs", type=int, help="default: 5, or the data set's own")
        p.add_argument("--batch-size", type=int)
        p.add_argument("--lr", type=float, help="default: the method's own")
        p.add_argument("--sparse-lr", type=float, help="that of regularised weights, as a multiple of --lr")
        p.add_argument("--warmup", type=float, help="epochs over which the learning rate rises")
        p.add_argument("--momentum", type=float, help="default: the method's own")
        p.add_argument("--delta", type=float, help="elastic-net parameter δ")
        p.add_argument("--weight-decay", type=float)
        p.add_argument("--lam", type=float, help="weight λ of the regularizer")
        p.add_argument("--target-sparsity", type=float, help="adapt λ to this fraction of zeros")
        p.add_argument(
            "--per-layer", action=argparse.BooleanOptionalAction, help="every large layer reaches a target of its own"
        )
        p.add_argument(
            "--ramp", type=float, help="fraction of the run over which the target moves from the sparsity of the start"
        )
        p.add_argument("--coarse-steps", type=int, help="coarse steps per fine step (ml- methods)")
        p.add_argument(
            "--keep-momentum",
            action=argparse.BooleanOptionalAction,
            help="of sleeping weights, over coarse steps (ml-linbreg)",
        )
        p.add_argument("--init-density", type=float, help="density of the sparse start")
        p.add_argument("--init-distribution", help=f"of the density over the layers: one of {', '.join(DISTRIBUTIONS)}")
        p.add_argument("--schedule", help=f"of the learning rate: one of {', '.join(SCHEDULES)}")
        p.add_argument("--threads", type=int, help="default: torch's")
        p.add_argument("--memory-format", help=f"of convolutions: one of {', '.join(FORMATS)}; auto: the faster one")
        p.add_argument("--checkpoint-minutes", type=float, help="time between checkpoints inside an epoch")
        p.add_argument("--out", help="folder for the results; a run that was stopped there goes on")
        p.add_argument("--restart", action="store_true", default=False, help="begin anew, whatever is in --out")
        p.add_argument("--quiet", action="store_true", default=False, help="no progress bar")
    one.add_argument("--progress", choices=("bar", "lines"), default="bar", help=argparse.SUPPRESS)
    bench = commands.add_parser(
        "bench", help="how much faster than dense torch, and whether that got worse", argument_default=argparse.SUPPRESS
    )
    bench.add_argument("--suite", help=f"one of {', '.join(SUITES)}, all (default)")
    bench.add_argument("--layers", type=_list, help="names of layers, norms and models (see the table)")
    bench.add_argument("--densities", type=_list, help="fractions of active weights, with commas between them")
    bench.add_argument("--batches", type=_list, help="batch sizes, with commas between them")
    bench.add_argument("--threads", type=_list, help="numbers of threads, with commas between them; default: torch's")
    bench.add_argument("--parts", type=_list, help=f"some of {', '.join(PARTS)}")
    bench.add_argument("--full", action="store_true", help="the full grid where nothing else is given; takes hours")
    bench.add_argument("--budget", type=float, help="seconds for each case (default 2), five rounds at least")
    bench.add_argument("--repeats", type=int, help="runs of the whole grid, of which the median ratio counts")
    bench.add_argument("--compare", metavar="OLD.json", help="exit status 1 where ratios of this bench.json fell")
    bench.add_argument("--tolerance", type=float, help="percent by which they may fall (default 10)")
    bench.add_argument("--out", help="folder for bench.json, bench.md and the plots")
    bench.add_argument("--quiet", action="store_true", default=False, help="no progress bar")
    page = commands.add_parser("report", help="one page about all runs in a folder")
    page.add_argument("folder", help="as given to --out of train or compare")
    return parser


class _Lines:
    """A progress bar for another process: how many steps of how many, a line every half second."""

    def __init__(self, total: int, initial: int = 0, **_: Any) -> None:
        self.done, self.total, self._at = initial, total, 0.0
        self.update(0)

    def update(self, n: int = 1) -> None:
        self.done += n
        if time.perf_counter() - self._at >= 0.5 or self.done == self.total:
            # A comparison that was killed reads no more; the run notices by itself, and saves its state first.
            with suppress(BrokenPipeError):
                print("progress", self.done, self.total, flush=True)
            self._at = time.perf_counter()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass

    def close(self) -> None:
        pass


def _progress(quiet: bool) -> Callable[..., Any] | None:
    if quiet:
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    # One line per few seconds where the output is not a terminal, so that a log stays readable.
    live = sys.stderr.isatty()
    options = {"mininterval": 0.2 if live else 10, "dynamic_ncols": live, "ascii": not live}
    return lambda **k: tqdm(**{"unit": "step", **options, **k})


def _options(args: argparse.Namespace, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """The options of the --config file and those of the command line, which win."""
    options = read_toml(args.config, more) if hasattr(args, "config") else {}
    options |= {k: v for k, v in vars(args).items() if k in Config.__dataclass_fields__ or k in more}
    if "out" not in options:
        raise ValueError(expected("out", "a folder for the results (--out)", "none"))
    return options


def _train(args: argparse.Namespace) -> None:
    config = Config(**_options(args)).resolved()
    before = (Path(config.out) / "result.json").exists() and not args.restart
    progress = _progress(args.quiet) if args.progress == "bar" else _Lines
    result = train(config, progress, args.restart)
    if before:
        print(f"finished before, not repeated (see --restart): {config.out}")
    print(
        f"{result['method']} on {result['data']}: test accuracy {result['test_accuracy']:.2f} %, "
        f"sparsity {100 * result['sparsity']:.1f} %, {result['train_seconds']:.2f} s of training steps "
        f"({result['backend']}, {result['threads']} threads)"
    )
    print(f"results: {Path(config.out) / 'result.json'}\nplot: {Path(config.out) / 'curves.png'}")


def _compare(args: argparse.Namespace) -> None:
    from sparsebreg.experiments.runs.compare import compare
    from sparsebreg.experiments.runs.plan import run_name
    from sparsebreg.experiments.runs.summary import table

    options = _options(args, (*LISTS, "command"))
    del options["command"]  # how a saved comparison was called
    lists = {"methods": ["sgd", "ml-linbreg"], "seeds": [0]}
    for name in LISTS:
        if name in options:
            value = options.pop(name)
            lists[name] = value if isinstance(value, list) else [value]
        if name in lists and not lists[name]:
            raise ValueError(expected(name, "at least one", "none"))
    given = lists.pop("seeds")
    try:
        seeds = [int(s) if isinstance(s, str) else s for s in given]
    except ValueError:
        raise ValueError(expected("seeds", "numbers", repr(given))) from None
    base = Config(**options)
    rows, failed = compare(base, lists.pop("methods"), seeds, **lists, progress=not args.quiet, restart=args.restart)
    if rows:
        print(table(rows))
    for key, message in failed.items():
        print(f"failed: {run_name(key)}: {message}")
    if rows:
        print(f"plot: {Path(base.out) / 'curves.png'}\nreport: {Path(base.out) / 'report.html'}")
    if failed:
        names = ", ".join(map(run_name, failed))
        raise RunError(expected("runs", "every one to finish", f"failures of {names}; the same command tries again"))


def _report(args: argparse.Namespace) -> None:
    from sparsebreg.experiments.runs.report import report

    for path in report(Path(args.folder)):
        print(path)


def _numbers(name: str, words: list[str], kind: type) -> list[Any]:
    try:
        return [kind(word) for word in words]
    except ValueError:
        raise ValueError(expected(name, "numbers", ", ".join(words))) from None


def _bench(args: argparse.Namespace) -> int:
    from sparsebreg.experiments.bench.options import Options
    from sparsebreg.experiments.bench.run import run

    given = {k: v for k, v in vars(args).items() if k in Options.__dataclass_fields__}
    if "out" not in given:
        raise ValueError(expected("out", "a folder for the results (--out)", "none"))
    for name, kind in (("densities", float), ("batches", int), ("threads", int)):
        if name in given:
            given[name] = _numbers(name, given[name], kind)
    found = run(Options(**given), _progress(args.quiet))
    return 1 if found is not None and found.worse else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status.

    0; 1 for an error that the user can mend, and for a benchmark that got worse; 2 for a wrong call; 128 + the signal's
    number for a run that was stopped.
    """
    args = _parser().parse_args(argv)
    try:
        if args.command == "info":
            if args.calibrate:
                print(sb.calibrate(), end="\n\n")
            print(sb.info())
        else:
            commands = {"train": _train, "compare": _compare, "report": _report, "bench": _bench}
            return commands[args.command](args) or 0
    except (SparsebregError, ValueError, TypeError) as error:
        print(f"sparsebreg: error: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(f"\nsparsebreg: {stop}", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("sparsebreg: stopped", file=sys.stderr)
        return 130
    return 0
