"""Make the checkpoint that a delta was written for.

amaxbridge apply base=STEP_1 delta=DELTA output=OUT
"""

from pathlib import Path

from amaxbridge import cli
from amaxbridge.configs.schema import ApplyConfig


def apply(options: ApplyConfig) -> None:
    """Writes the directory, whole or not at all."""
    from amaxbridge.export.delta.applied_directory import apply_delta
    from amaxbridge.scripts.progress_bar import progress

    with progress(f"applying {Path(options.delta).name}") as shown:
        report = apply_delta(
            options.base,
            options.delta,
            options.output,
            overwrite=options.io.overwrite,
            hash_source=options.io.hash_source,
            progress=shown,
        )
    print(
        f"{options.output}: {report.tensors:,} tensors, {report.nbytes:,} bytes, and {report.files:,} other files, "
        "byte for byte what the delta was written for"
    )


def main() -> None:
    """`amaxbridge apply`."""
    cli.run("apply", apply)


if __name__ == "__main__":
    main()
