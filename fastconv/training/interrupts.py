"""Ctrl-C and SIGTERM as a wish: finish the step, write the checkpoint, leave."""

import signal
import threading

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Within ``with``, the first signal is noted in `received`; the second ends the program.

    Off the main thread, where Python allows no handlers, signals do what they did before.

    Args:
        patient: the second is ignored. torchrun passes a signal on and may send others after it,
            and where processes share a training one that leaves early takes the checkpoint along;
            torchrun ends by force whoever stays for longer than half a minute.
    """

    def __init__(self, patient: bool = False):
        self.received = 0
        self.patient = patient
        self._before = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.received:
            if self.patient:
                return
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self.received = number
