"""Types of command-line arguments, with errors of one sentence."""

import argparse
import math


def at_least(least: int, below: int = 2**63):
    """An argparse type: a whole number that is not below `least`, and below `below`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, but got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, but is {value}")
        if value >= below:
            raise argparse.ArgumentTypeError(f"must be below {below}, but is {value}")
        return value

    return parse


def number(least: float, below: float = math.inf, may_be_least: bool = True):
    """An argparse type: a finite number from `least`, itself included or not, to under `below`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, but got {text!r}") from None
        if not (least <= value < below and (may_be_least or value > least)):
            low = "at least" if may_be_least else "above"
            high = f" and below {below:g}" if below < math.inf else " and finite"
            raise argparse.ArgumentTypeError(f"must be {low} {least:g}{high}, but is {text}")
        return value

    return parse
