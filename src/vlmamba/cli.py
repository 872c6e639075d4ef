"""The command line: `vlmamba ask`, `chat`, `serve`, `train`, `data scenes|check`, `eval`, `score`, `report`, `info`,
`verify`.

The composition root: it alone knows every part of the package. Nothing heavy is imported before a command is known, so
that `vlmamba --help` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from itertools import islice
from typing import Any

# Command: (module, function).
_HOMES = {
    "ask": ("talk", "ask"),
    "chat": ("talk", "chat"),
    "serve": ("serve", "serve"),
    "train": ("learn", "train"),
    "data scenes": ("learn", "scenes"),
    "data check": ("inspect_data", "check"),
    "eval": ("evaluate", "evaluate"),
    "score": ("evaluate", "score"),
    "report": ("evaluate", "report"),
    "info": ("info", "info"),
    "verify": ("verify", "verify"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 the command says no, 2 a mistake, 130 interrupted.

    A mistake (a ValueError, a file that cannot be read) is one line on stderr; VLMAMBA_DEBUG=1 shows the traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    before = warnings.formatwarning
    warnings.formatwarning = _short_warning  # type: ignore[assignment]
    try:
        return _run(arguments)
    finally:
        warnings.formatwarning = before


def _run(arguments: list[str]) -> int:
    try:
        name, options = parse(arguments)
        if name is None:
            return 0
        module, function = _HOMES[name]
        return int(getattr(importlib.import_module(f"vlmamba.commands.{module}"), function)(**options) or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `vlmamba ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get("VLMAMBA_DEBUG", "0") not in ("", "0"):
            raise
        print(f"vlmamba: error: {_one_line(error)}", file=sys.stderr)
        return 2


def parse(arguments: list[str]) -> tuple[str | None, dict[str, Any]]:
    """The command's name and its options; None when only the help was asked for.

    Raises:
        ValueError: what the parser does not take.
    """
    from jsonargparse import ArgumentError

    parser = build_parser()
    if not arguments:
        parser.print_help()
        return None, {}
    if arguments[0] == "train":
        arguments = ["train", *_options_last(arguments[1:])]
    try:
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        words = _command_of(arguments)
        message = str(error).replace(".".join(words) + ".", "")  # options are known to the parser as ask.image
        raise ValueError(f"{message} (see {' '.join(['vlmamba', *words])} --help)") from None
    name = parsed.command
    options = parsed[name]
    if name == "data":
        name, options = f"data {options.command}", options[options.command]
    return name, {key.replace("-", "_"): value for key, value in vars(options).items()}


def _options_last(arguments: list[str]) -> list[str]:
    """Overrides of `train` together, wherever they stand; `--optim.epochs=2` is one as `optim.epochs=2` is."""
    words: list[str] = []
    options: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        key, equals, _ = argument.removeprefix("--").partition("=")
        if not argument.startswith("-") or (equals and "." in key):
            words.append(argument.removeprefix("--"))
        else:
            options += [argument, *islice(rest, int(argument in ("--config", "--output")))]
    return [*words, *options]


def build_parser() -> Any:
    """The parser of all commands."""
    from vlmamba import __version__

    parser = _parser(
        "VL-Mamba: a vision-language model whose language model is a Mamba.", prog="vlmamba", version=__version__
    )
    commands = parser.add_subcommands(dest="command", required=True, metavar="COMMAND")
    commands.add_subcommand("ask", _ask(), help="answer a question about an image")
    commands.add_subcommand("chat", _chat(), help="talk about images; the model's state is kept between turns")
    commands.add_subcommand("serve", _serve(), help="answer over HTTP, as OpenAI's chat completions do")
    commands.add_subcommand("train", _train(), help="run a recipe, or a pipeline of recipes such as nano")
    data = _parser("Make data, and look at data.")
    commands.add_subcommand("data", data, help="make and check data: vlmamba data scenes, vlmamba data check")
    data_commands = data.add_subcommands(dest="command", required=True, metavar="COMMAND")
    data_commands.add_subcommand(
        "scenes", _scenes(), help="draw scenes of the procedural world and write them as LLaVA and benchmark files"
    )
    data_commands.add_subcommand("check", _check(), help="what is missing, broken or surplus in a training file")
    commands.add_subcommand("eval", _eval(), help="answer the eight benchmarks, or your own questions, and score them")
    commands.add_subcommand("score", _score(), help="score anybody's answers to a benchmark")
    commands.add_subcommand("report", _report(), help="an evaluation as one HTML page, alone or beside another")
    info = _parser("What is installed, what will run, and what is wrong.")
    commands.add_subcommand("info", info, help="what is installed, which implementation runs and why")
    commands.add_subcommand("verify", _verify(), help="compare a Mamba and a vision encoder with transformers'")
    return parser


def _parser(description: str, **options: Any) -> Any:
    from jsonargparse import ArgumentParser

    return ArgumentParser(exit_on_error=False, description=description, **options)


def _device_options(parser: Any) -> None:
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, cuda:1, mps; auto takes the fastest")
    parser.add_argument(
        "--dtype", type=str, default="auto", help="float32, bfloat16, float16 or int8; auto: by the device"
    )


def _answer_options(parser: Any) -> None:
    parser.add_argument("--model", type=str, default="nano", help="nano (shipped), a folder or a Hub id")
    _device_options(parser)
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest word; above 0 samples")


def _ask() -> Any:
    parser = _parser("Answer a question about an image.")
    parser.add_argument("image", type=str, help="an image file")
    parser.add_argument("question", type=str)
    _answer_options(parser)
    return parser


def _chat() -> Any:
    parser = _parser("Talk about images. /image PATH, /reset, /quit.")
    parser.add_argument("image", type=str, nargs="?", default=None, help="an image file to begin with")
    _answer_options(parser)
    return parser


def _serve() -> Any:
    parser = _parser("Answer over HTTP, as OpenAI's chat completions do, many conversations at once.")
    parser.add_argument("model", type=str, nargs="?", default="nano", help="nano (shipped), a folder or a Hub id")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to listen at; 0.0.0.0: all of IPv4")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--slots", type=int, default=64, help="answers made at once; more requests wait")
    parser.add_argument(
        "--api-key", type=str, default=None, help="asked of every client; default: what VLMAMBA_API_KEY holds, if any"
    )
    parser.add_argument("--no-fetch", action="store_true", help="take pictures as data: URLs only, fetch none")
    parser.add_argument(
        "--allow-host", type=str, action="append", metavar="HOST", help="a private host that pictures may come from"
    )
    _device_options(parser)
    return parser


def _train() -> Any:
    parser = _parser("Run a recipe, or a pipeline of recipes.")
    parser.add_argument(
        "--config", type=str, default=None, metavar="RECIPE", help="the recipe, where it is not the first word"
    )
    parser.add_argument(
        "words",
        type=str,
        nargs="*",
        metavar="RECIPE | KEY=VALUE",
        help="a YAML file, a shipped recipe (paper/stage1) or pipeline (nano), then dotted assignments, such as "
        "stage.connector.lr=1e-3",
    )
    parser.add_argument("--output", type=str, default=None, help="folder of the run; default: runs/RECIPE")
    parser.add_argument("--dry-run", action="store_true", help="only say what would run, and what it would take")
    parser.add_argument("--overfit-one-batch", action="store_true", help="only see whether one batch can be learned")
    return parser


def _scenes() -> Any:
    parser = _parser("Draw scenes and write them with captions and questions.")
    parser.add_argument("output", type=str, help="folder to write to; it must not be there yet")
    parser.add_argument("--kind", type=str, default="all", help="llava-stage1, llava-stage2, a benchmark, or all")
    parser.add_argument("--count", type=int, default=1000, help="pictures of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=128, help="side of the pictures, in pixels")
    parser.add_argument("--split", type=str, default=None, help="train, test or held-out; default: by the kind")
    return parser


def _check() -> Any:
    parser = _parser("Look at a training file and its pictures before a run.")
    parser.add_argument("file", type=str, help="LLaVA JSON, JSON lines (.jsonl), or parquet (a file or a folder)")
    parser.add_argument("--images", type=str, default=None, help="the folder that the image paths of JSON start from")
    parser.add_argument("--report", type=str, default=None, help="write all that was found to this JSON file")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: two per core")
    parser.add_argument("--decode", type=bool, default=False, help="true: decode every picture, not only its header")
    parser.add_argument("--max-bad-share", type=float, default=0.01, help="share of samples that a run may leave out")
    return parser


def _eval() -> Any:
    parser = _parser("Answer benchmarks and score the answers.")
    parser.add_argument("model", type=str, nargs="?", default="nano", help="nano (shipped), a folder or a Hub id")
    parser.add_argument("--tasks", type=str, default=None, help="comma-separated, such as pope,gqa; default: all")
    parser.add_argument("--data", type=str, default=None, help="folder of the benchmarks")
    parser.add_argument("--check", type=str, default=None, metavar="FOLDER", help="only say what is missing there")
    parser.add_argument(
        "--out", type=str, default=None, help="folder for answers and results; default: runs/eval/MODEL"
    )
    parser.add_argument("--own", type=str, default=None, metavar="FILE", help="your own questions, as LLaVA JSON")
    parser.add_argument("--prompts", type=str, action="append", metavar="TASK=VARIANT", help="a named prompt variant")
    parser.add_argument("--batch-size", type=int, default=64, help="questions answered at a time")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many questions of a task")
    _device_options(parser)
    _scoring_options(parser)
    return parser


def _score() -> Any:
    parser = _parser("Score answers as the benchmark's official tool does.")
    parser.add_argument("task", type=str, help="vqav2, gqa, ... (vlmamba eval --check . lists them), or own")
    parser.add_argument("--predictions", type=str, required=True, help="our answers, LLaVA's, or a submission file")
    parser.add_argument(
        "--data", type=str, required=True, help="folder of the benchmarks; for own, the questions' file"
    )
    parser.add_argument("--json", dest="json_file", type=str, default=None, help="write the whole result there")
    parser.add_argument("--submissions", type=str, default=None, help="folder for what a server or a judge takes")
    _scoring_options(parser)
    return parser


def _report() -> Any:
    parser = _parser("Write an evaluation as one self-contained HTML page.")
    parser.add_argument("run", type=str, help="folder that vlmamba eval wrote, or a result file")
    parser.add_argument("--output", type=str, default="report.html", help="the page")
    parser.add_argument("--compare", type=str, default=None, help="another run, question by question")
    parser.add_argument("--sample", type=int, default=24, help="right and wrong answers shown of each benchmark")
    return parser


def _scoring_options(parser: Any) -> None:
    parser.add_argument("--images", type=str, default=None, help="folder of the pictures of your own questions")
    parser.add_argument("--metric", type=str, default="exact", help="exact, contains, vqa, anls, choice: of your own")
    parser.add_argument("--rule", type=str, default="2023-12", help="MMBench's matching rule: 2023-12 or current")
    parser.add_argument(
        "--judge-url",
        type=str,
        default=None,
        help="an OpenAI-compatible endpoint for MM-Vet, MMBench; it is sent the key in OPENAI_API_KEY",
    )
    parser.add_argument("--judge-model", type=str, default=None)
    parser.add_argument(
        "--judge-cache", type=str, default=None, help="file that keeps the judge's replies; eval: in --out"
    )
    parser.add_argument(
        "--judge-price", type=str, default=None, metavar="IN,OUT", help="dollars per million tokens, for the estimate"
    )
    parser.add_argument("--judge-runs", type=int, default=1, help="how often MM-Vet is graded")
    parser.add_argument("--few-shot", type=str, default=None, help="file with MM-Vet's official few-shot text")


def _verify() -> Any:
    parser = _parser("Load a Mamba and a vision encoder, ours and transformers', and compare them in float32.")
    parser.add_argument("language", type=str, help="folder or Hub id of a Mamba, such as state-spaces/mamba-130m")
    parser.add_argument("vision", type=str, help="folder or Hub id of a CLIP or SigLIP")
    parser.add_argument("--image", type=str, default=None, help="the picture to compare on; default: a drawn one")
    parser.add_argument("--text", type=str, default=None, help="the text to compare on")
    parser.add_argument("--device", type=str, default="cpu")
    return parser


def _command_of(arguments: list[str]) -> list[str]:
    known = {word for name in _HOMES for word in name.split()}
    return [word for word in arguments[:2] if word in known]


def _short_warning(message: Warning | str, *_: Any) -> str:
    return f"vlmamba: {_one_line(message)}\n"  # where in the source it arose helps no user


def _one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
