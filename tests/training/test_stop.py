from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from posttrain.errors import Stopped
from posttrain.training.stop import SIGNALS, StopSignals


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
)
def test_outside_of_steps_a_signal_stops_where_it_is(number, code):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Stopped) as stopped, StopSignals():
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == code
    assert stopped.value.signal == number.name
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_inside_of_steps_a_signal_is_noted(capfd):
    with StopSignals() as stop:
        with stop.deferring():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.received == signal.SIGTERM
        assert "a second signal stops at once" in capfd.readouterr().err
        with pytest.raises(Stopped):
            stop.check()
        with pytest.raises(Stopped), stop.deferring():
            pytest.fail("no step is begun")


def test_nothing_is_noted_without_a_signal():
    with StopSignals() as stop, stop.deferring():
        stop.check()
    assert stop.received is None


def test_a_thread_may_run_without_handlers():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run():
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_the_process_at_once(number):
    script = f"""
import os, signal
from posttrain.training.stop import StopSignals
with StopSignals() as stop, stop.deferring():
    os.kill(os.getpid(), signal.SIGTERM)
    print(stop.received, flush=True)
    os.kill(os.getpid(), {int(number)})
    print("still there")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-number, f"{int(signal.SIGTERM)}\n")
