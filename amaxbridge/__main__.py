"""`amaxbridge COMMAND …`, and the same as `python -m amaxbridge COMMAND …`, under torchrun too."""

import sys
from importlib import import_module

from amaxbridge.closed_pipe import quiet_on_closed_pipe

COMMANDS = {
    "export": ("export", "a Megatron checkpoint to a Hugging Face checkpoint in the compressed-tensors format"),
    "import": ("import_hf", "a Hugging Face checkpoint to a Megatron checkpoint"),
    "quantize": ("quantize", "a Hugging Face checkpoint to compressed-tensors, without Megatron or a model"),
    "verify": ("verify", "check a checkpoint before it is served"),
    "repair": ("repair", "mend a checkpoint that engines read wrong, without the original weights"),
    "report": ("report", "a page and JSON about a checkpoint"),
    "delta": ("delta", "what changed between two checkpoints of one training, in one file"),
    "apply": ("apply", "a checkpoint and a delta to the checkpoint that the delta was written for"),
}
"""The name of each command: its module in `amaxbridge.scripts`, and what it does."""


@quiet_on_closed_pipe()
def main() -> None:
    """Runs the command that the first argument names; exits with its status, or with 2 where there is none."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if words else sys.stderr)
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        from amaxbridge import __version__

        print(__version__)
        return
    if words[0] == "completion":
        from amaxbridge.configs.completion import bash_completion
        from amaxbridge.configs.schema import COMMANDS as OPTIONS

        print(bash_completion({name: OPTIONS[module] for name, (module, _) in COMMANDS.items()}))
        return
    name = words[0]
    if name not in COMMANDS:
        print(f"error: unknown command '{name}'\n\n{_usage()}", file=sys.stderr)
        sys.exit(2)
    sys.argv[:2] = [f"amaxbridge {name}"]
    import_module(f"amaxbridge.scripts.{COMMANDS[name][0]}").main()


def _usage() -> str:
    commands = [f"  {name:<10}{meaning}" for name, (_, meaning) in COMMANDS.items()]
    lines = [
        "usage: amaxbridge COMMAND [option=value …]",
        "",
        *commands,
        "",
        "amaxbridge COMMAND --help shows the options; amaxbridge completion, a script that completes them in bash:",
        '    eval "$(amaxbridge completion)"',
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
