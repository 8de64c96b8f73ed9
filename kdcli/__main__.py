"""The entry point: a Ctrl-C while the command line is still being imported ends as quietly as a later one."""

import sys


def main() -> None:
    """Run `kd`."""
    try:
        from kdcli.cli import main
    except KeyboardInterrupt:
        sys.exit(130)
    main()


if __name__ == "__main__":
    main()
