"""Does a compressed-tensors checkpoint serve right? Exit status 1 when it does not.

python scripts/verify.py input=OUT [reference=HF_DIR or quant_state.safetensors] [json=FILE] [tp=8]
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout in place of scripts/, where export.py would shadow the package `export`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.schema import VerifyConfig
from scripts import cli


def verify(options: VerifyConfig) -> None:
    """Applies every rule; without a reference, names and shapes come from transformers where it knows the model."""
    from bridge.hf_config import expected_tensors
    from export.verify import verify as verify_checkpoint
    from mappings.errors import CheckpointError
    from scripts.progress import progress
    from scripts.verify_tables import verify_tables

    directory = Path(options.input)
    with progress(f"verifying {directory}") as shown:
        report = verify_checkpoint(
            directory,
            reference=options.reference,
            expected=None if _is_directory(options.reference) else expected_tensors(directory),
            tp=options.tp,
            progress=shown,
        )
    if options.json:
        Path(options.json).write_text(json.dumps(report.as_json(), indent=2) + "\n")
    verify_tables(report)
    if not report.ok:
        rule, problem = report.failures[0].rule, report.failures[0].problems[0]
        count = len(report.failures)
        raise CheckpointError(
            f"{directory} would not serve right, rule {rule}: {problem}\n"
            f"Broken {'rule' if count == 1 else 'rules'}: {count}; the table above says what to do next"
        )


def _is_directory(reference: str | None) -> bool:
    return reference is not None and Path(reference).is_dir()


if __name__ == "__main__":
    cli.run("verify", verify)
