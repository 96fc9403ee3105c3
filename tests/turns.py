"""Which part of a product of cases is run where each of them takes seconds."""

import os

# `make test-all` takes no turns.
EVERYTHING = bool(os.environ.get("FASTCONV_EVERY_SEED"))


def slow(what):
    """Whether a row's or a backend's kernels are emulated or interpreted on the CPU."""
    name = getattr(what, "backend", what.name)
    return name == "emulator" or interpreted(what)


def interpreted(what):
    """Whether Triton's interpreter runs them: thousands of times slower than a kernel."""
    name = getattr(what, "backend", what.name)
    return name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def in_turn(cases, some, *places, every=4):
    """All cases; or, for `some`, every fourth from the sum of `places` on. Tests that differ in two
    places of four values each then show every case every value of both: a Latin square."""
    cases = list(cases)
    return cases[sum(places) % every :: every] if some and not EVERYTHING else cases
