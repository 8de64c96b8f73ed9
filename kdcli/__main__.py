"""The entry point: a Ctrl-C while the command line is still being imported ends as quietly as a later one."""

import importlib.util
import os
import sys
from functools import partial


def main() -> None:
    """Run `kd`."""
    if importlib.util.find_spec("fcntl") is None:
        sys.exit("kd: runs on Linux and macOS: its run folders need POSIX file locks, which Windows lacks; use WSL")
    try:
        from kdcli.cli import main as run

        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started it
            from kdcli.training.train import together

            run = partial(together, run)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(run())


if __name__ == "__main__":
    main()
