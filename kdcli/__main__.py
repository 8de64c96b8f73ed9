"""The entry point: a Ctrl-C while the command line is still being imported ends as quietly as a later one."""

import importlib.util
import sys


def main() -> None:
    """Run `kd`."""
    if importlib.util.find_spec("fcntl") is None:
        sys.exit("kd: runs on Linux and macOS: its run folders need POSIX file locks, which Windows lacks; use WSL")
    try:
        from kdcli.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(run())


if __name__ == "__main__":
    main()
