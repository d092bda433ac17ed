"""`python -m aoai_usage_pipeline.cli`."""

import sys

from aoai_usage_pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
