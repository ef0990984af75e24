"""Serves the key-value store through which the ranks form their process group:
`python -m kilobatch.trainer.ranks.store_server FD PORT`, with a socket that listens on the port already, until it is
killed.

It has a process of its own, as loading torch takes seconds in which the launcher has to heed signals and failures, and
as every rank may end before the others do.
"""

import signal
import sys
from datetime import timedelta


def main() -> None:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    descriptor, port = int(sys.argv[1]), int(sys.argv[2])
    _store = TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=30),
        master_listen_fd=descriptor,
    )
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
