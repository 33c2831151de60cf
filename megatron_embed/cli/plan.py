"""`plan CONFIG.yaml --gpus N [--gpu h100]`"""

import argparse

from megatron_embed.cli.common import add_overrides, positive_int, write_output

HELP = "Estimate memory per GPU and step time of a layout, and list layouts that fit; exit code 2 if it does not fit"
EXAMPLES = ("megatron-embed plan run.yaml --gpus 8 --gpu h100",)
PAGE = "docs/planning.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from megatron_embed.planning.hardware import GPU_CHOICES

    parser.add_argument("config", metavar="CONFIG.yaml", help="The run's configuration")
    parser.add_argument("--gpus", required=True, type=positive_int, metavar="N", help="Number of GPUs, eight per node")
    parser.add_argument("--gpu", choices=tuple(GPU_CHOICES), default="h100", help="GPU model or memory (default: h100)")
    add_overrides(parser, "", "section.key=value")


def run(args: argparse.Namespace) -> int:
    """Print the needs of the layout and the layouts that fit; 0 if it fits, else 2. Needs no hub and no weights."""
    from megatron_embed.config.load import load_config
    from megatron_embed.parallel.topology import check_token_budget
    from megatron_embed.planning.advice import (
        adapted_linears,
        budget_holds,
        explain_impossible,
        with_adapters_of_model,
        with_lengths_at_hand,
        with_rows_at_hand,
    )
    from megatron_embed.planning.hardware import GPU_CHOICES
    from megatron_embed.planning.layouts import check_possible, is_possible, plan_layout, propose
    from megatron_embed.planning.one_gpu import compare_methods, methods_report
    from megatron_embed.planning.report import budget_advice, proposals, report
    from megatron_embed.planning.shapes import checkpoint_at, has_adapters, shape_of, stored_quantization_of
    from megatron_embed.planning.token_budget import advised_budget

    config, gpu = load_config(args.config, args.overrides), GPU_CHOICES[args.gpu]
    shape = shape_of(config.model.path)
    trains_all = not has_adapters(config.model.path)
    quantizes = checkpoint_at(config.model.path) is None
    config = with_adapters_of_model(with_lengths_at_hand(config, shape), shape)
    config, rows = with_rows_at_hand(config)
    if not is_possible(config, shape, args.gpus):
        explain_impossible(config, shape, args.gpus)
        check_possible(config, shape, args.gpus)
    check_token_budget(config)
    adapted = adapted_linears(config, shape)
    given = plan_layout(config, shape, args.gpus, gpu, adapted)
    write_output(report(given, shape, args.gpus, gpu, adapted, rows))
    advised = advised_budget(config, shape, args.gpus, gpu, adapted, accepts=budget_holds)
    write_output(budget_advice(given, advised, gpu))
    write_output(proposals(propose(config, shape, args.gpus, gpu, adapted, accepts=budget_holds), args.gpus))
    if args.gpus == 1:
        methods = compare_methods(config, shape, gpu, trains_all=trains_all, quantizes=quantizes,
                                  stored=stored_quantization_of(config.model.path))
        write_output(methods_report(methods, gpu))
    return 0 if given.fits else 2
