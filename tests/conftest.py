"""Settings that must stand before torch or a kernel is imported anywhere in the run."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
