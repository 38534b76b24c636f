"""The command line, as a program and as `python -m headfold`, for launchers that start modules.

The command line takes longer to import than this file: Ctrl-C meanwhile is an interrupt as any other.
"""

import sys


def main() -> None:
    """Run the command line; an interrupt ends as one line on stderr and exit code 130."""
    try:
        from .cli import main as run

        run()
    except KeyboardInterrupt:
        from .parallel import is_main

        if is_main():
            print("headfold: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
