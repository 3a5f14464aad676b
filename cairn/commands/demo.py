"""Demo."""

import argparse

from cairn.connection import add_json_flag
from cairn.terminal import Terminal

NAME = "demo"
HELP = "x"


def configure(parser: argparse.ArgumentParser) -> None:
    add_json_flag(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    return 0
