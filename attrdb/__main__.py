"""The command line `attrdb`, which is `python -m attrdb`, too."""

import signal
import sys


def main() -> None:
    """Run a command. Ctrl-C ends it quietly at any moment, also while modules are imported and after its work."""
    try:
        from attrdb.cli import main as commands

        commands(prog_name="attrdb")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
