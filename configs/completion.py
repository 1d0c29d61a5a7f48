"""Completion of command lines in bash: a script with every command, option and choice, made of the declarations.

The script knows all names, so that a press of the tab key starts no Python. After `name=` come the choices of a group,
`true` and `false`, or files.
"""

from collections.abc import Mapping

from amaxbridge.configs.options import choices_of, options_of

_SCRIPT = r"""_amaxbridge() {
    local line="${COMP_LINE:0:COMP_POINT}" names= values= word name count
    local -a words
    read -ra words <<< "$line"
    word="${line##* }"
    count=$(( ${#words[@]} - (${#word} > 0) ))  # words before the one that is completed
    if (( count < 2 )); then
        COMPREPLY=($(compgen -W "%s" -- "$word"))
        return
    fi
    compopt -o nospace
    name="${word%%%%=*}"
    case "${words[1]}" in
%s
    esac
    if [[ $word != *=* ]]; then
        COMPREPLY=($(compgen -S = -W "$names" -- "$word"))
        return
    fi
    case "${words[1]} $name" in
%s
    esac
    word="${word#*=}"
    if [[ -n $values ]]; then
        COMPREPLY=($(compgen -W "$values" -- "$word"))
    else
        compopt -o filenames
        local IFS=$'\n'
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}
complete -F _amaxbridge amaxbridge"""


def bash_completion(commands: Mapping[str, type]) -> str:
    """The script for bash.

    Args:
        commands: the name of each command, as it is typed → its options.
    """
    names, values = [], []
    for command, schema in commands.items():
        options = dict(options_of(schema))
        names.append(f'        {command}) names="{" ".join(options)}" ;;')
        for name, field in options.items():
            choices = choices_of(name) or (["true", "false"] if field.type is bool else [])
            if choices:
                values.append(f'        "{command} {name}") values="{" ".join(choices)}" ;;')
    return _SCRIPT % (" ".join([*commands, "completion"]), "\n".join(names), "\n".join(values))
