"""Fuzzing at length: `make fuzz`, or `python -m tests.fuzz.run --seconds 600 --seed 1`.

Prints the table of docs/reliability.md, and for everything that must not happen the seed that repeats it:
`--entry ENTRY --only SEED`.
"""

import argparse
import logging
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from random import Random

from tests.fuzz.cases import ENTRIES, Outcome, run_case
from tests.fuzz.inputs import make_inputs


def main() -> None:
    """Runs cases until the time is over; exits with 1 if one was foreign, silent or a hang."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--entry", choices=ENTRIES)
    parser.add_argument("--only", type=int)
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    entries = [asked.entry] if asked.entry else list(ENTRIES)
    with tempfile.TemporaryDirectory() as directory:
        inputs, root = Path(directory) / "inputs", Path(directory) / "root"
        inputs.mkdir()
        root.mkdir()
        make_inputs(inputs)
        for entry in entries:  # each once as it is: everything is imported, and the inputs are good
            found = run_case(inputs, root, entry, Random(0), changed=False)
            if found.what != "done":
                sys.exit(f"{entry}: {found.what}, without any change: {found.detail}")
        if asked.only is not None:
            print(run_case(inputs, root, entries[0], Random(asked.only)))
            return
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        counts, bad = Counter[tuple[str, str]](), list[tuple[int, Outcome]]()
        seed, begin, slowest = asked.seed * 1_000_000, time.monotonic(), 0.0
        while time.monotonic() - begin < asked.seconds:
            for entry in entries:
                seed += 1
                started = time.process_time()
                found = run_case(inputs, root, entry, Random(seed))
                slowest = max(slowest, time.process_time() - started)
                counts[entry, found.what] += 1
                if found.is_bad:
                    bad.append((seed, found))
                    print(
                        f"--entry '{entry}' --only {seed}: {found.change}: {found.what}\n{found.detail[-1500:]}",
                        flush=True,
                    )
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    kinds = ("refused", "done", "foreign", "hang", "silent")
    print("| entry | inputs | " + " | ".join(kinds) + " |\n|---" + "|---:" * (len(kinds) + 1) + "|")
    for entry in entries:
        row = [counts[entry, kind] for kind in kinds]
        print(f"| {entry} | {sum(row):,} | " + " | ".join(f"{count:,}" for count in row) + " |")
    print(
        f"\n{sum(counts.values()):,} inputs; the slowest took {slowest:.1f} s of CPU time; memory grew by {grown:,} MiB"
    )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
