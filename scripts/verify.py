"""Check that a compressed-tensors checkpoint serves right; exit status 1 if it does not.

amaxbridge verify input=OUT [reference=HF_DIR or quant_state.safetensors] [engine=vllm] [tp=8] [ep=8] [json=FILE]
"""

import json
import time
from pathlib import Path

from amaxbridge import cli
from amaxbridge.configs.schema import VerifyConfig


def verify(options: VerifyConfig) -> None:
    """Applies every rule. Without a reference, names and shapes come from transformers if it knows the model."""
    from amaxbridge.bridge.hf import expected_tensors
    from amaxbridge.export.verify import verify as verify_checkpoint
    from amaxbridge.mappings.errors import CheckpointError
    from amaxbridge.scripts.progress_bar import progress
    from amaxbridge.scripts.verify_tables import verify_tables

    began = time.monotonic()
    directory = Path(options.input)
    with progress(f"verifying {directory}") as shown:
        report = verify_checkpoint(
            directory,
            reference=options.reference,
            expected=None if _is_directory(options.reference) else expected_tensors(directory),
            engine=options.engine,
            tp=options.tp,
            ep=options.ep,
            progress=shown,
        )
    if options.json:
        Path(options.json).write_text(json.dumps(report.as_json(), indent=2) + "\n")
    verify_tables(report, time.monotonic() - began)
    if not report.ok:
        rule, problem = report.failures[0].rule, report.failures[0].problems[0]
        count = len(report.failures)
        where = "" if options.engine == "all" else f" in {options.engine}"
        raise CheckpointError(
            f"{directory} would not serve right{where}, rule {rule}: {problem}\n"
            f"Broken {'rule' if count == 1 else 'rules'}: {count}; the table above says what to do next"
        )


def _is_directory(reference: str | None) -> bool:
    return reference is not None and not reference.endswith(".safetensors")


def main() -> None:
    """`amaxbridge verify`."""
    cli.run("verify", verify)


if __name__ == "__main__":
    main()
