"""Report on a checkpoint: report.html for people, report.json for programs.

amaxbridge report input=OUT [reference=HF_DIR] [quant_state=FILE]
"""

from pathlib import Path

from amaxbridge import cli
from amaxbridge.configs.schema import ReportConfig


def report(options: ReportConfig) -> None:
    """Reads headers and scales, and with a reference all weights, one tensor at a time."""
    from amaxbridge.export.report import write_report
    from amaxbridge.scripts.progress_bar import progress

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


def main() -> None:
    """`amaxbridge report`."""
    cli.run("report", report)


if __name__ == "__main__":
    main()
