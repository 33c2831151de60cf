"""The options of `encode`, `evaluate` and `mine` for the prompts before texts."""

import argparse


def add_prompt_arguments(parser: argparse.ArgumentParser, about_queries: str = "") -> None:
    """`about_queries`: what the help says beside the default."""
    parser.add_argument("--query-prompt", metavar="TEXT",
                        help=f"Prompt before every query ({about_queries}default: the model's own)")
    parser.add_argument("--document-prompt", metavar="TEXT",
                        help="Prompt before every document (default: the model's own)")
