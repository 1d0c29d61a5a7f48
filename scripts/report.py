"""A checkpoint → report.html for people and report.json for programs.

python scripts/report.py input=OUT [reference=HF_DIR] [quant_state=FILE]
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout in place of scripts/, where this file would shadow the package `export`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.schema import ReportConfig
from scripts import cli


def report(options: ReportConfig) -> None:
    """Reads headers and scales, and with a reference all weights, one tensor at a time."""
    from export.report import write_report
    from scripts.progress import progress

    directory, output = Path(options.input), Path(options.output or options.input)
    with progress(f"measuring {directory}") as shown:
        write_report(
            directory,
            reference=Path(options.reference) if options.reference else None,
            quant_state=Path(options.quant_state) if options.quant_state else None,
            output=output,
            card=options.card,
            progress=shown,
        )
    print(f"{output / 'report.html'}\n{output / 'report.json'}")


if __name__ == "__main__":
    cli.run("report", report)
