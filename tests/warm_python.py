"""A stand-in for `python` that has imported the heavy packages already, for the tests that run whole scripts.

A script of ours starts a Python for each of its commands, and nine tenths of a command on a pico model is the import of
torch, transformers and lm-eval. `python tests/warm_python.py SOCKET` imports them once and then forks for each command
that arrives on the socket; `write_stand_in` writes the executable that is put first on PATH under the name `python`.
It hands over its arguments, folder, environment and open files, and ends with the command's exit code. When it is
killed, so is the command.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

STAND_IN = """#!{python} -IS
import json, os, socket, sys
if len(sys.argv) < 2 or not sys.argv[1].endswith(".py"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps({{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}).encode()
socket.send_fds(server, [len(request).to_bytes(8, "little")], [0, 1, 2])
server.sendall(request)
sys.exit(int(server.makefile().readline()))
"""


def write_stand_in(folder: Path, address: Path) -> None:
    """Write `folder/python`, which runs its commands in the server at `address`."""
    folder.mkdir(exist_ok=True)
    (folder / "python").write_text(STAND_IN.format(python=sys.executable, address=str(address)))
    (folder / "python").chmod(0o755)


def start_server(address: Path) -> subprocess.Popen[bytes]:
    """Start the server as a process of its own and wait until it listens."""
    server = subprocess.Popen([sys.executable, __file__, str(address)])
    while not address.exists():
        assert server.poll() is None, "the warm Python ended while it was importing"
        time.sleep(0.05)
    return server


def run_command(request: dict, files: list[int]) -> None:
    """Become the command of a request: its files, folder, environment and arguments; ends this process."""
    for descriptor, file in enumerate(files):
        os.dup2(file, descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["arguments"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve_command(client: socket.socket) -> None:
    """Run one command in a child and report its exit code; kill it when the stand-in has gone."""
    size, files, _, _ = socket.recv_fds(client, 8, 3)
    stream = client.makefile("rb")
    request = json.loads(stream.read(int.from_bytes(size, "little")))
    command = os.fork()
    if not command:
        run_command(request, files)
    for file in files:
        os.close(file)
    client.settimeout(0.02)
    while True:
        ended, status = os.waitpid(command, os.WNOHANG)
        if ended:
            client.sendall(f"{os.waitstatus_to_exitcode(status) % 256}\n".encode())
            return
        try:
            gone = not client.recv(1)
        except TimeoutError:
            continue
        if gone:
            os.kill(command, signal.SIGKILL)
            os.waitpid(command, 0)
            return


def main() -> None:
    """Import what the commands import, listen, and fork for each command."""
    import lm_eval.models.huggingface  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import scipy.stats  # noqa: F401
    from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Trainer  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    address = Path(sys.argv[1])
    listener.bind(str(address.with_suffix(".new")))
    listener.listen()
    address.with_suffix(".new").rename(address)
    while True:
        client, _ = listener.accept()
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            serve_command(client)
            os._exit(0)
        client.close()


if __name__ == "__main__":
    main()
