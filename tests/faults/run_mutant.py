"""A server whose API process is a mutant:  python -m tests.faults.run_mutant NAME FLAGS."""

import sys

from frontend.__main__ import main
from tests.faults.mutant_engines import IN_API_PROCESS

if __name__ == "__main__":
    IN_API_PROCESS[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
