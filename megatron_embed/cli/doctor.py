"""`doctor`"""

import argparse

from megatron_embed.cli.common import write_output

HELP = "versions and backends of this machine, what is missing and how to get it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(args: argparse.Namespace) -> int:
    """Print what was found; 0 if training can run here, else 1."""
    from megatron_embed.platform.doctor import examine, report

    findings = examine()
    write_output(report(findings))
    return 1 if any(finding.remedy for finding in findings) else 0
