"""Write what changed between two checkpoints of one training.

amaxbridge delta base=STEP_1 new=STEP_2 output=DELTA
"""

import json
from dataclasses import asdict
from pathlib import Path

from amaxbridge import cli
from amaxbridge.configs.schema import DeltaConfig


def delta(options: DeltaConfig) -> None:
    """Writes the delta and says how small it is."""
    from amaxbridge.export.delta.checkpoint_delta import delta_path, write_delta

    report = write_delta(
        options.base,
        options.new,
        options.output,
        overwrite=options.io.overwrite,
        hash_source=options.io.hash_source,
    )
    if options.json:
        Path(options.json).write_text(json.dumps(asdict(report), indent=2) + "\n")
    print(
        f"{delta_path(options.output)}: {report.nbytes:,} bytes for a checkpoint of {report.whole_bytes:,}, "
        f"{report.nbytes / report.whole_bytes:.2%}\n"
        f"{report.unchanged:,} tensors are unchanged, {report.in_places:,} changed in {report.changed_elements:,} "
        f"places, {report.whole:,} are in it whole\n"
        f"next: amaxbridge apply base={options.base} delta={options.output} output=OUT"
    )


def main() -> None:
    """`amaxbridge delta`."""
    cli.run("delta", delta)


if __name__ == "__main__":
    main()
