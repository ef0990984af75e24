"""A worker without torch that asks for memory: `python -m scripted_memory <what> FOLDER`."""

import os
import signal
import sys
import time
import traceback

BLOCK = 1 << 26  # bytes


def main() -> None:
    blocks: list[bytes] = []
    try:
        while sys.argv[1] == "grows" or len(blocks) < 2:
            blocks.append(b"x" * BLOCK)
            time.sleep(0.1)  # so that it is seen with what it holds
        if sys.argv[1] == "asks in vain":
            raise MemoryError
    except MemoryError:
        traceback.print_exc()
        os._exit(1)
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
