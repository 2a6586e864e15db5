"""``python -m llm_datadist.tools``, for where the console entry is not on the path."""
import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
