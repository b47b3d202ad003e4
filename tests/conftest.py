"""What all tests share.

pytest runs a process a core, so each of them computes with one thread, and so does each process
that a test starts.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
