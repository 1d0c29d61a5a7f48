"""`push_to_hub=`: the repository before the work begins, the upload after it has ended."""

from amaxbridge.configs.schema import ExportConfig, QuantizeConfig
from amaxbridge.export import hub


def prepare(options: ExportConfig | QuantizeConfig) -> None:
    """Sees to it that the Hub will take the output. A dry run changes nothing there, but the name must be one."""
    hub.check_name("push_to_hub", options.push_to_hub)
    if options.push_to_hub is not None and not options.dry_run:
        hub.prepare_repo(options.push_to_hub, overwrite=options.io.overwrite)


def push(options: ExportConfig | QuantizeConfig) -> None:
    """Uploads the finished output, and prints its address."""
    if options.push_to_hub is not None and not options.dry_run:
        address = hub.push_to_hub(options.output, options.push_to_hub, overwrite=options.io.overwrite)
        print(f"uploaded: {address}")
