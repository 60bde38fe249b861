"""`fedlora client`."""

import signal

from fedlora.client.supervisor import ClientOptions, ClientSupervisor


def run_client(options: ClientOptions) -> None:
    """Runs a client until SIGTERM or Ctrl-C; see `ClientSupervisor`."""
    supervisor = ClientSupervisor(options)
    signal.signal(signal.SIGTERM, lambda *_: supervisor.stop())
    signal.signal(signal.SIGINT, lambda *_: supervisor.stop())
    supervisor.run()
