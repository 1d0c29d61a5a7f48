"""Where things lie in the repository, and the environment of the processes that tests start."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
WORKERS = TESTS / "workers"
GOLDEN = TESTS / "golden"
PUBLISHED_MODELS = TESTS / "published_models"

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
