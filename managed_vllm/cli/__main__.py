"""`python -m managed_vllm.cli`."""

import sys

from managed_vllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
