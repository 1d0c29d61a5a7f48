"""Report on a checkpoint: report.html for people, report.json for programs.

amaxbridge report input=OUT [reference=HF_DIR] [quant_state=FILE]
"""

import time
from pathlib import Path

from amaxbridge import cli
from amaxbridge.configs.schema import ReportConfig


def report(options: ReportConfig) -> None:
    """Reads headers and scales, and with a reference all weights, one tensor at a time."""
    from amaxbridge.export.output.model_card import size_text
    from amaxbridge.export.report import write_report
    from amaxbridge.scripts.progress_bar import progress
    from amaxbridge.scripts.showing import show_end

    began = time.monotonic()
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
    print(output / "report.json")
    page = output / "report.html"
    show_end(f"{page}: {size_text(page.stat().st_size)}", time.monotonic() - began)
    print(f"next: open it in a browser: {page.resolve().as_uri()}")


def main() -> None:
    """`amaxbridge report`."""
    cli.run("report", report)


if __name__ == "__main__":
    main()
