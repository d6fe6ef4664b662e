"""`python -m otel_odibi`, which is the command `otel-odibi`."""

from __future__ import annotations

import importlib.util
import sys

from otel_odibi.errors import MissingExtraError


def main() -> None:
    """Run the command line. Where the extra `cli` is not installed, print how to install it and exit with 2."""
    if importlib.util.find_spec("click") is None or importlib.util.find_spec("rich") is None:
        sys.stderr.write(f"{MissingExtraError('the command otel-odibi', 'cli')}\n")
        sys.exit(2)
    from otel_odibi import cli

    cli.main()


if __name__ == "__main__":
    main()
