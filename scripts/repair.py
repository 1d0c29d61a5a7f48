"""Mend a compressed-tensors checkpoint that engines read wrong; exit status 1 if it would not serve even so.

amaxbridge repair input=BAD output=GOOD [unseen=layer_max] [dry_run=true] [json=FILE]
"""

import json
from pathlib import Path

from amaxbridge import cli
from amaxbridge.configs.schema import RepairConfig


def repair(options: RepairConfig) -> None:
    """Shows every change, and writes the mended checkpoint. Transformers says names and shapes, if it knows them."""
    from amaxbridge.bridge.hf import expected_tensors
    from amaxbridge.export.repair import repair as repair_checkpoint
    from amaxbridge.mappings.errors import CheckpointError
    from amaxbridge.scripts.progress_bar import progress
    from amaxbridge.scripts.repair_tables import repair_tables

    source = Path(options.input)
    with progress(f"repairing {source}") as shown:
        report = repair_checkpoint(
            source,
            options.output,
            expected=expected_tensors(source) if source.is_dir() else None,
            unseen=options.unseen,
            copy=options.copy,
            overwrite=options.io.overwrite,
            hash_source=options.io.hash_source,
            dry_run=options.dry_run,
            verify=options.verify,
            progress=shown,
            record={"command_line": cli.command_line("repair")},
        )
    if options.json:
        Path(options.json).write_text(json.dumps(report.as_json(), indent=2, ensure_ascii=False) + "\n")
    repair_tables(report, options.output)
    if not report.ok and not report.written:
        raise CheckpointError(f"{source} would not serve right even with all changes; the table above says why")


def main() -> None:
    """`amaxbridge repair`."""
    cli.run("repair", repair)


if __name__ == "__main__":
    main()
