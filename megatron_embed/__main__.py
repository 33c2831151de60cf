"""`megatron-embed COMMAND`, the same as `python -m megatron_embed COMMAND`."""

import sys

from megatron_embed.platform import stop_signal as stop

# Before all other imports, so that a signal during them ends in exit code 75 too. The installed command is a script
# that imports this module.
IS_THE_PROGRAM = __name__ == "__main__" or sys.argv[0].rpartition("/")[2] == "megatron-embed"
if IS_THE_PROGRAM:
    stop.start()

import argparse
import errno
import traceback
from collections.abc import Sequence

from megatron_embed import __version__
from megatron_embed.cli import (
    audit,
    completion,
    convert,
    data,
    doctor,
    encode,
    evaluate,
    init,
    merge,
    migrate,
    mine,
    plan,
    search,
    serve,
    train,
)
from megatron_embed.cli.common import Parser, with_examples
from megatron_embed.errors import LostRankError, PreemptedError, UserError
from megatron_embed.parallel.lost_rank import report_lost_rank
from megatron_embed.platform import cuda_environment
from megatron_embed.platform.launcher import launched_rank, process_rank, rendezvous_address, source_of_world_size
from megatron_embed.platform.status import PREEMPTED, clear_status, leaves_status, tell_torchrun, write_status
from megatron_embed.platform.terminal_text import one_line, printable, setup_logging, write_error

# A command's module loads its libraries inside run(), so that --help answers at once.
COMMANDS = {"init": init, "train": train, "convert": convert, "encode": encode, "evaluate": evaluate,
            "search": search, "mine": mine, "merge": merge, "migrate": migrate, "serve": serve, "data": data,
            "plan": plan, "audit": audit, "doctor": doctor, "completion": completion}

MULTI_RANK_COMMANDS = ("train", "encode", "evaluate", "mine", "migrate", "audit")
"""Commands whose ranks work together; a rank that fails before the rendezvous tells the others."""

SINGLE_PROCESS_COMMANDS = ("init", "convert", "merge", "search", "serve", "data", "plan", "completion")
"""Commands that several ranks would each repeat, in each other's files and ports. `doctor` checks a node by itself."""


def build_parser() -> Parser:
    parser = Parser(prog="megatron-embed", description="Train text embedding models on Megatron-Core.",
                    epilog="Several ranks: torchrun --nproc-per-node N -m megatron_embed train CONFIG.yaml")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.HELP,
                                                 epilog=with_examples(module.EXAMPLES, module.PAGE),
                                                 formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.set_defaults(parser=parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 2 bad configuration or data, 3 an audit that found a difference,
    75 preempted, 130 interrupted, else 1.

    Bad input is one line on stderr, from rank 0 only: every rank raises the same error, or is told of it before they
    start. Another rank prints only errors that rank 0 does not know.
    """
    with stop.listening():
        if leaves_status():
            clear_status()
        code, message = _run(argv, process_rank())
        stop.decided()
        if leaves_status():
            write_status(code, message)
        if IS_THE_PROGRAM:
            stop.ignore()
    return code


def refuse_several_ranks(command: str) -> None:
    """Raises UserError, on every rank alike, if a launcher started several."""
    ranks = launched_rank()[1]
    if ranks > 1:
        raise UserError(f"{command} runs in one process, and {source_of_world_size()} says {ranks} ranks; start it "
                        "once, without a launcher")


def _run(argv: Sequence[str] | None, rank: int) -> tuple[int, str]:
    """(exit code, message) of one command."""
    rendezvous, speaks = None, rank == 0
    try:
        setup_logging(rank)
        args = build_parser().parse_args(argv)
        cuda_environment.set_defaults()  # before torch is imported, by the rendezvous or a command
        speaks = True  # rank 0 may not know of errors in another rank's variables
        several = args.command != "doctor" and launched_rank()[1] > 1
        if args.command in MULTI_RANK_COMMANDS and several:
            rendezvous_address()  # refuses a bad port before the libraries are loaded
        speaks = rank == 0
        if args.command in SINGLE_PROCESS_COMMANDS:
            refuse_several_ranks(args.command)
        if args.command in MULTI_RANK_COMMANDS and several:
            from megatron_embed.parallel.rendezvous import open_rendezvous

            rendezvous = open_rendezvous()
            if rendezvous is not None:
                stop.add_exit_action(rendezvous.report_stop)
        return _run_command(args), ""
    except UserError as error:
        message = one_line(str(error))
        if speaks:
            write_error(message)
        if rendezvous is not None and rendezvous.report_error(message):
            write_error(f"rank {rank}: {message}")
        tell_torchrun(f"megatron-embed: error: {message}")
        return 2, message
    except PreemptedError as end:
        return PREEMPTED, str(end)
    except LostRankError as error:
        if error.is_reporting_rank:
            report_lost_rank(str(error))
        return 1, str(error)
    except KeyboardInterrupt:
        return 130, "interrupted"
    except SystemExit as error:
        if isinstance(error.code, int) or error.code is None:
            return error.code or 0, ""
        sys.stderr.write(f"{printable(str(error.code))}\n")
        return 1, printable(str(error.code))
    except Exception as error:  # noqa: BLE001  any other error: a traceback and exit code 1
        sys.stderr.write(printable(traceback.format_exc()))
        return 1, f"{type(error).__name__}: {error}"


def _run_command(args: argparse.Namespace) -> int:
    try:
        return COMMANDS[args.command].run(args)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        path = str(error.filename)
        raise UserError(f"{path[:60]}...: a path of {len(path):,} characters is longer than this file system takes; "
                        "give a shorter one") from None


if __name__ == "__main__":
    sys.exit(main())
